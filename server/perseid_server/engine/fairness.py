"""Virtual token counters: who has been served least goes next.

Each tenant has a counter of its service, and within it each adapter (and the base) has one:

    service += (w_p · prompt tokens computed + w_q · output tokens) / weight

The sequence to start next is of the tenant with the least service, and there of the adapter with the least. Whoever
begins to wait is lifted to the least of those who wait already: idle time is not saved up. Whoever is gone is forgotten
once others have been served as much; a pause does not forgive what was taken before it. While two of equal weights both
wait, what they are served differs by no more than 2 · max(w_p · longest prompt, w_q · tokens in memory).

Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024.
"""

from dataclasses import dataclass, field

from perseid_server.engine.sequence import Sequence

PROMPT_TOKEN = 1.0
OUTPUT_TOKEN = 2.0
"""w_p and w_q: a token that is decoded costs more than one that is read among many (the paper's choice)."""


class Accounts:
    """The accounts of one level: all tenants, or all adapters of one tenant."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._num_sequences = 0
        self._last_waited: Account | None = None

    def __len__(self) -> int:
        return len(self._accounts)

    def enter(self, name: str) -> "Account":
        """One more sequence of this name, which does not wait yet."""
        if name not in self._accounts:
            self._accounts[name] = Account()
        account = self._accounts[name]
        account.num_sequences += 1
        self._num_sequences += 1
        return account

    def leave(self, account: "Account") -> None:
        """One of its sequences has ended."""
        account.num_sequences -= 1
        self._num_sequences -= 1
        if self._num_sequences == 0:
            self._accounts.clear()
            self._last_waited = None

    def wait(self, account: "Account") -> None:
        """One of its sequences begins to wait."""
        if account.num_waiting == 0:
            self._lift(account)
        account.num_waiting += 1

    def end_wait(self, account: "Account") -> None:
        """One of its sequences waits no more: it starts, or has ended."""
        account.num_waiting -= 1
        self._last_waited = account

    def _lift(self, account: "Account") -> None:
        """To the least of those who wait; where nobody does, to the one who did last. On the way, those who are gone
        and have had no more than that are forgotten."""
        waiting = [each.service for each in self._accounts.values() if each.num_waiting]
        least = min(waiting, default=self._last_waited.service if self._last_waited is not None else 0.0)
        account.service = max(account.service, least)
        gone = [name for name, each in self._accounts.items() if not each.num_sequences and each.service <= least]
        for name in gone:
            del self._accounts[name]


@dataclass(slots=True, eq=False)
class Account:
    """What one tenant, or one adapter of a tenant, has been served."""

    service: float = 0.0  # weighted tokens
    num_sequences: int = 0  # that have not ended
    num_waiting: int = 0  # of those, not running
    adapters: Accounts = field(default_factory=Accounts)  # of a tenant


@dataclass(slots=True, eq=False)
class Share:
    """Where one sequence's tokens are counted."""

    tenant: Account
    adapter: Account
    weight: float  # of the tenant
    num_read: int = 0  # prompt tokens counted
    num_written: int = 0  # output tokens counted
    waits: bool = False

    @property
    def service(self) -> tuple[float, float]:
        """Of the tenant, and of its adapter: least goes next."""
        return self.tenant.service, self.adapter.service


class Shares:
    """Whose turn it is, over all sequences that wait or run."""

    def __init__(self) -> None:
        self._tenants = Accounts()
        self._shares: dict[str, Share] = {}  # by request id

    def __getitem__(self, sequence: Sequence) -> Share:
        return self._shares[sequence.id]

    def enter(self, sequence: Sequence) -> None:
        """A new sequence."""
        tenant = self._tenants.enter(sequence.request.tenant)
        adapter = tenant.adapters.enter(sequence.label)
        self._shares[sequence.id] = Share(tenant, adapter, sequence.request.weight)

    def leave(self, sequence: Sequence) -> None:
        """It has ended."""
        self.end_wait(sequence)
        share = self._shares.pop(sequence.id)
        share.tenant.adapters.leave(share.adapter)
        self._tenants.leave(share.tenant)

    def wait(self, sequence: Sequence) -> None:
        """It begins to wait, new or preempted."""
        share = self[sequence]
        share.waits = True
        self._tenants.wait(share.tenant)
        share.tenant.adapters.wait(share.adapter)

    def end_wait(self, sequence: Sequence) -> None:
        """It waits no more, if it did."""
        share = self[sequence]
        if share.waits:
            share.waits = False
            share.tenant.adapters.end_wait(share.adapter)
            self._tenants.end_wait(share.tenant)

    def count(self, sequence: Sequence, start: int, end: int) -> None:
        """Its tokens from `start` to `end` are computed, or soon will be. None counts twice, whatever is computed again
        after a preemption; what comes from the prefix cache does not count."""
        share = self[sequence]
        read = min(end, sequence.num_prompt)
        written = max(end - sequence.num_prompt, 0)
        tokens = PROMPT_TOKEN * max(read - max(start, share.num_read), 0)
        tokens += OUTPUT_TOKEN * max(written - share.num_written, 0)
        share.num_read = max(share.num_read, read)
        share.num_written = max(share.num_written, written)
        share.tenant.service += tokens / share.weight
        share.adapter.service += tokens
