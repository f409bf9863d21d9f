"""A question to the engine that may find it hanging: who asks waits for a short time, and the same is asked once."""

import asyncio
import contextlib
from collections.abc import Callable

from perseid_server.engine.messages import DescribeState, ToEngine
from perseid_server.engine.state import EngineState


class StateQuestion:
    """All methods run on one event loop."""

    def __init__(self) -> None:
        self._answers: dict[int, asyncio.Future[EngineState | None]] = {}  # by limit, in the order of asking

    async def ask(self, send: Callable[[ToEngine], None], limit: int, timeout_s: float) -> EngineState | None:
        """The engine's answer; None when it does not come in time, or the engine is gone. Who asks while another does,
        with the same limit, gets the same answer."""
        if limit not in self._answers:
            send(DescribeState(limit))
            self._answers[limit] = asyncio.get_running_loop().create_future()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._answers[limit])
        return None

    def answered(self, state: EngineState | None) -> None:
        """The answer to the first question has come; None when the engine is gone, and answers none."""
        for limit in list(self._answers)[: None if state is None else 1]:
            self._answers.pop(limit).set_result(state)
