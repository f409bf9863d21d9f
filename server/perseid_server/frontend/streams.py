"""Several asynchronous streams as one."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


async def merge(streams: Sequence[AsyncGenerator[Item]]) -> AsyncGenerator[Item]:
    """Items of all streams as they come. The first error ends all; so does leaving early."""
    inbox: asyncio.Queue[Item | BaseException | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Item]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    inbox.put_nowait(item)
            inbox.put_nowait(None)
        except Exception as error:  # noqa: BLE001  handed to the reader, which raises it
            inbox.put_nowait(error)

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
