"""What the native backend promises beyond the oracles: exact weights, and the same bits in any batch."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from perseid_kernels.backend import Backend
from perseid_kernels.native.backend import NativeBackend
from perseid_kernels.native.build import build_library
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.segments import PageList, Segments
from perseid_kernels.weights import DenseWeight, Weight
from tests.kernels.cases import CODEBOOKS, attention_batch, int4_weight, int8_weight, lora_pool, random_page_lists

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def native_backend() -> NativeBackend:
    """With the float32 product, which CPUs without products of bytes take for all weights."""
    return NativeBackend(build_library(), activations="float32")


def half_scales(weight: Weight) -> Weight:
    """The same codes with scales and offsets that float16 holds exactly."""
    offset = getattr(weight, "offset", None)
    changed = {"scale": weight.scale.half().float()} | ({} if offset is None else {"offset": offset.half().float()})
    return replace(weight, **changed)


def weights(rng: torch.Generator) -> list[Weight]:
    """One of every reader, with a partial last panel and an odd number of panels."""
    int4 = [int4_weight(rng, 70, 544, 32, kind) for kind in CODEBOOKS]
    affine_offset = replace(int4_weight(rng, 33, 96, 16, "q4_0"), offset=torch.randn(33, 6, generator=rng))
    nf4_offset = replace(int4_weight(rng, 33, 96, 16, "nf4"), offset=torch.randn(33, 6, generator=rng))
    int8 = int8_weight(rng, 41, 544, 32)
    values = torch.randn(35, 311, generator=rng)
    dense = [DenseWeight(values.to(dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    return [*int4, *map(half_scales, int4), affine_offset, nf4_offset, int8, half_scales(int8), *dense]


def product(backend: Backend, weight: Weight, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape[0], weight.shape[0])
    backend.matmul(x, backend.pack(weight, CPU), out)
    return out


def test_decoded_weights_are_the_canonical_values(native_backend: Backend, rng: torch.Generator) -> None:
    """Bit by bit, in the embedding and in the product's own decoding (a one-hot row picks a column)."""
    for weight in weights(rng):
        num_outputs, num_inputs = weight.shape
        expected = weight.dequantize()
        assert torch.equal(native_backend.embed(native_backend.pack(weight, CPU), torch.arange(num_outputs)), expected)
        assert torch.equal(product(native_backend, weight, torch.eye(num_inputs)), expected.T)


@pytest.mark.parametrize("num_rows", [2, 3, 4, 5, 6, 11, 12, 13, 24, 193])
def test_products_are_the_same_bits_in_any_batch(native_backend: Backend, rng: torch.Generator, num_rows: int) -> None:
    for weight in weights(rng):
        x = torch.randn(num_rows, weight.shape[1], generator=rng)
        together = product(native_backend, weight, x)
        for row in {0, num_rows // 2, num_rows - 1}:
            assert torch.equal(product(native_backend, weight, x[row : row + 1])[0], together[row])


def test_the_number_of_threads_changes_no_bit(rng: torch.Generator) -> None:
    for kind in ("q4_1", "nf4"):
        weight = int4_weight(rng, 640, 576, 32, kind)
        x = torch.randn(9, 576, generator=rng)
        expected = product(NativeBackend(build_library()), weight, x)
        for threads in (1, 3, 8):
            assert torch.equal(product(NativeBackend(build_library(), threads), weight, x), expected)
    NativeBackend(build_library())


def test_many_short_loops_in_a_row_finish(rng: torch.Generator) -> None:
    """The pool's hand-over: thousands of loops of a few tasks, workers asleep and awake."""
    backend = NativeBackend(build_library(), 4)
    weight = backend.pack(int4_weight(rng, 300, 32, 32, "q4_0"), CPU)
    x, out = torch.randn(1, 32, generator=rng), torch.empty(1, 300)
    backend.matmul(x, weight, out)
    expected = out.clone()
    for _ in range(5000):
        out.zero_()
        backend.matmul(x, weight, out)
        assert torch.equal(out, expected)
    NativeBackend(build_library())


def test_low_rank_sums_are_the_same_bits_in_any_batch(native_backend: Backend, rng: torch.Generator) -> None:
    slices, num_inputs = (20, 12), 1056
    a, b = lora_pool(rng, 20, num_inputs, slices)
    lists = [*random_page_lists(rng, 8, 20), *[PageList.of((0, 1))] * 36]
    x, y = torch.randn(44, num_inputs, generator=rng), torch.randn(44, sum(slices), generator=rng)
    segments = Segments.build(lists)
    assert segments is not None
    together = y.clone()
    pages = RankPages.of(a, b, slices)
    native_backend.add_lora(x, pages, segments, together)
    for row in (1, 2, 3, 20, 43):
        only = Segments.build([lists[row]])
        assert only is not None
        alone = y[row : row + 1].clone()
        native_backend.add_lora(x[row : row + 1], pages, only, alone)
        assert torch.equal(alone[0], together[row]), f"row {row}"


@pytest.mark.parametrize("head_dim", [32, 64, 72])
def test_chunks_of_a_prefill_are_the_same_bits_as_the_whole(
    native_backend: Backend, rng: torch.Generator, head_dim: int
) -> None:
    """One prefill of 150 rows, and the same rows in chunks that cut tiles and row blocks anywhere."""
    batch, blocks = attention_batch(rng, [150], [41], 16)
    k, v = (torch.randn(blocks, 16, 3, head_dim, generator=rng) for _ in range(2))
    q = torch.randn(150, 9, head_dim, generator=rng)
    whole = torch.empty_like(q)
    native_backend.attention(q, k, v, batch, 0.3, whole)
    for start, end in pairwise((0, 1, 2, 17, 80, 149, 150)):
        part = replace(
            batch,
            query_start=torch.tensor([0, end - start], dtype=torch.int32),
            context_len=torch.tensor([41 + end], dtype=torch.int32),
        )
        chunk = torch.empty(end - start, 9, head_dim)
        native_backend.attention(q[start:end].contiguous(), k, v, part, 0.3, chunk)
        assert torch.equal(chunk, whole[start:end]), f"rows {start} to {end}"


def test_row_ops_take_extreme_values(native_backend: Backend) -> None:
    """SiLU where e^x leaves float32, and NaN that stays in its own row."""
    gate = torch.tensor([[-1e4, -100.0, -0.0, 100.0, 1e4, float("nan"), 1.0, 2.0, 3.0]])
    out = native_backend.silu_mul(torch.cat((gate, torch.ones(1, 9)), dim=1))
    torch.testing.assert_close(out, torch.nn.functional.silu(gate), equal_nan=True, rtol=1e-6, atol=1e-30)
    x = torch.ones(2, 16)
    x[1, 3] = float("nan")
    assert native_backend.rms_norm(x, torch.ones(16), 1e-6).isnan().any(dim=1).tolist() == [False, True]
