"""Sequences that wait, in the order in which they are to start, found without sorting them.

Priority comes first (smaller goes first). Within one, those that must not be passed over go first, in order of
arrival: preempted ones, and those for which room is kept. The others stand in lines, one for each tenant and what it
wants on the device; whose line is next, the tenants' and adapters' service decides (`fairness.py`), and with equal
service arrival.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import islice

from perseid_server.engine.fairness import Account, Shares
from perseid_server.engine.sequence import Sequence

_LineKey = tuple[str, tuple[str, ...]]  # label, versions


@dataclass(slots=True, eq=False)
class _Line:
    """Sequences of one tenant that want the same on the device."""

    account: Account  # of the adapter
    adapters: tuple[str, ...]
    sequences: OrderedDict[int, Sequence] = field(default_factory=OrderedDict)  # by arrival, in that order
    num_passed: int = 0  # so many from the start have been looked at in this round and stay
    is_closed: bool = False  # for this round

    def next(self) -> Sequence | None:
        """The first that has not been looked at in this round."""
        return None if self.is_closed else next(islice(self.sequences.values(), self.num_passed, None), None)


@dataclass(slots=True, eq=False)
class _Tenant:
    """The lines of one tenant."""

    account: Account
    lines: dict[_LineKey, _Line] = field(default_factory=dict)


@dataclass(slots=True)
class _Level:
    """All that wait with one priority."""

    first: dict[int, Sequence] = field(default_factory=dict)  # by arrival
    tenants: dict[str, _Tenant] = field(default_factory=dict)


class Waiting:
    """A collection of sequences. `in_order` costs a little for each line, and nothing for the others in it."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._sequences: dict[str, Sequence] = {}
        self._levels: dict[int, _Level] = {}
        self._adapters: tuple[str, ...] | None = ()  # None: to be found anew

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        return iter(self._sequences.values())

    def __contains__(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.id) is sequence

    @property
    def adapters(self) -> tuple[str, ...]:
        """Versions that are waited for, sorted."""
        if self._adapters is None:
            found: set[str] = set()
            for level in self._levels.values():
                found.update(*(sequence.adaptation.adapters for sequence in level.first.values()))
                found.update(*(line.adapters for tenant in level.tenants.values() for line in tenant.lines.values()))
            self._adapters = tuple(sorted(found))
        return self._adapters

    def add(self, sequence: Sequence, *, first: bool = False) -> None:
        """One more, behind those of its line, or among those that go first."""
        self._sequences[sequence.id] = sequence
        level = self._levels.setdefault(sequence.request.priority, _Level())
        if first:
            level.first[sequence.arrival] = sequence
            self._adapters = None
        else:
            self._line_of(level, sequence).sequences[sequence.arrival] = sequence

    def remove(self, sequence: Sequence) -> None:
        """It starts, or has ended."""
        del self._sequences[sequence.id]
        priority, request = sequence.request.priority, sequence.request
        level = self._levels[priority]
        if level.first.pop(sequence.arrival, None) is None:
            tenant = level.tenants[request.tenant]
            line = tenant.lines[_line_key(sequence)]
            del line.sequences[sequence.arrival]
            if line.sequences:
                return
            del tenant.lines[_line_key(sequence)]
            if not tenant.lines:
                del level.tenants[request.tenant]
        self._adapters = None
        if not level.first and not level.tenants:
            del self._levels[priority]

    def put_first(self, sequence: Sequence) -> None:
        """It must not be passed over any longer."""
        self.remove(sequence)
        self.add(sequence, first=True)

    def in_order(self) -> Iterator[Sequence]:
        """A round. Each sequence may be removed, and its tokens counted, when it has been yielded. What is passed over
        stays, and those of its line follow, unless the line is closed."""
        for _, level in sorted(self._levels.items(), key=lambda item: item[0]):
            yield from [level.first[arrival] for arrival in sorted(level.first)]
            yield from self._fairly(level)

    def close_line(self, sequence: Sequence) -> None:
        """What a sequence needs is not there: no other that wants the same follows in this round."""
        tenant = self._levels[sequence.request.priority].tenants.get(sequence.request.tenant)
        line = tenant.lines.get(_line_key(sequence)) if tenant is not None else None
        if line is not None:
            line.is_closed = True

    def _line_of(self, level: _Level, sequence: Sequence) -> _Line:
        share = self._shares[sequence]
        tenant = level.tenants.get(sequence.request.tenant)
        if tenant is None:
            tenant = level.tenants[sequence.request.tenant] = _Tenant(share.tenant)
        key = _line_key(sequence)
        if key not in tenant.lines:
            tenant.lines[key] = _Line(share.adapter, sequence.adaptation.adapters)
            self._adapters = None
        return tenant.lines[key]

    @staticmethod
    def _fairly(level: _Level) -> Iterator[Sequence]:
        rounds = [_Round(tenant) for tenant in level.tenants.values()]
        heap = [(each.key, each) for each in rounds if each.lines]
        heapify(heap)  # arrivals are unique: rounds are never compared
        while heap:
            _, tenant = heappop(heap)
            yield from tenant.step()
            if tenant.lines:
                heappush(heap, (tenant.key, tenant))


class _Round:
    """The lines of one tenant, in the order of one round."""

    def __init__(self, tenant: _Tenant) -> None:
        self._account = tenant.account
        self.lines: list[tuple[float, int, _Line]] = []  # service, arrival of the next: a heap
        for line in tenant.lines.values():
            line.num_passed, line.is_closed = 0, False
            self._push(line)

    @property
    def key(self) -> tuple[float, int]:
        """Service of the tenant, arrival of its next sequence."""
        return self._account.service, self.lines[0][1]

    def step(self) -> Iterator[Sequence]:
        """The tenant's next sequence, if there is one."""
        line = heappop(self.lines)[-1]
        sequence = line.next()
        if sequence is None:
            return
        yield sequence
        if sequence.arrival in line.sequences:
            line.num_passed += 1
        self._push(line)

    def _push(self, line: _Line) -> None:
        following = line.next()
        if following is not None:
            heappush(self.lines, (line.account.service, following.arrival, line))


def _line_key(sequence: Sequence) -> _LineKey:
    return sequence.label, sequence.adaptation.versions
