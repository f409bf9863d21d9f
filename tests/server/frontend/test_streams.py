"""Merging streams: every item comes, an error or an early end closes them all."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from perseid_server.frontend.streams import merge


class Source:
    """Counts up, then fails, ends, or waits for ever; remembers whether it was closed."""

    def __init__(self, name: str, count: int, error: Exception | None = None, *, endless: bool = False) -> None:
        self.name, self.count, self.error, self.endless = name, count, error, endless
        self.closed = False

    async def items(self) -> AsyncGenerator[str]:
        try:
            for number in range(self.count):
                yield f"{self.name}{number}"
                await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
            if self.endless:
                await asyncio.Event().wait()
        finally:
            self.closed = True


async def test_all_items_come_each_stream_in_its_order() -> None:
    sources = [Source("a", 3), Source("b", 1), Source("c", 0)]
    items = [item async for item in merge([source.items() for source in sources])]
    assert sorted(items) == ["a0", "a1", "a2", "b0"]
    assert [item for item in items if item[0] == "a"] == ["a0", "a1", "a2"]


async def test_the_first_error_ends_all() -> None:
    bad, endless = Source("a", 1, ValueError("broken")), Source("b", 1, endless=True)
    with pytest.raises(ValueError, match="broken"):
        async for _ in merge([bad.items(), endless.items()]):
            pass
    assert endless.closed


async def test_leaving_early_ends_all() -> None:
    sources = [Source("a", 1, endless=True), Source("b", 1, endless=True)]
    async with aclosing(merge([source.items() for source in sources])) as merged:
        await anext(merged)
        await anext(merged)
    assert all(source.closed for source in sources)
