"""What is known of one version of an adapter while it is registered."""

from dataclasses import dataclass
from pathlib import Path


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
