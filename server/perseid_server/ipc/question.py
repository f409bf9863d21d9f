"""A question to the engine that may find it hanging: who asks waits for a short time, and only one is under way."""

import asyncio
import contextlib
from collections.abc import Callable

from perseid_server.engine.messages import DescribeState, ToEngine
from perseid_server.engine.state import EngineState


class StateQuestion:
    """All methods run on one event loop."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[EngineState | None] | None = None

    async def ask(self, send: Callable[[ToEngine], None], limit: int, timeout_s: float) -> EngineState | None:
        """The engine's answer; None when it does not come in time, or the engine is gone. Who asks while another does
        gets the same answer."""
        if self._answer is None:
            self._answer = asyncio.get_running_loop().create_future()
            send(DescribeState(limit))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._answer)
        return None

    def answered(self, state: EngineState | None) -> None:
        """The answer has come; None when the engine is gone."""
        if self._answer is not None:
            self._answer.set_result(state)
            self._answer = None
