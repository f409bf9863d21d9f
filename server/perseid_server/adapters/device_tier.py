"""Adapters on the device: who leaves for others, the least recently used first, and whether there can be room ever."""

from collections import OrderedDict
from collections.abc import Collection, Sequence

from perseid_server.adapters.pool import AdapterPool
from perseid_server.adapters.tracked import Tracked


class DeviceTier:
    """Decides over the pages of a pool. What is in use or pinned never leaves."""

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool
        self._order: OrderedDict[str, Tracked] = OrderedDict()  # least recently used first

    def arrived(self, adapter: Tracked) -> None:
        """Its pages are filled."""
        adapter.on_device = True
        self._order[adapter.version] = adapter

    def used(self, adapter: Tracked) -> None:
        """It leaves later than the others."""
        self._order.move_to_end(adapter.version)

    def leave(self, adapter: Tracked) -> None:
        """Give its pages back."""
        assert adapter.pages is not None, "it is on the device"
        self._pool.free(adapter.pages)
        adapter.pages = None
        adapter.on_device = False
        adapter.wanted = False
        del self._order[adapter.version]

    def make_room(self, num_pages: int, *, spare_wanted: bool, spared: Collection[str]) -> list[Tracked] | None:
        """Evict idle adapters until enough pages are free; those that went, or None, and nobody goes, if that cannot
        be. `spare_wanted`: what came for a request and waits for it stays. `spared`: versions that stay."""
        idle = [each for each in self._order.values() if each.users == 0 and not each.pinned]
        idle = [each for each in idle if each.version not in spared and not (spare_wanted and each.wanted)]
        if self._pool.num_free + sum(each.num_pages for each in idle) < num_pages:
            return None
        gone = []
        for each in idle:
            if self._pool.num_free >= num_pages:
                break
            self.leave(each)
            gone.append(each)
        return gone

    def has_room(self, adapters: Sequence[Tracked], without: Collection[str]) -> bool:
        """Whether there were pages for all these if nobody used those in `without`, as far as their sizes are known."""
        missing = sum(each.num_pages for each in adapters if each.pages is None)
        others = [each for each in self._order.values() if each not in adapters and not each.pinned]
        idle = [each for each in others if each.users == 0 or each.version in without]
        return missing <= self._pool.num_free + sum(each.num_pages for each in idle)

    def why_never(self, adapters: Sequence[Tracked], pinned: Sequence[Tracked]) -> str | None:
        """Why adapters can never be here together, beside what is pinned, as far as their sizes are known."""
        needed = sum(each.num_pages for each in adapters)
        kept = sum(each.num_pages for each in pinned if each not in adapters)
        kept = min(kept, self._pool.num_pages)  # more may be pinned than there is room for
        if needed <= self._pool.num_pages - kept:
            return None
        beside = ", some of them for pinned adapters" if kept else ""  # how many, and whose, is nothing for a client
        return (
            f"the request's adapters need {needed} pages of adapter memory together and there are "
            f"{self._pool.num_pages}{beside}; raise --adapter-memory, or name or pin fewer"
        )
