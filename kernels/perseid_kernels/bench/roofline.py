"""Fewest bytes and operations of each op, and the time below which no implementation goes.

    floor = max(bytes / bandwidth, operations / rate)

Every input is read once and every output written once; a multiply-add is two operations. Weights count the bytes
they are really held in. Shape legend: backend.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from perseid_kernels.segments import PAGE_RANK


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine was measured to do."""

    bandwidth: float  # bytes/s
    flops: float  # operations/s of a large matrix product in the compute dtype


@dataclass(frozen=True, slots=True)
class Work:
    """What an op cannot avoid."""

    bytes: float
    flops: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def floor(self, rates: Rates) -> float:
        """Seconds."""
        return max(self.bytes / rates.bandwidth, self.flops / rates.flops)

    def bound(self, rates: Rates) -> str:
        """What sets the floor: "memory" or "compute"."""
        return "memory" if self.bytes / rates.bandwidth >= self.flops / rates.flops else "compute"


def matmul_work(num_rows: int, num_outputs: int, num_inputs: int, weight_bytes: int, itemsize: int) -> Work:
    """out = x Wᵀ with x and out in `itemsize` bytes an element."""
    activations = num_rows * (num_inputs + num_outputs) * itemsize
    return Work(weight_bytes + activations, 2 * num_rows * num_outputs * num_inputs)


def lora_work(num_rows: int, num_inputs: int, slices: Sequence[int], rank: int, adapters: int, itemsize: int) -> Work:
    """out += (x Aᵀ) B for rows that use `adapters` distinct adapters of `rank`: x read, out read and written."""
    if not adapters:
        return Work(0, 0)
    held = adapters * lora_parameters(num_inputs, slices, rank) * itemsize
    activations = num_rows * (num_inputs + 2 * sum(slices)) * itemsize
    return Work(held + activations, 2 * num_rows * lora_parameters(num_inputs, slices, rank))


def routed_work(
    num_rows: int,
    num_inputs: int,
    slices: Sequence[int],
    columns: int,
    rank: int,
    distinct: Sequence[int],
    picks: int,
    itemsize: int,
) -> Work:
    """Float32 gates of all columns and projections; A and B of the adapters that some row chose, `distinct` in each
    projection; x read, out read and written. `picks`: choices of an adapter, over rows and projections."""
    gates = len(slices) * columns * (num_inputs + 1)
    held = sum(count * rank * (num_inputs + width) for count, width in zip(distinct, slices, strict=True))
    activations = num_rows * (num_inputs + 2 * sum(slices))
    mean = rank * (num_inputs + sum(slices) / len(slices))  # of one pick
    return Work(4 * gates + (held + activations) * itemsize, 2 * num_rows * gates + 2 * picks * mean)


def lora_parameters(num_inputs: int, slices: Sequence[int], rank: int) -> int:
    """Numbers in one adapter's A and B for a fused linear."""
    return rank * (len(slices) * num_inputs + sum(slices))


def pages_of(rank: int) -> int:
    """Rank pages of one adapter."""
    return -(-rank // PAGE_RANK)


def attention_work(
    num_rows: int, context: int, heads: int, kv_heads: int, head_dim: int, kv_itemsize: int, itemsize: int
) -> Work:
    """One new row in each of `num_rows` sequences of `context` tokens."""
    cache = num_rows * context * 2 * kv_heads * head_dim * kv_itemsize
    activations = num_rows * 2 * heads * head_dim * itemsize
    return Work(cache + activations, 4 * num_rows * context * heads * head_dim)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama-shaped decoder."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    group_size: int

    def linears(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """(inputs, slices) of a layer's fused linears."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (self.hidden, (q, kv, kv)),
            "o": (q, (self.hidden,)),
            "gate_up": (self.hidden, (self.ffn, self.ffn)),
            "down": (self.ffn, (self.hidden,)),
        }


LLAMA_8B = ModelShape(4096, 32, 14336, 32, 8, 128, 128256, 32)
SMOLLM2_135M = ModelShape(576, 30, 1536, 9, 3, 64, 49152, 32)


def decode_work(
    shape: ModelShape, num_rows: int, context: int, adapters: int, rank: int, weight_bytes: int, itemsize: int
) -> Work:
    """A decode step as a whole. Between ops nothing is counted: a perfect engine keeps activations in its caches."""
    weights = sum(inputs * sum(slices) for inputs, slices in shape.linears().values()) * shape.layers
    head = shape.hidden * shape.vocabulary
    total = Work(weight_bytes + num_rows * shape.vocabulary * itemsize, 2 * num_rows * (weights + head))
    attention = attention_work(num_rows, context, shape.heads, shape.kv_heads, shape.head_dim, itemsize, itemsize=0)
    total += Work(attention.bytes * shape.layers, attention.flops * shape.layers)
    if adapters:
        one = sum(lora_parameters(inputs, slices, rank) for inputs, slices in shape.linears().values())
        one *= shape.layers
        total += Work(adapters * one * itemsize, 2 * num_rows * one)
    return total
