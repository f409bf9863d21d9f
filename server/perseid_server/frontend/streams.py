"""Several asynchronous streams as one."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

Item = TypeVar("Item")

_AHEAD = 16  # items of a stream that wait for the reader; beyond them the stream does


async def merge(streams: Sequence[AsyncGenerator[Item]]) -> AsyncGenerator[Item]:
    """Items of all streams as they come. The first error ends all; so does leaving early."""
    inbox: asyncio.Queue[Item | BaseException | None] = asyncio.Queue(_AHEAD * len(streams))

    async def pump(stream: AsyncGenerator[Item]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    await inbox.put(item)
            await inbox.put(None)
        except Exception as error:  # noqa: BLE001  handed to the reader, which raises it
            await inbox.put(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        for _ in streams:
            while (item := await inbox.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
