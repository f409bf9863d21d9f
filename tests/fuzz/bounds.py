"""How much a parse may take."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARSE_BYTES = 64 << 20
"""Beyond what the process has: the files here have some KiB."""


@contextmanager
def bounded_memory(more: int = PARSE_BYTES) -> Iterator[None]:
    """Who asks for so much more address space gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
