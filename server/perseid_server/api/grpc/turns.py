"""Places that many want, given to each of them in turn."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Turns:
    """At most `limit` are inside at once. Those who wait stand in lines, and each line lets one in before the first has
    its turn again: a crowd in one keeps nobody waiting in another. All methods run on one event loop."""

    def __init__(self, limit: int) -> None:
        self.num_free = limit
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of their turns

    @property
    def num_waiting(self) -> int:
        """In all lines."""
        return sum(not place.done() for line in self._lines.values() for place in line)

    @contextlib.asynccontextmanager
    async def turn(self, line: str) -> AsyncIterator[None]:
        """Inside, as soon as there is a place."""
        await self._enter(line)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, line: str) -> None:
        if self.num_free:
            self.num_free -= 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(line, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():  # it had just been let in
                self._leave()
            raise

    def _leave(self) -> None:
        while self._lines:
            line = next(iter(self._lines))
            places = self._lines.pop(line)
            place = places.popleft()
            if places:
                self._lines[line] = places
            if not place.done():  # else its owner has left
                place.set_result(None)
                return
        self.num_free += 1
