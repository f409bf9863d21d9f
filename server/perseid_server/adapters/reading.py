"""What is read from disk to host memory, and in which order: no more than it holds, and a claim's own first."""

from collections.abc import Iterable

from perseid_server.adapters.demand import Demand, Need
from perseid_server.adapters.host_tier import HostTier
from perseid_server.adapters.loader import Loader, Read
from perseid_server.adapters.tracked import Tracked

READ_AHEAD = 2
"""Jobs the loader has before it is handed a read that can wait: a claim's own has few before it."""


class Reading:
    """Hands reads to the loader."""

    def __init__(self, loader: Loader, host: HostTier, demand: Demand) -> None:
        self._loader = loader
        self._host = host
        self._demand = demand

    def start_in_order(self, adapters: Iterable[Tracked | None]) -> None:
        """Those that can be read and are not there, as far as there is room: what comes later takes none from what
        comes first."""
        known = (each for each in adapters if each is not None)
        all(self.start(each) for each in known if each.error is None and not each.on_device)

    def start(self, adapter: Tracked) -> bool:
        """False when that has to wait, for room or for the loader."""
        version = adapter.version
        if adapter.reading or self._host.get(version) is not None:
            return True
        can_wait = self._demand.need(adapter) < Need.CLAIM
        if (can_wait and self._loader.num_jobs >= READ_AHEAD) or not self._host.has_room(version):
            return False
        adapter.reading = True
        adapter.read_again = False
        self._host.comes(version)
        self._loader.hand_over(Read(version, adapter.path))
        return True
