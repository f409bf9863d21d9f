"""The API process's side of the engine: starts it, talks to it, and starts it again when it dies. No torch.

    starting → ready → restarting → ready → … → stopped
                   ↘ failed (it could not start, and will not)

What the engine must know beside requests (`registrations.py`) is told again to a new engine. Requests are not: when
the engine dies, those in flight end with Unavailable at once. It is taken for dead when its process is, when it sends
what is no message, and when its loop stands still for longer than a step may take (`watchdog.py`).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from perseid_server.engine.config import EngineConfig
from perseid_server.engine.messages import (
    Abort,
    EngineFailed,
    EngineReady,
    SequenceOutput,
    StepOutputs,
    Submit,
    ToEngine,
)
from perseid_server.engine.state import EngineState
from perseid_server.errors import InvalidRequest, Unavailable
from perseid_server.ipc.aftermath import Aftermath, log_stacks
from perseid_server.ipc.connection import Connection, connect
from perseid_server.ipc.endings import Ending, EngineGone, StartFailed
from perseid_server.ipc.inbox import Inbox
from perseid_server.ipc.pulse import Phase
from perseid_server.ipc.question import StateQuestion
from perseid_server.ipc.registrations import Registrations
from perseid_server.ipc.watchdog import Limits
from perseid_server.ipc.watching import watched

logger = logging.getLogger(__name__)

EngineStatus = Literal["starting", "ready", "restarting", "failed", "stopped"]

FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 10.0
STABLE_AFTER_S = 60.0  # an engine that has run so long starts the backoff anew


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A request that the engine works on, and where its outputs go."""

    request: Submit
    inbox: Inbox = field(default_factory=Inbox)


@dataclass(slots=True)
class _Watch:
    """Callbacks for the metrics and the registry."""

    on_step: list[Callable[[StepOutputs], None]] = field(default_factory=list)
    on_status: list[Callable[[EngineStatus], None]] = field(default_factory=list)


class EngineProcess(Registrations):
    """Supervises one engine process. All methods run on one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        step_timeout_s: float | None = None,
        entry: str | None = None,
        log_level: str = "warning",
        log_format: Literal["human", "json"] = "human",
    ) -> None:
        """`step_timeout_s`: how long a step may take before the engine is taken for stuck; None: for ever.
        `entry` names another function that builds the engine, as module:function (tests)."""
        super().__init__()
        self._config = config
        self._arguments = [log_level, log_format] if entry is None else [log_level, log_format, entry]
        self._connection: Connection | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._in_flight: dict[str, _InFlight] = {}
        self._limits = Limits(step_timeout_s or None)
        self._aftermath = Aftermath()
        self._start_s = 0.0  # what the last start took
        self._again_at = 0.0  # when the next one begins, monotonic
        self._watch = _Watch()
        self._question = StateQuestion()
        self.status: EngineStatus = "starting"
        self.ready: EngineReady | None = None
        self.num_restarts = 0

    @property
    def trouble(self) -> str:
        """How the last engine process ended, while there is no other: `was ended by SIGSEGV`."""
        return self._aftermath.trouble

    @property
    def pid(self) -> int | None:
        """The engine's process, while there is one that has been ready."""
        return self._connection.process.pid if self._connection is not None else None

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> EngineReady:
        """Start the engine and wait until it can serve. InvalidRequest tells the operator why it cannot."""
        try:
            connection = await self._launch()
        except StartFailed as error:
            self._set_status("failed")
            log_stacks(error.stacks)
            raise Unavailable(f"the engine process {error.ending.text} while it started") from error
        except BaseException:
            self._set_status("failed")
            raise
        self._supervisor = asyncio.create_task(self._supervise(connection))
        assert self.ready is not None, "_launch() returns when it is"
        return self.ready

    async def stop(self) -> None:
        """End the engine; requests in flight end with Unavailable."""
        self._set_status("stopped")
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._fail_requests("the server is shutting down")
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    def on_step(self, callback: Callable[[StepOutputs], None]) -> None:
        """Be told of every step."""
        self._watch.on_step.append(callback)

    def on_status(self, callback: Callable[[EngineStatus], None]) -> None:
        """Be told when the status changes."""
        self._watch.on_status.append(callback)

    def on_ending(self, callback: Callable[[Ending], None]) -> None:
        """Be told how each engine process ended that another is started for."""
        self._aftermath.on_ending(callback)

    def step_age_s(self) -> float | None:
        """How long the step that runs now runs already; None between steps, and while there is no engine."""
        if self._connection is None:
            return None
        beat = self._connection.vitals.pulse.read()
        return max(0.0, self._now() - beat.since) if beat.phase in (Phase.STEPPING, Phase.COMPILING) else None

    async def describe(self, limit: int, timeout_s: float) -> EngineState | None:
        """What the engine has at hand, told between two steps; None when it does not answer in time, or there is none
        that could."""
        connection = self._connection
        if self.status != "ready" or connection is None:
            return None
        return await self._question.ask(connection.send, limit, timeout_s)

    # --- requests -----------------------------------------------------------------------------------------------

    async def submit(self, request: Submit) -> AsyncIterator[SequenceOutput]:
        """The outputs of one sequence, to the end. Leaving the iterator early aborts the sequence.

        Unavailable when the engine is not ready, or dies meanwhile, or has died of this request again and again.
        """
        connection = self._connection
        if self.status != "ready" or connection is None:
            raise self._unavailable(f"the engine is {self.status}; try again")
        self._aftermath.suspects.check(request, self._now())
        flight = self._in_flight[request.request_id] = _InFlight(request)
        ended = has_output = False
        try:
            connection.send(request)
            while not ended:
                output = await flight.inbox.get()
                ended = output.finish_reason is not None
                has_output = True
                if output.finish_reason in ("stop", "length"):
                    self._aftermath.suspects.answered(request)
                yield output
        finally:
            self._in_flight.pop(request.request_id, None)
            if not ended and self._connection is connection:
                connection.send(Abort(request.request_id))
                if has_output:
                    self._aftermath.suspects.left(request)

    def _tell(self, message: ToEngine) -> None:
        """Now, or when an engine is there again: registrations are replayed to a new one."""
        if self._connection is not None and self.status == "ready":
            self._connection.send(message)

    # --- supervision --------------------------------------------------------------------------------------------

    async def _launch(self) -> Connection:
        """A new engine process that has said it is ready and knows all that is registered."""
        began = self._now()
        connection = await connect(self._config, self._arguments)
        try:
            ready = await watched(connection, self._limits, _first_message(connection))
            for message in self.registrations():
                connection.send(message)
        except EngineGone as gone:
            ending = await connection.bury(gone)
            stacks = connection.vitals.stacks()
            await connection.close()
            raise StartFailed(ending, stacks) from gone
        except BaseException:
            await connection.close(ask=False)
            raise
        self._connection = connection
        self.num_restarts += self.ready is not None
        self.ready = ready
        self._start_s = self._now() - began
        self._aftermath.trouble = ""
        self._set_status("ready")
        return connection

    async def _supervise(self, connection: Connection) -> None:
        """Deliver what the engine sends; when it serves no more, start another, more and more patiently."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            started = self._now()
            gone = await self._serve(connection)
            if self._now() - started > STABLE_AFTER_S:
                backoff_s = FIRST_BACKOFF_S
            self._again_at = self._now() + backoff_s  # before anybody is told
            suspects = self._suspects(connection)
            self._connection = None
            self._aftermath.trouble = str(gone)
            self._set_status("restarting")
            self._fail_requests("the engine stopped while it worked on this request; try again")
            self.adapter_states.clear()
            try:
                ending = await connection.bury(gone)
                self._aftermath.ended(ending, connection.vitals.stacks(), suspects, self._now())
            finally:
                await connection.close()
            while True:
                self._again_at = self._now() + backoff_s
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
                try:
                    connection = await self._launch()
                except Exception as error:  # noqa: BLE001  whatever it is, the next try may do better
                    self._aftermath.could_not_start(error)
                else:
                    break

    async def _serve(self, connection: Connection) -> EngineGone:
        """Deliver until the engine serves no more; says why."""
        try:
            await watched(connection, self._limits, self._deliver(connection))
        except EngineGone as gone:
            return gone
        except Exception as error:  # a bug of ours: a new engine is better than none
            logger.exception("the engine's messages could not be taken")
            return EngineGone(f"could not be understood: {type(error).__name__}", "protocol")

    async def _deliver(self, connection: Connection) -> NoReturn:
        while True:
            message = await connection.receive()
            if isinstance(message, EngineState):
                self._question.answered(message)
                continue
            if not isinstance(message, StepOutputs):
                raise EngineGone(f"sent {type(message).__name__} while it served", "protocol")
            self._take_states(message)
            for output in message.outputs:
                flight = self._in_flight.get(output.request_id)
                if flight is not None and not flight.inbox.put(output):
                    connection.send(Abort(output.request_id))
            for callback in self._watch.on_step:
                try:
                    callback(message)
                except Exception:  # who watches must not end what is watched
                    logger.exception("a step could not be told")
            await asyncio.sleep(0)  # whoever reads, reads before the next step is told

    # --- endings ------------------------------------------------------------------------------------------------

    def _suspects(self, connection: Connection) -> list[Submit]:
        """Requests that ran when the engine went, before they are told."""
        running = connection.vitals.pulse.running_now()
        flights = self._in_flight.values()
        return [one.request for one in flights if running.may_be_one_of(one.request.request_id)]

    def _fail_requests(self, why: str) -> None:
        self._question.answered(None)
        for flight in self._in_flight.values():
            flight.inbox.fail(self._unavailable(why))

    def _set_status(self, status: EngineStatus) -> None:
        self.status = status
        for callback in self._watch.on_status:
            callback(status)

    def _unavailable(self, message: str) -> Unavailable:
        """Says when an engine may be there again: as long as the last one took to start, after the next try begins."""
        return Unavailable(message, retry_after_s=max(1.0, self._again_at - self._now() + self._start_s))

    @staticmethod
    def _now() -> float:
        return time.monotonic()


async def _first_message(connection: Connection) -> EngineReady:
    first = await connection.receive()
    if isinstance(first, EngineFailed):
        raise InvalidRequest(first.error)
    if not isinstance(first, EngineReady):
        raise EngineGone(f"began with {type(first).__name__}", "protocol")
    return first
