"""The engine process as the API process sees it, over an engine in this process that tests can hold, step and kill."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import (
    AdapterState,
    EngineReady,
    RegisterGateSet,
    RegisterHeads,
    SequenceOutput,
    StepOutputs,
    Submit,
)
from perseid_server.engine.state import EngineState
from perseid_server.errors import Unavailable
from tests.fake_drafting import joined
from tests.fakes import fake_engine, fake_ready


class FakeEngineProcess:
    """`ipc.engine_client.EngineProcess` over an engine in this process. Whoever waits for an output steps it."""

    def __init__(self, engine: Engine | None = None, **ready: object) -> None:
        self.engine = engine or fake_engine()
        self.ready: EngineReady | None = fake_ready(**ready)
        self._status = "ready"
        self.trouble = ""
        self.num_restarts = 0
        self.hangs = False  # does not answer when it is asked what it has at hand
        self.on_status: Callable[[], None] = lambda: None
        self.adapter_states: dict[str, AdapterState] = {}
        self.gate_sets: dict[str, RegisterGateSet] = {}
        self.heads: dict[str, RegisterHeads] = {}
        self.aborted: list[str] = []
        self.submitted: list[Submit] = []
        self.sizes: tuple[int, ...] = (1,)  # so many outputs of a sequence come as one, over and over
        self.on_step: Callable[[StepOutputs], None] = lambda _: None
        self._inboxes: dict[str, asyncio.Queue[SequenceOutput | None]] = {}
        self._steps_left: int | None = None
        self._may_step = asyncio.Event()
        self._may_step.set()
        self._abort_seen = asyncio.Event()
        self._submit_seen = asyncio.Event()

    @property
    def status(self) -> str:
        return self._status

    @status.setter
    def status(self, status: str) -> None:
        self._status = status
        self.on_status()

    @property
    def pid(self) -> int | None:
        return None

    def step_age_s(self) -> float | None:
        return None

    async def describe(self, limit: int, timeout_s: float) -> EngineState | None:
        return self.engine.describe(limit) if self.status == "ready" and not self.hangs else None

    def hold(self) -> None:
        """Take requests, answer none: until `go_on`, all are in flight."""
        self._may_step.clear()

    def hold_after(self, num_steps: int) -> None:
        """Go on for so many steps, then hold."""
        self._steps_left = num_steps
        self.go_on()

    def go_on(self) -> None:
        """Answer again."""
        self._may_step.set()

    def die(self) -> None:
        """As a kill -9 of the engine process: those in flight are told, new ones are refused."""
        self.status, self.trouble = "restarting", "was ended by SIGKILL"
        for inbox in self._inboxes.values():
            inbox.put_nowait(None)
        self._may_step.set()

    async def submissions(self, count: int) -> None:
        """Return when that many sequences have been submitted."""
        while len(self.submitted) < count:
            self._submit_seen.clear()
            await self._submit_seen.wait()

    async def aborts(self, count: int) -> None:
        """Return when that many sequences have been aborted."""
        while len(self.aborted) < count:
            self._abort_seen.clear()
            await self._abort_seen.wait()

    async def submit(self, request: Submit) -> AsyncIterator[SequenceOutput]:
        sizes, held = itertools.cycle(self.sizes), []
        size = next(sizes)
        async with contextlib.aclosing(self._outputs(request)) as outputs:
            async for output in outputs:
                held.append(output)
                if len(held) == size or output.finish_reason is not None:
                    yield joined(held)
                    size, held = next(sizes), []

    async def _outputs(self, request: Submit) -> AsyncGenerator[SequenceOutput]:
        if self.status != "ready":
            raise Unavailable(f"the engine is {self.status}; try again")
        self.submitted.append(request)
        self._submit_seen.set()
        self.engine.submit(request)
        inbox = self._inboxes.setdefault(request.request_id, asyncio.Queue())
        ended = False
        try:
            while not ended:
                while inbox.empty():
                    # Else the loader's thread gets the interpreter for one small step in 5 ms, while this one spins.
                    await asyncio.sleep(0.001 if self.engine.is_loading else 0)
                    await self._may_step.wait()
                    if inbox.empty():
                        self._step()
                output = inbox.get_nowait()
                if output is None:
                    ended = True
                    raise Unavailable("the engine stopped while it worked on this request; try again")
                ended = output.finish_reason is not None
                yield output
        finally:
            self._inboxes.pop(request.request_id, None)
            if not ended:
                self.aborted.append(request.request_id)
                self._abort_seen.set()
                self.engine.abort(request.request_id)

    def _step(self) -> None:
        step = self.engine.step()
        if self._steps_left is not None:
            self._steps_left -= 1
            if self._steps_left == 0:
                self._steps_left = None
                self.hold()
        for output in step.outputs:
            if output.request_id in self._inboxes:
                self._inboxes[output.request_id].put_nowait(output)
        self.on_step(step)

    def register_adapter(self, version: str, path: str, *, pinned: bool = False) -> None:
        self.engine.register_adapter(version, path, pinned=pinned)

    def pin_adapter(self, version: str, *, pinned: bool) -> None:
        self.engine.pin_adapter(version, pinned=pinned)

    def forget_adapter(self, version: str) -> None:
        self.engine.forget_adapter(version)

    def register_gate_set(
        self, version: str, path: str | None, adapters: tuple[str, ...], *, null: bool, pinned: bool = False
    ) -> None:
        self.gate_sets[version] = RegisterGateSet(version, path, adapters, null, pinned)
        self.engine.register_gate_set(version, path, adapters, null=null, pinned=pinned)

    def forget_gate_set(self, version: str) -> None:
        del self.gate_sets[version]
        self.engine.forget_gate_set(version)

    def register_heads(self, version: str, path: str) -> None:
        self.heads[version] = RegisterHeads(version, path)

    def forget_heads(self, version: str) -> None:
        del self.heads[version]
