"""An idle engine wakes for loads that failed for a moment or had no room, though no message comes."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from perseid_kernels.routing import GateTable
from perseid_server.adapters.backoff import FIRST_RETRY_S
from perseid_server.adapters.gate_residency import GateResidency
from perseid_server.adapters.residency import Residency
from perseid_server.adapters.residents import Residents
from perseid_server.engine.engine import Engine
from perseid_server.engine.heads import HeadRunner
from perseid_server.engine.messages import Abort
from perseid_server.ipc.codec import HEADER_BYTES, to_engine
from perseid_server.ipc.engine_process import EngineSocket, serve
from perseid_server.ipc.pulse import Pulse
from perseid_server.speculation.heads_residency import HeadsResidency
from tests.fakes import fake_engine
from tests.server.adapters.slow_loads import SlowLoader, slow_residency
from tests.server.engine.test_fairness import job


@dataclass
class Idle:
    """A link on which nothing comes, but `frames` in the first rounds. Waiting takes no time but that of `now`; who
    waits without end has nothing to do, and the link closes."""

    now: float = 0.0
    frames: list[list[bytes]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    closed: bool = False

    def receive(self, timeout_s: float | None) -> list[bytes]:
        if len(self.waits) > 200:
            raise AssertionError(f"it wakes without end: {self.waits}")
        if self.frames:
            return self.frames.pop(0)
        if timeout_s is None:
            self.closed = True
        else:
            self.waits.append(timeout_s)
            self.now += timeout_s
        return []

    def send(self, message: object) -> None: ...

    def serve(self, engine: Engine) -> None:
        self.frames.insert(0, [])  # the first round waits for a message
        pulse = SimpleNamespace(beat=lambda phase: None, runs=lambda *step: None)
        serve(engine, cast("EngineSocket", self), cast("Pulse", pulse))


class Inline:
    """An executor that has done its work when it is asked."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except OSError as error:  # what the executor would do
            future.set_exception(error)
        return future


def fails_at_first(failures: int, result: Any) -> Callable[..., Any]:
    errors = [OSError("the disk is gone") for _ in range(failures)]

    def load(*_: object) -> Any:
        if errors:
            raise errors.pop()
        return result

    return load


@pytest.fixture
def link() -> Idle:
    return Idle()


Loads = tuple[Residency, SlowLoader]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, link: Idle) -> Loads:
    return slow_residency(monkeypatch, device=1, host=1, clock=lambda: link.now)


def test_an_idle_engine_tries_a_pin_again_when_its_time_has_come(link: Idle, loads: Loads) -> None:
    residency, loader = loads
    loader.failures = 2
    engine = fake_engine(residency=residency)
    engine.register_adapter("pinned", "", pinned=True)
    link.serve(engine)
    assert residency.location("pinned") == "device"
    assert [wait for wait in link.waits if wait > 0.5] == [FIRST_RETRY_S, 2 * FIRST_RETRY_S]


def test_a_pin_gets_the_room_that_the_last_request_gives_up(link: Idle, loads: Loads) -> None:
    residency, _ = loads
    engine = fake_engine(residency=residency)
    for name in ("used", "pinned"):
        engine.register_adapter(name, "")
    engine.submit(job("r", adapter="used", num_tokens=5))
    while not engine.step().iteration_tokens:
        pass
    engine.pin_adapter("pinned", pinned=True)
    link.serve(engine)
    assert not engine.has_work
    assert residency.location("pinned") == "device"


def test_a_pin_gets_the_host_memory_that_an_aborted_claim_gives_up(link: Idle, loads: Loads) -> None:
    residency, _ = loads
    engine = fake_engine(residency=residency)
    for name in ("used", "cold", "pinned"):
        engine.register_adapter(name, "")
    for name in ("used", "cold"):
        engine.submit(job(name, adapter=name, num_tokens=100))
        for _ in range(5):
            engine.step()
    assert [residency.location(name) for name in ("used", "cold")] == ["device", "host"]
    engine.pin_adapter("pinned", pinned=True)
    link.frames.append([to_engine.encode(Abort(name))[HEADER_BYTES:] for name in ("cold", "used")])
    link.serve(engine)
    assert residency.location("pinned") == "device"


def test_a_pin_for_which_there_is_no_room_wakes_nobody(link: Idle, loads: Loads) -> None:
    residency, loader = loads
    engine = fake_engine(residency=residency)
    for name in ("first", "second"):
        engine.register_adapter(name, "", pinned=True)
    link.serve(engine)
    assert [residency.location(name) for name in ("first", "second")] == ["device", "host"]
    assert loader.reads == ["first", "second"]


def test_an_idle_engine_tries_a_pinned_gate_set_again(link: Idle, loads: Loads) -> None:
    gates = GateResidency(fails_at_first(1, cast("GateTable", SimpleNamespace(nbytes=1))), clock=lambda: link.now)
    gates._loader.shutdown()
    gates._loader = cast("Any", Inline())
    engine = fake_engine(residency=cast("Any", Residents(loads[0], gates)))
    engine.register_gate_set("gates", None, (), null=True, pinned=True)
    link.serve(engine)
    assert gates.location("gates") == "device"
    assert [wait for wait in link.waits if wait > 0.5] == [FIRST_RETRY_S]


def test_an_idle_engine_tries_heads_again(link: Idle) -> None:
    heads: HeadsResidency[Any] = HeadsResidency(
        fails_at_first(1, "heads"), clock=lambda: link.now, _loader=cast("Any", Inline())
    )
    engine = fake_engine(heads=cast("Any", HeadRunner(heads, cast("Any", None), cast("Any", None))))
    engine.register_heads("heads", "")
    link.serve(engine)
    assert heads.location("heads") == "device"
    assert [wait for wait in link.waits if wait > 0.5] == [FIRST_RETRY_S]
