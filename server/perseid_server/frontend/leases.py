"""Who uses which version: a version that a request uses stays until the request has ended."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Leases:
    """Counts of users by version."""

    def __init__(self, on_free: Callable[[str], None]) -> None:
        """`on_free` is told when a version's last user has gone."""
        self._users: Counter[str] = Counter()
        self._on_free = on_free

    def __contains__(self, version: str) -> bool:
        return version in self._users

    def versions(self) -> frozenset[str]:
        """Those in use."""
        return frozenset(self._users)

    @contextmanager
    def hold(self, version: str) -> Iterator[None]:
        """Use a version."""
        self._users[version] += 1
        try:
            yield
        finally:
            self._users[version] -= 1
            if not self._users[version]:
                del self._users[version]
                self._on_free(version)
