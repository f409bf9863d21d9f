"""The products of each backend against the canonical weight's float32 definition."""

from dataclasses import replace

import pytest
import torch

from perseid_kernels.backend import Backend
from perseid_kernels.matmul_dense import matmul_dense_oracle
from perseid_kernels.matmul_q4 import matmul_q4_oracle
from perseid_kernels.matmul_q8 import matmul_q8_oracle
from perseid_kernels.triton_backend import TritonBackend
from perseid_kernels.weights import DenseWeight, Weight
from tests.kernels.cases import DEVICE, SENTINEL, assert_sum, int4_weight, int8_weight

# (outputs, inputs, group): odd outputs; inputs that leave half a chunk; one that is split over K
SHAPES = [(65, 96, 32), (311, 64, 64), (33, 48, 16), (70, 576, 32), (1, 128, 128)]
ROWS = [1, 17, 70]  # one of each launch variant: decode, small batch, prefill


def check(backend: Backend, weight: Weight, oracle, num_rows: int, rng: torch.Generator) -> None:
    """Into a column slice of a wider tensor, whose other columns must stay as they are."""
    num_outputs, num_inputs = weight.shape
    x = torch.randn(num_rows, num_inputs, generator=rng)
    wide = torch.full((num_rows, num_outputs + 7), SENTINEL, device=DEVICE)
    packed = backend.pack(weight, DEVICE)
    backend.matmul(x.to(DEVICE), packed, wide[:, 3 : 3 + num_outputs])
    magnitude = x.abs() @ weight.dequantize().abs().T
    assert_sum(wide[:, 3 : 3 + num_outputs], oracle(x, weight), magnitude, num_inputs)
    assert (wide[:, :3] == SENTINEL).all()
    assert (wide[:, 3 + num_outputs :] == SENTINEL).all()
    assert packed.shape == weight.shape


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "nf4"])
def test_q4_equals_the_definition(backend: Backend, rng: torch.Generator, kind: str, num_rows: int) -> None:
    for num_outputs, num_inputs, group in SHAPES:
        check(
            backend,
            int4_weight(rng, num_outputs, num_inputs, group, kind),
            matmul_q4_oracle,
            num_rows,
            rng,
        )


@pytest.mark.parametrize("num_rows", ROWS)
def test_q8_equals_the_definition(backend: Backend, rng: torch.Generator, num_rows: int) -> None:
    for num_outputs, num_inputs, group in SHAPES:
        check(backend, int8_weight(rng, num_outputs, num_inputs, group), matmul_q8_oracle, num_rows, rng)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_rows", ROWS)
def test_dense_equals_the_definition(backend: Backend, rng: torch.Generator, num_rows: int, dtype: torch.dtype) -> None:
    for num_outputs, num_inputs in [(65, 311), (33, 576)]:
        weight = DenseWeight(torch.randn(num_outputs, num_inputs, generator=rng).to(dtype))
        check(backend, weight, matmul_dense_oracle, num_rows, rng)


def test_an_output_reads_its_own_weights_only(backend: Backend, rng: torch.Generator) -> None:
    """K is no multiple of a tile: the rest of the tile lies in the next output's weights, which are NaN here."""
    values = torch.randn(3, 311, generator=rng)
    values[1] = float("nan")
    out = torch.empty(2, 3, device=DEVICE)
    packed = backend.pack(DenseWeight(values), DEVICE)
    backend.matmul(torch.randn(2, 311, generator=rng).to(DEVICE), packed, out)
    assert out.isnan().tolist() == [[False, True, False]] * 2


def test_each_code_reaches_its_own_input(backend: Backend, rng: torch.Generator) -> None:
    """One-hot rows read the weight's columns back exactly: no code, scale or offset sits at a neighbour's place."""
    for kind in ("q4_0", "q4_1", "nf4"):
        weight = int4_weight(rng, 19, 96, 32, kind)
        out = torch.empty(96, 19, device=DEVICE)
        backend.matmul(torch.eye(96, device=DEVICE), backend.pack(weight, DEVICE), out)
        # the kernel fuses code · scale + offset into one rounding where the definition has two
        torch.testing.assert_close(out.cpu().T, weight.dequantize(), rtol=2**-23, atol=2**-22)


def test_no_rows_is_no_work(backend: Backend, rng: torch.Generator) -> None:
    for weight in (
        int4_weight(rng, 8, 32, 32, "q4_0"),
        int8_weight(rng, 8, 32, 32),
        DenseWeight(torch.ones(8, 32)),
    ):
        backend.matmul(
            torch.empty(0, 32, device=DEVICE), backend.pack(weight, DEVICE), torch.empty(0, 8, device=DEVICE)
        )


def test_embedding_reads_rows_exactly(backend: Backend, rng: torch.Generator) -> None:
    ids = torch.tensor([10, 0, 10, 3])
    for weight in (
        int4_weight(rng, 11, 96, 32, "q4_1"),
        int4_weight(rng, 11, 48, 16, "nf4"),
        int8_weight(rng, 11, 48, 16),
        DenseWeight(torch.randn(11, 48, generator=rng)),
    ):
        rows = backend.embed(backend.pack(weight, DEVICE), ids.to(DEVICE))
        assert torch.equal(rows.cpu(), weight.dequantize()[ids])


def test_packed_weights_stay_packed(backend: Backend, rng: torch.Generator) -> None:
    """Half a byte a weight, plus a float32 scale a group, plus the codebook and what describes the layout."""
    nbytes = backend.pack(int4_weight(rng, 64, 128, 32, "q4_0"), DEVICE).nbytes
    packed = 64 * 128 // 2 + 64 * 4 * 4 + 16 * 4
    assert packed <= nbytes <= packed + 64


def test_scales_that_are_float16_share_a_word(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    """GGUF's scales and offsets: half the bytes, and the same weights to the bit."""
    wide = int4_weight(rng, 33, 192, 32, "q4_1")
    assert wide.offset is not None
    exact = replace(wide, scale=wide.scale.half().float(), offset=wide.offset.half().float())
    packed, unpaired = triton_backend.pack(exact, DEVICE), triton_backend.pack(wide, DEVICE)
    assert unpaired.nbytes - packed.nbytes == 33 * 6 * 4
    ids = torch.tensor([32, 0, 7])
    assert torch.equal(triton_backend.embed(packed, ids.to(DEVICE)).cpu(), exact.dequantize()[ids])
    out = torch.empty(192, 33, device=DEVICE)
    triton_backend.matmul(torch.eye(192, device=DEVICE), packed, out)
    torch.testing.assert_close(out.cpu().T, exact.dequantize(), rtol=2**-23, atol=2**-22)


def test_a_group_that_is_no_power_of_two(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    """48: groups begin within a tile's step, and 144 inputs leave the last chunk padded."""
    for num_rows in (1, 70):
        check(triton_backend, int4_weight(rng, 19, 144, 48, "q4_1"), matmul_q4_oracle, num_rows, rng)
        check(triton_backend, int8_weight(rng, 19, 144, 48), matmul_q8_oracle, num_rows, rng)


def test_a_group_size_no_tile_fits_is_refused(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match="group_size 8"):
        triton_backend.pack(int4_weight(rng, 4, 32, 8, "q4_0"), DEVICE)
    with pytest.raises(ValueError, match="group_size 8"):
        triton_backend.pack(int8_weight(rng, 4, 32, 8), DEVICE)
