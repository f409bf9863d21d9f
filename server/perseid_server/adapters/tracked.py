"""What is known of one version of an adapter while it is registered."""

import math
from dataclasses import dataclass
from pathlib import Path

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
"""How long a pinned version waits after a load that failed for a moment; twice as long each time."""


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
    retry_s: float = FIRST_RETRY_S  # after the next failure
    retry_at: float = -math.inf

    def load_failed(self, error: str, now: float, *, is_final: bool) -> None:
        """Unless that is final, a pinned version is wanted still, after a while."""
        self.error, self.trouble = (error, None) if is_final else (None, error)
        self.wanted = self.pinned and not is_final
        self.retry_at = now + self.retry_s
        self.retry_s = min(2 * self.retry_s, LAST_RETRY_S)

    def forget_failures(self) -> None:
        """It is there, or comes from the start."""
        self.error = self.trouble = None
        self.retry_s, self.retry_at = FIRST_RETRY_S, -math.inf
