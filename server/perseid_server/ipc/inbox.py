"""Outputs of one sequence that nobody has taken yet: bounded, so that a client that does not read costs no memory."""

import asyncio

from perseid_server.engine.messages import SequenceOutput
from perseid_server.errors import PerseidError, QueueFull

MAX_UNREAD = 1024
"""Outputs. The transport's buffers lie before them, so a client is as many tokens behind, and those."""


class Inbox:
    """Filled by the engine's connection, emptied by the request. All methods run on one event loop."""

    def __init__(self) -> None:
        self._outputs: asyncio.Queue[SequenceOutput | PerseidError] = asyncio.Queue()
        self._ended = False

    def put(self, output: SequenceOutput) -> bool:
        """Whether there was room. Without, what is unread is dropped, and the request ends with QueueFull."""
        if self._ended:
            return True
        if self._outputs.qsize() < MAX_UNREAD:
            self._outputs.put_nowait(output)
            return True
        while not self._outputs.empty():
            self._outputs.get_nowait()
        self._end(QueueFull(f"the client reads too slowly: {MAX_UNREAD} tokens of its answer waited to be read"))
        return False

    def fail(self, error: PerseidError) -> None:
        """The engine is gone."""
        if not self._ended:
            self._end(error)

    async def get(self) -> SequenceOutput:
        """The next output; the error that ended the sequence."""
        output = await self._outputs.get()
        if isinstance(output, PerseidError):
            raise output
        return output

    def _end(self, error: PerseidError) -> None:
        self._ended = True
        self._outputs.put_nowait(error)
