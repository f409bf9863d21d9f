"""The engine's process: `python -m perseid_server.ipc.engine_process FD PULSE STACKS`, started by the API process.

FD is one end of a Unix socket. The first message in is the configuration, the first out EngineReady or EngineFailed;
then the loop: take in what has come, step while there is work, send what each step brought. It ends when told to, or
when the other end of the socket closes. PULSE and STACKS are what `pulse.py` says: the loop beats in the one, and
Python's stacks go into the other at a crash, or when the parent asks for them.
"""

import ctypes
import faulthandler
import importlib
import logging
import select
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial

import msgspec

from perseid_server.engine.config import EngineConfig
from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import (
    Abort,
    DescribeState,
    EngineFailed,
    EngineReady,
    EngineStats,
    ForgetAdapter,
    ForgetGateSet,
    ForgetHeads,
    FromEngine,
    PinAdapter,
    Ping,
    RegisterAdapter,
    RegisterGateSet,
    RegisterHeads,
    Shutdown,
    StepOutputs,
    Submit,
    ToEngine,
)
from perseid_server.engine.ports import ScheduledStep
from perseid_server.errors import PerseidError
from perseid_server.ipc.codec import from_engine, split_frames, to_engine
from perseid_server.ipc.pulse import Compiling, Phase, Pulse
from perseid_server.logs import configure_logging

logger = logging.getLogger("perseid_server.ipc.engine_process")  # started with -m, __name__ would be __main__

Build = Callable[[EngineConfig], tuple[Engine, EngineReady]]

_RECEIVE_BYTES = 1 << 20
_WAIT_FOR_LOAD_S = 0.001  # while everything that waits, waits for an adapter
_SWITCH_INTERVAL_S = 0.0005  # how long the loader thread may keep the step loop from the interpreter lock
_PR_SET_PDEATHSIG = 1
STACKS_SIGNAL = signal.SIGUSR1
"""Asks for the stacks of all threads, also where one hangs outside of Python."""


class EngineSocket:
    """The child's end: receives without blocking, sends without ever dropping."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.setblocking(False)
        self._poll = select.poll()  # select() takes no descriptor above 1023, and the parent may have that many open
        self._received = bytearray()
        self._unsent = bytearray()
        self.closed = False

    def receive(self, timeout_s: float | None) -> list[bytes]:
        """Frames that have come; waits up to `timeout_s` (None: for ever) for something to come."""
        self._poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        for _, found in self._poll.poll(None if timeout_s is None else 1000 * timeout_s):
            if found & select.POLLOUT:
                self._flush()
            if found & ~select.POLLOUT:  # also what ends a connection: reading tells
                self._read()
        return list(split_frames(self._received))

    def other_end_is_gone(self) -> bool:
        """Whether nobody will read what is sent, though there may be something to receive."""
        hang_up = select.poll()
        hang_up.register(self._socket, 0)  # told unasked
        return any(found & select.POLLHUP for _, found in hang_up.poll(0))

    def send(self, message: FromEngine) -> None:
        """Send as much as the other end takes now, the rest later."""
        self._unsent += from_engine.encode(message)
        self._flush()

    def _read(self) -> None:
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self.closed = True
        self._received += data

    def _flush(self) -> None:
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except ConnectionError:
            self.closed = True


def serve(engine: Engine, link: EngineSocket, pulse: Pulse) -> None:
    """Step while there is work; return on Shutdown or when the other end is gone."""
    timeout_s: float | None = None
    told = EngineStats()
    engine.before_run = partial(_note, pulse)
    while not link.closed:
        pulse.beat(Phase.WAITING)
        frames = link.receive(timeout_s)
        pulse.beat(Phase.STEPPING)
        for frame in frames:
            message = to_engine.decode(frame)
            if isinstance(message, Shutdown):
                return
            if isinstance(message, DescribeState):
                link.send(engine.describe(message.limit))
            elif not isinstance(message, Ping):  # with that, all is done: the loop goes round
                _take(engine, message)
        outputs = engine.step()
        if _tells_something(outputs) or outputs.stats != told:  # an abort changes only the stats
            link.send(outputs)
            told = outputs.stats
        timeout_s = _patience(engine, outputs)


def _note(pulse: Pulse, step: ScheduledStep) -> None:
    pulse.runs(step.num_rows, [chunk.sequence.id for chunk in step.chunks])


def _tells_something(step: StepOutputs) -> bool:
    return bool(step.outputs or step.adapters or step.iteration_tokens)


def _patience(engine: Engine, outputs: StepOutputs) -> float | None:
    """How long to wait for messages before the next step."""
    if engine.has_work and outputs.iteration_tokens:
        return 0.0
    return _WAIT_FOR_LOAD_S if engine.has_work or engine.is_loading else engine.retry_in_s


def _take(engine: Engine, message: ToEngine) -> None:
    match message:
        case Submit():
            engine.submit(message)
        case Abort():
            engine.abort(message.request_id)
        case RegisterAdapter():
            engine.register_adapter(message.version, message.path, pinned=message.pinned)
        case PinAdapter():
            engine.pin_adapter(message.version, pinned=message.pinned)
        case ForgetAdapter():
            engine.forget_adapter(message.version)
        case RegisterGateSet():
            engine.register_gate_set(
                message.version, message.path, message.adapters, null=message.null, pinned=message.pinned
            )
        case ForgetGateSet():
            engine.forget_gate_set(message.version)
        case RegisterHeads():
            engine.register_heads(message.version, message.path)
        case ForgetHeads():
            engine.forget_heads(message.version)


def build_real_engine(config: EngineConfig) -> tuple[Engine, EngineReady]:
    """The engine that serves. Imported here, so that a test's engine needs no torch."""
    build = importlib.import_module("perseid_server.engine.build")
    built = build.build_engine(config)
    return built.engine, built.ready


def run(sock: socket.socket, pulse: Pulse, build: Build) -> None:
    """Read the configuration, build, say so, serve."""
    link = EngineSocket(sock)
    if link.other_end_is_gone():  # the parent ended before this process could ask to end with it
        return
    frames: list[bytes] = []
    while not frames:
        frames = link.receive(None)
        if link.closed:
            return
    try:
        engine, ready = build(msgspec.msgpack.decode(frames[0], type=EngineConfig))
    except PerseidError as error:
        link.send(EngineFailed(error.message))
    except Exception as error:  # the operator must learn why, whatever it is
        logger.exception("the engine could not start")
        link.send(EngineFailed(f"{type(error).__name__}: {error}"))
    else:
        _mark_compilations(pulse)
        link.send(ready)
        serve(engine, link, pulse)


def _mark_compilations(pulse: Pulse) -> None:
    """A kernel of a kind that the warm-up did not meet is compiled in the middle of a step. Only where the engine has
    brought Triton in: the CPU's kernels are there before it starts."""
    if "triton" in sys.modules:
        compilation = importlib.import_module("perseid_kernels.compilation")
        compiling = Compiling(pulse)
        compilation.watch_compilation(compiling.began, compiling.ended)


def _prepare_process(stacks: int) -> None:
    """Leave stopping to the parent, which may get the same signal, die with it, leave it the stacks of a crash, and let
    the step loop get the interpreter back quickly."""
    faulthandler.enable(stacks)
    faulthandler.register(STACKS_SIGNAL, stacks)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """FD PULSE STACKS LOG_LEVEL LOG_FORMAT [module:function]: the function builds the engine; tests bring their own."""
    descriptor, pulse, stacks = (int(argument) for argument in sys.argv[1:4])
    _prepare_process(stacks)
    configure_logging(sys.argv[4], "json" if sys.argv[5] == "json" else "human")
    build = build_real_engine
    if len(sys.argv) > 6:
        module, _, function = sys.argv[6].partition(":")
        build = getattr(importlib.import_module(module), function)
    run(socket.socket(fileno=descriptor), Pulse(pulse), build)


if __name__ == "__main__":
    main()
