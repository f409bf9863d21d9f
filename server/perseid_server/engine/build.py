"""From a configuration to an engine that is ready to step."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from perseid_kernels.backend import Backend, Recorder, backend_for
from perseid_kernels.segments import PAGE_RANK
from perseid_server.adapters.gate_loading import load_gate_table
from perseid_server.adapters.gate_residency import GateResidency
from perseid_server.adapters.lora_config import MAX_RANK
from perseid_server.adapters.pool import AdapterPool
from perseid_server.adapters.residency import Residency
from perseid_server.adapters.residents import Residents
from perseid_server.engine.config import MIB, Capacity, EngineConfig, plan_capacity
from perseid_server.engine.drafting import Drafter
from perseid_server.engine.engine import Engine, EngineLimits
from perseid_server.engine.heads import HeadRunner
from perseid_server.engine.kv_blocks import BlockAllocator
from perseid_server.engine.messages import EngineReady
from perseid_server.engine.runner import ModelRunner
from perseid_server.errors import InvalidRequest
from perseid_server.model.build import build_decoder
from perseid_server.model.checkpoint import open_checkpoint
from perseid_server.model.decode_graphs import DecodeGraphs
from perseid_server.model.graph_limits import GraphLimits, most_tree_rows
from perseid_server.model.kv_cache import KVCache
from perseid_server.model.source import resolve_model
from perseid_server.model.step_times import measure_steps
from perseid_server.model.warm_up import warm_up
from perseid_server.speculation.heads_loading import LoadHeads
from perseid_server.speculation.heads_residency import HeadsResidency
from perseid_server.speculation.step_clock import StepClock

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """The engine and what to tell the API process about it."""

    engine: Engine
    ready: EngineReady


def build_engine(config: EngineConfig) -> BuiltEngine:
    """Load the base, allocate KV blocks and adapter pages, on a GPU compile the kernels and record decode steps.

    Raises PerseidError with a message for the operator.
    """
    device = _device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    checkpoint = open_checkpoint(resolve_model(config.model))
    spec = checkpoint.spec if config.served_name is None else replace(checkpoint.spec, name=config.served_name)
    backend = backend_for(device, activations=config.activations)
    kv_dtype = _kv_dtype(config.kv_dtype, backend)
    capacity = plan_capacity(
        config,
        checkpoint.config.max_position_embeddings,
        KVCache.bytes_per_block(spec, config.block_size, kv_dtype),
        AdapterPool.bytes_per_page(spec, backend.compute_dtype),
    )
    decoder = build_decoder(checkpoint, backend, device, capacity.max_model_len, _slow_progress())
    pool = AdapterPool(spec, capacity.num_pages, device, backend.compute_dtype)
    residency = Residents(
        Residency(spec, pool, config.adapter_host_memory * MIB),
        GateResidency(partial(load_gate_table, spec, device)),
    )
    kv = KVCache.allocate(spec, capacity.num_blocks, config.block_size, device, kv_dtype)
    graphs = None
    if isinstance(backend, Recorder):
        warm_up(decoder, kv, pool, config.max_batch_tokens)
        if config.cuda_graphs:
            graphs = DecodeGraphs(decoder, kv, pool, backend, _graph_limits(config, capacity))
    times = measure_steps(
        decoder.bind(kv, pool), device, capacity.num_blocks * config.block_size, config.block_size, graphs
    )
    load_heads = LoadHeads(checkpoint, decoder.lm_head, backend, device)
    heads = HeadRunner(HeadsResidency(load_heads), pool, residency)
    engine = Engine(
        EngineLimits(capacity.max_model_len, config.max_batch_tokens, config.max_num_seqs, spec.eos_token_ids),
        BlockAllocator(capacity.num_blocks, config.block_size, caching=config.prefix_cache, base=spec.hash),
        residency,
        ModelRunner(decoder, kv, pool, residency, config.block_size, graphs),
        Drafter(StepClock(times.plain, times.trees), heads, config.draft_tokens),
    )
    ready = EngineReady(
        spec=spec,
        weight_bytes=decoder.weight_bytes,
        max_model_len=capacity.max_model_len,
        adapter_pages_total=capacity.num_pages,
        device=f"{device.type} ({backend.name})",
        kv_tokens=capacity.num_blocks * config.block_size,
    )
    return BuiltEngine(engine, ready)


def _graph_limits(config: EngineConfig, capacity: Capacity) -> GraphLimits:
    return GraphLimits(
        max_rows=config.max_num_seqs,
        max_context=capacity.max_model_len,
        block_size=config.block_size,
        num_pages=capacity.num_pages,
        pages_of_row=MAX_RANK // PAGE_RANK,
        max_tree_rows=0 if config.draft_tokens == 0 else most_tree_rows(config.max_num_seqs, config.max_batch_tokens),
    )


def _slow_progress() -> Callable[[int, int], None]:
    """Tells of layers loaded, where loading takes so long that an operator wonders."""
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= PROGRESS_EVERY_S:
            told = time.monotonic()
            logger.info("loading the base: %d of %d layers", done, total)

    return tell


def _kv_dtype(name: str, backend: Backend) -> torch.dtype:
    if name == "auto":
        return backend.compute_dtype
    dtype: torch.dtype = getattr(torch, name)
    if dtype not in backend.kv_dtypes:
        held = ", ".join(str(each).removeprefix("torch.") for each in backend.kv_dtypes)
        raise InvalidRequest(f"kv_dtype {name}: the {backend.name} backend holds the cache in {held}", field="kv_dtype")
    return dtype


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("device cuda: torch finds no CUDA device; use --device cpu", field="device")
    return torch.device(name)
