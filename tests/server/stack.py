"""The whole API process over the fake engine: registry, service, metrics, and both transports on free ports."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import openai
from fastapi import FastAPI
from safetensors.numpy import save_file

from perseid_router.gate_set import Column, GateSet, GateSetConfig
from perseid_router.gate_set import Gate as LinearGate
from perseid_router.request_router import RequestRouter, count_buckets
from perseid_server.access.gate import Gate
from perseid_server.adapters.source import SourcePolicy
from perseid_server.adapters.store import AdapterStore
from perseid_server.api.body_budget import BodyBudget
from perseid_server.api.grpc.health import HealthServicer
from perseid_server.api.grpc.patience import Patience
from perseid_server.api.grpc.server import GrpcServer
from perseid_server.api.http.app import build_app
from perseid_server.api.http.debug import DebugSources
from perseid_server.api.server import Addresses, ApiServer
from perseid_server.api.status import ServerStatus
from perseid_server.api.tls import Tls
from perseid_server.engine.engine import Engine
from perseid_server.frontend.adaptation import Resolver
from perseid_server.frontend.admission import Admission, AdmissionLimits
from perseid_server.frontend.deadline import Timeouts
from perseid_server.frontend.metrics import Metrics
from perseid_server.frontend.registry import AdapterRegistry
from perseid_server.frontend.service import GenerationService
from perseid_server.frontend.speculation import Drafting
from perseid_server.frontend.text import TextProcessor
from perseid_server.model.spec import BaseSpec
from perseid_server.observe.calls import Calls
from tests.fake_process import FakeEngineProcess
from tests.fakes import FakeRunner, byte_bundle, fake_engine, tiny_spec

BASE = "tiny"


@dataclass
class Stack:
    """Everything of one server, made by `make_stack`."""

    engine: FakeEngineProcess
    store: AdapterStore
    registry: AdapterRegistry
    metrics: Metrics
    service: GenerationService
    status: ServerStatus
    app: FastAPI
    root: Path  # adapters below it may be loaded by clients
    gate: Gate | None = None
    budget: BodyBudget = field(default_factory=BodyBudget)
    calls: Calls = field(default_factory=Calls)

    def says(self, text: str) -> None:
        """Every answer is this text from now on."""
        self.runner.says = text

    @property
    def runner(self) -> FakeRunner:
        """The fake model."""
        return self.engine.engine._runner

    def routes(self) -> list[tuple[str, str]]:
        """(method, path) of every route."""
        told = self.app.openapi()["paths"].items()
        return [("GET", "/openapi.json"), *((method.upper(), path) for path, methods in told for method in methods)]

    async def load_gates(self, name: str, *adapters: str, replace: bool = False, **options) -> str:
        """Write a gate set for loaded adapters and load it; returns its version."""
        versions = {adapter: self.registry.get(adapter).version for adapter in adapters}
        folder = write_gate_set(self.root / f"{name}-gates", versions, **options)
        return (await self.registry.load(name, str(folder), replace=replace)).version

    async def load(self, name: str, *, seed: int = 0, replace: bool = False) -> str:
        """Write an adapter and load it; returns its version."""
        folder = write_adapter(self.root / f"{name}-{seed}", seed=seed)
        return (await self.registry.load(name, str(folder), replace=replace)).version


def make_stack(
    folder: Path,
    *,
    max_queue: int = 100,
    max_queue_tokens: int = 1 << 20,
    timeouts: Timeouts | None = None,
    bundle=None,
    max_model_len: int = 256,
    num_pages: int | None = None,
    default_gate_set: str | None = None,
    drafting: Drafting | None = None,
    gate: Gate | None = None,
    engine: Engine | None = None,
    process: FakeEngineProcess | None = None,
    budget: BodyBudget | None = None,
    calls: Calls | None = None,
) -> Stack:
    """A server that is not listening, over the fake engine unless another, or its process, is given."""
    calls = calls or Calls()
    if process is None:
        built = engine or fake_engine(num_blocks=512, max_model_len=max_model_len, runner=FakeRunner(512))
        process = FakeEngineProcess(built, max_model_len=max_model_len)
    root = folder / "adapters"
    root.mkdir(parents=True, exist_ok=True)
    store = AdapterStore(folder / "store")
    registry = AdapterRegistry(store, process, tiny_spec(), SourcePolicy((root,)), num_pages)
    metrics = Metrics(8)
    process.on_step = lambda step: metrics.engine_stepped(step, registry.names())
    registry.on_load(metrics.adapter_load_ended)
    registry.draining.on_refusal(lambda: metrics.rejected("draining"))
    metrics.watch_adapters(registry.locations, registry.all_names)
    metrics.watch_processes(lambda: None)
    text = TextProcessor(bundle or byte_bundle(), tiny_spec().vocab_size)
    resolver = Resolver(registry, process, default_gate_set)
    admission = Admission(AdmissionLimits(max_queue, max_queue_tokens), metrics)
    service = GenerationService(
        process, resolver, text, metrics, admission, drafting, gate.limiter if gate else None, timeouts
    )
    status = ServerStatus(service, lambda: process.status, lambda: process.trouble)
    process.on_status = status.changed
    budget = budget or BodyBudget(on_refusal=metrics.rejected)
    debug = DebugSources(process, registry, service, admission, status, calls)
    app = build_app(service, registry, metrics, debug, base=BASE, root="fake", gate=gate, budget=budget)
    return Stack(process, store, registry, metrics, service, status, app, root, gate, budget, calls)


@dataclass
class LiveStack:
    """A stack that listens."""

    stack: Stack
    addresses: Addresses
    patience: Patience
    health: HealthServicer
    api: ApiServer
    stop: Callable[[], object] = lambda: None

    @property
    def url(self) -> str:
        """Where HTTP listens."""
        return f"http://{self.addresses.host}:{self.addresses.http_port}"

    @property
    def grpc(self) -> str:
        """Where gRPC listens."""
        return f"{self.addresses.host}:{self.addresses.grpc_port}"

    def openai(self) -> openai.AsyncOpenAI:
        """The official client, which must not try again: errors are what is tested."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=20)

    def http(self) -> httpx.AsyncClient:
        """A plain client."""
        return httpx.AsyncClient(base_url=self.url, timeout=20)


@asynccontextmanager
async def serving(
    stack: Stack, tls: Tls | None = None, most_connections: int | None = None
) -> AsyncIterator[LiveStack]:
    """Both transports on loopback, ports of the system's choice."""
    api = ApiServer("127.0.0.1", 0, 0, tls, most_connections)
    try:
        credentials = tls.credentials() if tls is not None else None
        grpc_server = GrpcServer(
            stack.service,
            stack.registry,
            stack.status,
            BASE,
            stack.gate,
            credentials,
            stack.calls,
            stack.budget,
            most_connections,
        )
        addresses = await api.start(stack.app, grpc_server)
        yield LiveStack(stack, addresses, grpc_server.patience, grpc_server.health, api)
    finally:
        stack.engine.go_on()
        await api.stop()


@contextmanager
def serving_in_thread(
    folder: Path, *adapters: str, prepare: Callable[[Stack], Awaitable[object]] | None = None
) -> Iterator[LiveStack]:
    """The same on a loop of its own, for clients that block. `prepare` is done before it listens."""
    started: Future[LiveStack] = Future()

    async def main() -> None:
        stopping = asyncio.Event()
        stack = make_stack(folder)
        for seed, name in enumerate(adapters):
            await stack.load(name, seed=seed)
        if prepare is not None:
            await prepare(stack)
        async with serving(stack) as live:
            live.stop = lambda: loop.call_soon_threadsafe(stopping.set)
            started.set_result(live)
            await stopping.wait()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    live = started.result(30)
    try:
        yield live
    finally:
        live.stop()
        thread.join()
        loop.close()


def write_adapter(folder: Path, *, seed: int = 0, rank: int = 2, base: BaseSpec | None = None) -> Path:
    """A PEFT folder for the tiny base: q_proj of every layer, contents by seed."""
    base = base or tiny_spec()
    random = np.random.default_rng(seed)
    shape = base.projections["q_proj"]
    tensors = {}
    for layer in range(base.num_layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = random.standard_normal((rank, shape.in_features)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = random.standard_normal((shape.out_features, rank)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_gate_set(
    folder: Path,
    adapters: Mapping[str, str],
    *,
    seed: int = 0,
    router: RequestRouter | None = None,
    base: BaseSpec | None = None,
    **config: object,
) -> Path:
    """A gate set for the tiny base: q_proj of every layer. `adapters`: name → version."""
    base = base or tiny_spec()
    columns = tuple(Column(name, version) for name, version in adapters.items())
    told = GateSetConfig(columns, base=base.name, request_router=router.config() if router else None, **config)
    random = np.random.default_rng(seed)
    inputs = base.projections["q_proj"].in_features

    def gate() -> LinearGate:
        weight = random.standard_normal((told.num_columns, inputs)).astype(np.float32)
        return LinearGate(weight, np.zeros(told.num_columns, np.float32))

    gates = {(layer, "q_proj"): gate() for layer in range(base.num_layers)}
    GateSet(told, gates, request_router=router.tensors() if router else {}).write(folder)
    return folder


def certain_router(*columns: str) -> RequestRouter:
    """A request-level router that is sure of prompts of one letter over and over: `aaaa` is column 0, `bbbb` column 1,
    …, and the base's is the letter behind the last."""
    size, classes = 1 << 10, len(columns) + 2
    weight, seen = np.zeros((size, classes), np.float32), np.zeros(size, np.float32)
    for column in range(len(columns) + 1):
        buckets, _ = count_buckets([ord("a") + column] * 4, 10)
        weight[buckets, column], seen[buckets] = 20.0, 1.0
    none = np.zeros(classes, np.float32)
    return RequestRouter(weight, none, none + np.float32(0.9), np.ones(size, np.float32), seen, 10, 0.9)


async def settle() -> None:
    """Let everything that can run now, run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Return when it holds, looking again and again."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  what is looked at tells nobody when it changes
            await asyncio.sleep(0.005)


def stored(stack: Stack) -> set[str]:
    """Versions on disk."""
    return {folder.name for folder in (stack.root.parent / "store" / "versions").iterdir()}


def known(stack: Stack) -> set[str]:
    """Versions the engine knows."""
    return set(stack.engine.engine._residency.known)


async def background(stack: Stack) -> None:
    """Let what the registry left for later finish."""
    await asyncio.gather(*stack.registry._background.tasks)
