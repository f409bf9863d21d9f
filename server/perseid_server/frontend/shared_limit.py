"""A limit that tenants share: who asks for much cannot take it all from who asks for little.

A tenant may hold at most w · HEADROOM · free, with w its weight and `free` what would be left after (dynamic
thresholds, Choudhury and Hahne 1998, as switches share their buffer memory among ports). One busy tenant then gets
4/5 of the limit, n busy ones 4/(4n + 1) each, and something is always left for the next that comes.
"""

from collections import Counter

from perseid_server.access.caller import Caller

HEADROOM = 4.0


class SharedLimit:
    """At most `limit` of something at once, in shares. What is larger than the limit gets through when it is alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self._by_tenant: Counter[str] = Counter()

    def fits(self, amount: int) -> bool:
        """Whether the total leaves room for so much more."""
        return self.total == 0 or self.total + amount <= self.limit

    def is_fair(self, caller: Caller, amount: int) -> bool:
        """Whether the caller's tenant may have so much more. Without keys there are no tenants, and no shares."""
        held = self._by_tenant[caller.tenant]
        if not caller.tenant or not held:
            return True
        return held + amount <= HEADROOM * caller.weight * (self.limit - self.total - amount)

    def take(self, caller: Caller, amount: int) -> None:
        """Count it, whether it fits or not."""
        self.total += amount
        self._by_tenant[caller.tenant] += amount

    def give_back(self, caller: Caller, amount: int) -> None:
        """What was taken."""
        self.total -= amount
        self._by_tenant[caller.tenant] -= amount
        if self._by_tenant[caller.tenant] == 0:
            del self._by_tenant[caller.tenant]
