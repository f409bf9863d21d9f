"""`perseid serve`: compose the server, say where it listens, run until told to stop."""

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import platformdirs
import uvloop
from cyclopts import Parameter

from perseid_server import __version__
from perseid_server.access.gate import Gate
from perseid_server.adapters.source import OPERATOR, SourcePolicy
from perseid_server.adapters.store import AdapterStore
from perseid_server.api.body_budget import BodyBudget
from perseid_server.api.descriptors import allow_connections, connections_of_each
from perseid_server.api.grpc.server import GrpcServer
from perseid_server.api.http.app import build_app
from perseid_server.api.http.debug import DebugSources
from perseid_server.api.server import Addresses, ApiServer
from perseid_server.api.status import ServerStatus
from perseid_server.cli.ending import without_threads
from perseid_server.cli.security import Security, limited, secured
from perseid_server.cli.tracing import check_tracing, traced
from perseid_server.config import NamedSource, ServeConfig
from perseid_server.engine.config import EngineConfig
from perseid_server.engine.messages import EngineReady, StepOutputs
from perseid_server.errors import InvalidRequest
from perseid_server.frontend.adaptation import Resolver
from perseid_server.frontend.admission import Admission, AdmissionLimits
from perseid_server.frontend.deadline import Timeouts
from perseid_server.frontend.heads import HeadsChooser
from perseid_server.frontend.loaded import LoadedGateSet
from perseid_server.frontend.metrics import Metrics
from perseid_server.frontend.registry import AdapterRegistry
from perseid_server.frontend.service import GenerationService
from perseid_server.frontend.speculation import Drafting
from perseid_server.frontend.text import TextProcessor
from perseid_server.ipc.engine_client import EngineProcess
from perseid_server.logs import configure_logging
from perseid_server.model.source import resolve_model
from perseid_server.model.tokenizer import export_tokenizer
from perseid_server.observe.calls import Calls

logger = logging.getLogger(__name__)

T = TypeVar("T")


def serve(config: Annotated[ServeConfig, Parameter(name="*")] = ServeConfig()) -> int:  # noqa: B008  frozen
    """Serve until told to stop; returns the exit status."""
    configure_logging(config.log_level, config.log_format)
    if config.log_prompts:
        logger.warning("--log-prompts: prompts and answers, your users' private data, are written into this log")
    return uvloop.run(_serve(config))


async def _serve(config: ServeConfig) -> int:
    return await without_threads(_until_stopped(config))


async def _until_stopped(config: ServeConfig) -> int:
    stopping = _stop_signals()
    async with contextlib.AsyncExitStack() as stack:
        running = await _unless_stopped(stopping, stack.enter_async_context(_server(config)))
        if running is None:
            logger.info("stopped while starting")
            return 0
        sys.stdout.write(_greeting(running))
        sys.stdout.flush()
        await stopping.wait()
        logger.info("shutting down; running requests get %g s", config.grace)
        await _drain(running, config.grace)
    return 0


async def _drain(running: "RunningServer", grace_s: float) -> None:
    """Let what runs come to its end; what is left of the time is for answers that are on their way."""
    ends = time.monotonic() + grace_s
    await asyncio.gather(running.service.drain(grace_s), running.registry.drain(grace_s))
    await running.api.drain(ends - time.monotonic())


def _stop_signals() -> asyncio.Event:
    """Set by the first SIGTERM or Ctrl-C. The second ends the process at once, with status 128 + its number as shells
    tell it; the engine process ends with it, and the store is safe at any moment."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        if stopping.is_set():
            logger.warning("told to stop again: stopping at once")
            os._exit(128 + number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    return stopping


async def _unless_stopped(stopping: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """What the work brings; None when a signal comes first. Loading a model can take long."""
    working, told = asyncio.create_task(work), asyncio.create_task(stopping.wait())
    await asyncio.wait({working, told}, return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if working.done():
        return await working
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    return None


@dataclass(frozen=True, slots=True)
class RunningServer:
    """What the greeting tells, and what draining needs."""

    ready: EngineReady
    api: ApiServer
    addresses: Addresses
    service: GenerationService
    registry: AdapterRegistry
    security: Security


@asynccontextmanager
async def _server(config: ServeConfig) -> AsyncGenerator[RunningServer]:
    """Everything, in the order in which it can fail: ports, base, store, engine, adapters."""
    named = [_named_source(text) for text in config.adapter]
    check_tracing(config)
    most_connections = connections_of_each(allow_connections())
    async with contextlib.AsyncExitStack() as stack:
        security = stack.enter_context(secured(config))
        behind_api = await stack.enter_async_context(contextlib.AsyncExitStack())  # what the last calls need to the end
        api = ApiServer(config.host, config.http_port, config.grpc_port, security.tls, most_connections)
        stack.push_async_callback(api.stop)
        source = await asyncio.to_thread(resolve_model, config.model)
        store_folder = config.store or _default_store(source.name)
        store = await asyncio.to_thread(_open_store, store_folder)
        behind_api.callback(store.close)
        limiter = behind_api.enter_context(limited(store_folder))
        gate = Gate(security.keys, limiter, open_metrics=config.metrics_role == "none")
        bundle = await asyncio.to_thread(export_tokenizer, source)

        engine = EngineProcess(
            _engine_config(config),
            step_timeout_s=config.step_timeout or None,
            log_level=config.log_level,
            log_format=config.log_format,
        )
        stack.push_async_callback(engine.stop)
        ready = await engine.start()
        base = ready.spec

        registry = AdapterRegistry(
            store,
            engine,
            base,
            _client_policy(config),
            ready.adapter_pages_total,
            allow_pickle_heads=config.allow_pickle_heads,
        )
        behind_api.callback(registry.close)
        metrics = Metrics(ready.adapter_pages_total)
        _connect(engine, metrics, registry)
        limiter.on_refusal(metrics.rejected)
        await stack.enter_async_context(metrics.measuring_lag())
        resolver = Resolver(registry, engine, config.gate_set)
        text = TextProcessor(bundle, base.vocab_size)
        behind_api.callback(text.tokenizing.close)
        drafting = Drafting(HeadsChooser(registry, engine.adapter_states), config.speculation)
        limits = AdmissionLimits.of(config.max_queue, config.max_queue_tokens, ready.kv_tokens or ready.max_model_len)
        timeouts = Timeouts(config.default_timeout, config.max_timeout)
        admission = Admission(limits, metrics)
        service = GenerationService(engine, resolver, text, metrics, admission, drafting, limiter, timeouts)
        await registry.restore()
        for adapter in named:
            await registry.load(adapter.name, adapter.source, replace=True, policy=_operator_policy(config))
        _check_default(registry, config.gate_set)

        status = ServerStatus(service, lambda: engine.status, lambda: engine.trouble)
        engine.on_status(lambda _: status.changed())
        on_close = await behind_api.enter_async_context(traced(config))
        calls = Calls(log_prompts=config.log_prompts, on_close=on_close)
        budget = BodyBudget(on_refusal=metrics.rejected)
        debug = DebugSources(engine, registry, service, admission, status, calls)
        app = build_app(service, registry, metrics, debug, base=base.name, root=config.model, gate=gate, budget=budget)
        grpc_server = GrpcServer(
            service, registry, status, base.name, gate, security.credentials, calls, budget, most_connections
        )
        addresses = await api.start(app, grpc_server)
        yield RunningServer(ready, api, addresses, service, registry, security)


def _named_source(text: str) -> NamedSource:
    try:
        return NamedSource.parse(text)
    except ValueError as error:
        raise InvalidRequest(f"--adapter: {error}", field="adapter") from error


def _check_default(registry: AdapterRegistry, gate_set: str | None) -> None:
    """A default that is not there is told at once, not to the first client."""
    if gate_set is not None and not isinstance(registry.find(gate_set), LoadedGateSet):
        loaded = ", ".join(repr(one.name) for one in registry.gate_sets()) or "none"
        raise InvalidRequest(f"--gate-set {gate_set}: no such gate set is loaded (loaded: {loaded})", field="gate_set")


def _client_policy(config: ServeConfig) -> SourcePolicy:
    """Roots stay as the operator wrote them, links and all: clients may name them so."""
    roots = tuple(root.absolute() for root in config.adapter_root)
    return SourcePolicy(roots, config.allow_hub, allow_pickle_heads=config.allow_pickle_heads)


def _operator_policy(config: ServeConfig) -> SourcePolicy:
    return replace(OPERATOR, allow_pickle_heads=config.allow_pickle_heads)


def _open_store(folder: Path) -> AdapterStore:
    try:
        return AdapterStore(folder)
    except OSError as error:
        raise InvalidRequest(f"--store {folder}: {error.strerror or error}", field="store") from error


def _default_store(base: str) -> Path:
    """A store for each base, so that a name means an adapter of this one."""
    return Path(platformdirs.user_data_dir("perseid")) / "stores" / re.sub(r"[^\w.-]", "_", base)


def _engine_config(config: ServeConfig) -> EngineConfig:
    return EngineConfig(
        model=config.model,
        served_name=config.served_name,
        device=config.device,
        kv_dtype=config.kv_dtype,
        activations=config.activations,
        kv_memory=config.kv_memory,
        adapter_memory=config.adapter_memory,
        adapter_host_memory=config.adapter_host_memory,
        max_batch_tokens=config.max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        prefix_cache=config.prefix_cache,
        cuda_graphs=config.cuda_graphs,
        draft_tokens=config.draft_tokens,
        threads=config.threads,
    )


def _connect(engine: EngineProcess, metrics: Metrics, registry: AdapterRegistry) -> None:
    """Let the metrics follow the engine."""

    def stepped(step: StepOutputs) -> None:
        metrics.engine_stepped(step, registry.names())

    def status_changed(status: str) -> None:
        if status != "ready" or engine.ready is None:
            metrics.engine_lost()
            return
        metrics.engine_ready(engine.ready)

    registry.on_load(metrics.adapter_load_ended)
    registry.draining.on_refusal(lambda: metrics.rejected("draining"))
    metrics.watch_adapters(registry.locations, registry.all_names)
    metrics.watch_processes(lambda: engine.pid)
    metrics.watch_step_age(lambda: engine.step_age_s() or 0.0)
    engine.on_step(stepped)
    engine.on_status(status_changed)
    engine.on_ending(lambda ending: metrics.engine_restarted(ending.cause))
    status_changed(engine.status)


def _greeting(running: RunningServer) -> str:
    """Where the server listens, and two commands that work as printed; where they say KEY and CA.pem, with yours."""
    ready, addresses = running.ready, running.addresses
    base = ready.spec.name
    tls, keys = running.security.tls is not None, running.security.keys is not None
    http = f"{'https' if tls else 'http'}://{addresses.host}:{addresses.http_port}"
    grpc = f"{addresses.host}:{addresses.grpc_port}"
    adapters = _listed([adapter.name for adapter in running.registry.adapters()])
    gate_sets = _listed([gate_set.name for gate_set in running.registry.gate_sets()])
    heads = _listed([one.name for one in running.registry.heads()])
    curl = " --cacert CA.pem" * tls + " -H 'Authorization: Bearer KEY'" * keys
    ours = " --tls-ca CA.pem" * tls + " --api-key KEY" * keys
    question = "What is the capital of France?"
    body = f'{{"model": "{base}", "temperature": 0, "messages": [{{"role": "user", "content": "{question}"}}]}}'
    return f"""
Perseid {__version__} is ready.
  base      {base}, {ready.weight_bytes / 1e6:.0f} MB in 4 bits on {ready.device}
  adapters  {adapters}
  gate sets {gate_sets}
  heads     {heads}
  context   {ready.max_model_len} tokens
  HTTP      {http}
  gRPC      {grpc}

Try it (an adapter's name instead of the base's asks that adapter, "auto" the gate set):
  curl -s{curl} {http}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'
  {_command()} generate --server {grpc}{ours} --chat "{question}"

"""


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"


def _command() -> str:
    """How this command can be called again from here."""
    called = Path(sys.argv[0])
    if called.name != "perseid":
        return f"{sys.executable} -m perseid_server"
    beside = Path(sys.executable).parent / "perseid"
    with contextlib.suppress(ValueError):
        return str(beside.relative_to(Path.cwd()))
    return str(beside)
