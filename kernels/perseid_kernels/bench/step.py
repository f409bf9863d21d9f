"""A whole decode step of a random Llama-shaped model, in the ops of a backend, as one recorded graph."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perseid_kernels.backend import AttentionBatch, Backend
from perseid_kernels.bench.lora import page_lists
from perseid_kernels.bench.roofline import LLAMA_8B, ModelShape, Rates, decode_work, pages_of
from perseid_kernels.bench.sections import Deadline, Report, points
from perseid_kernels.bench.timing import seconds
from perseid_kernels.bench.weights import random_packed_int4, random_packed_int8, random_pages
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.row_tiles import StaticSegments
from perseid_kernels.segments import Segments
from perseid_kernels.triton_backend import TritonBackend

GRID = tuple((rows, adapters) for rows in (1, 8, 64, 256) for adapters in (0, 1, 8, 64) if adapters <= rows)
_BLOCK = 16
_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer: the fused linears by name, and their rank pages."""

    linears: dict[str, Any]
    pages: dict[str, RankPages]
    norms: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Model:
    """Random weights of a shape, packed for one backend."""

    shape: ModelShape
    layers: tuple[Layer, ...]
    head: Any
    norm: Tensor

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads (of the embedding, which is the head, it reads rows only)."""
        held = [weight for layer in self.layers for weight in layer.linears.values()]
        return sum(int(weight.nbytes) for weight in [*held, self.head])


@dataclass(frozen=True, slots=True)
class Packers:
    """How a backend's weights are made: (outputs, inputs) → packed."""

    linear: Callable[[int, int], Any]
    head: Callable[[int, int], Any]


def triton_packers(shape: ModelShape, device: torch.device) -> Packers:
    """4-bit affine linears and an 8-bit head, straight on the device."""
    return Packers(
        lambda outputs, inputs: random_packed_int4(outputs, inputs, shape.group_size, device),
        lambda outputs, inputs: random_packed_int8(outputs, inputs, 32, device),
    )


def build_model(shape: ModelShape, packers: Packers, device: torch.device, dtype: torch.dtype, num_pages: int) -> Model:
    """Every layer has weights and pages of its own, so a step reads all of them from memory."""

    def layer() -> Layer:
        linears = shape.linears().items()
        return Layer(
            {name: packers.linear(sum(slices), inputs) for name, (inputs, slices) in linears},
            {name: random_pages(num_pages, inputs, slices, device, dtype) for name, (inputs, slices) in linears},
            (
                torch.ones(shape.hidden, dtype=dtype, device=device),
                torch.ones(shape.hidden, dtype=dtype, device=device),
            ),
        )

    layers = tuple(layer() for _ in range(shape.layers))
    norm = torch.ones(shape.hidden, dtype=dtype, device=device)
    return Model(shape, layers, packers.head(shape.vocabulary, shape.hidden), norm)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a step reads beside the weights; fixed tensors, filled anew for each step by an engine."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T]
    cos: Tensor  # float32 [context, D/2]
    sin: Tensor
    batch: AttentionBatch
    caches: tuple[tuple[Tensor, Tensor], ...]  # K and V of each layer
    segments: Segments | None


def build_inputs(
    shape: ModelShape,
    num_rows: int,
    context: int,
    segments: Segments | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    layers: int | None = None,
) -> StepInputs:
    """Every row is a sequence of `context` tokens whose last one is new."""
    blocks = -(-context // _BLOCK)
    held = (num_rows * blocks, _BLOCK, shape.kv_heads, shape.head_dim)
    table = torch.randperm(num_rows * blocks, device=device).view(num_rows, blocks)
    angles = torch.rand(context, shape.head_dim // 2, device=device)
    last = context - 1
    return StepInputs(
        token_ids=torch.randint(0, shape.vocabulary, (num_rows,), device=device),
        positions=torch.full((num_rows,), last, device=device),
        slots=table[:, last // _BLOCK] * _BLOCK + last % _BLOCK,
        cos=angles.cos(),
        sin=angles.sin(),
        batch=AttentionBatch(
            query_start=torch.arange(num_rows + 1, dtype=torch.int32, device=device),
            context_len=torch.full((num_rows,), context, dtype=torch.int32, device=device),
            block_table=table.to(torch.int32),
            max_query_len=1,
            max_context_len=context,
        ),
        caches=tuple(
            (torch.randn(held, device=device).to(dtype), torch.randn(held, device=device).to(dtype))
            for _ in range(layers or shape.layers)
        ),
        segments=segments,
    )


def decode_step(backend: Backend, model: Model, inputs: StepInputs) -> Tensor:
    """The next token of every row, int64 [T]."""
    residual = backend.embed(model.head, inputs.token_ids)
    hidden = backend.rms_norm(residual, model.layers[0].norms[0], _EPS)
    following = [layer.norms[0] for layer in model.layers[1:]] + [model.norm]
    for layer, cache, next_norm in zip(model.layers, inputs.caches, following, strict=True):
        attended = _attend(backend, model.shape, layer, hidden, cache, inputs)
        hidden = backend.add_rms_norm(attended, residual, layer.norms[1], _EPS)
        inner = backend.silu_mul(_linear(backend, layer, "gate_up", hidden, inputs.segments))
        down = _linear(backend, layer, "down", inner, inputs.segments)
        hidden = backend.add_rms_norm(down, residual, next_norm, _EPS)
    logits = torch.empty(hidden.shape[0], model.shape.vocabulary, dtype=hidden.dtype, device=hidden.device)
    backend.matmul(hidden, model.head, logits)
    return logits.argmax(-1)


def _attend(
    backend: Backend, shape: ModelShape, layer: Layer, hidden: Tensor, cache: tuple[Tensor, Tensor], inputs: StepInputs
) -> Tensor:
    num_rows, dim = hidden.shape[0], shape.head_dim
    qkv = _linear(backend, layer, "qkv", hidden, inputs.segments)
    widths = [shape.heads * dim, shape.kv_heads * dim, shape.kv_heads * dim]
    q, k, v = (part.view(num_rows, -1, dim) for part in qkv.split(widths, dim=1))
    backend.rope_and_store(q, k, v, inputs.cos, inputs.sin, inputs.positions, *cache, inputs.slots)
    out = torch.empty(num_rows, shape.heads, dim, dtype=hidden.dtype, device=hidden.device)
    backend.attention(q, *cache, inputs.batch, dim**-0.5, out)
    return _linear(backend, layer, "o", out.view(num_rows, -1), inputs.segments)


def _linear(backend: Backend, layer: Layer, name: str, x: Tensor, segments: Segments | None) -> Tensor:
    weight = layer.linears[name]
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    backend.matmul(x, weight, out)
    if segments is not None:
        backend.add_lora(x, layer.pages[name], segments, out)
    return out


def bench_step(
    report: Report,
    deadline: Deadline,
    rates: Rates,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shape: ModelShape = LLAMA_8B,
    grid: tuple[tuple[int, int], ...] = GRID,
    context: int = 128,
    rank: int = 16,
) -> None:
    """Target: ≤ 1.3 × max(bytes / bandwidth, operations / rate), the adapters' own included. Points with more
    adapters than rows do not exist."""
    backend = TritonBackend(device, dtype)
    num_pages = max(adapters for _, adapters in grid) * pages_of(rank)
    model = build_model(shape, triton_packers(shape, device), device, dtype, max(num_pages, 1))
    for num_rows, adapters in points(report, deadline, grid):
        segments = None
        if adapters:
            count = num_rows * pages_of(rank)
            segments = StaticSegments.allocate(num_rows, count, device)
            segments.fill(page_lists(num_rows, rank, adapters))
        inputs = build_inputs(shape, num_rows, context, segments, device, dtype)
        taken = seconds(lambda: decode_step(backend, model, inputs), device)  # noqa: B023  (runs at once)
        item = torch.empty(0, dtype=dtype).element_size()
        work = decode_work(shape, num_rows, context, adapters, rank, model.weight_bytes, item)
        report.rows.append(
            {
                "rows": num_rows,
                "adapters": adapters,
                "context": context,
                "ms": taken * 1e3,
                "floor ms": work.floor(rates) * 1e3,
                "bound": work.bound(rates),
                "× floor": taken / work.floor(rates),
                "tokens/s": num_rows / taken,
                "target met": taken <= 1.3 * work.floor(rates),
            }
        )
