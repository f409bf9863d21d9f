"""What is known of one version of an adapter while it is registered."""

from dataclasses import dataclass, field
from pathlib import Path

from perseid_server.adapters.backoff import Backoff


@dataclass(slots=True, eq=False)
class Tracked:
    """Mutable; `residency.py` and its tiers keep it true."""

    version: str
    path: Path
    pages: tuple[int, ...] | None = None  # reserved or filled
    num_pages: int = 0  # once it has been read
    on_device: bool = False
    users: int = 0
    pinned: bool = False
    forgotten: bool = False
    reading: bool = False  # the loader brings it to the host
    read_again: bool = False  # registered while it was read: the files may have gone and come back meanwhile
    writing: bool = False  # the loader fills its pages
    wanted: bool = False  # on the device, as soon as it can be
    error: str | None = None  # that lies in its files
    trouble: str | None = None  # why the last load failed, where that may pass
    backoff: Backoff = field(default_factory=Backoff)

    def load_failed(self, error: str, now: float, *, is_final: bool) -> None:
        """Unless that is final, a pinned version is wanted still, after a while."""
        self.error, self.trouble = (error, None) if is_final else (None, error)
        self.wanted = self.pinned and not is_final
        self.backoff.failed(now)

    def forget_failures(self) -> None:
        """It is there, or comes from the start."""
        self.error = self.trouble = None
        self.backoff.reset()
