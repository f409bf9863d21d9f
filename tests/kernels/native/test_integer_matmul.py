"""The integer product: exact weights, activations of three bytes, the same bits in any batch. (A CPU without AVX-512
VNNI takes the float32 product, for which all of this holds as well.)"""

from dataclasses import replace

import pytest
import torch

from perseid_kernels.backend import Activations
from perseid_kernels.native.backend import NativeBackend
from perseid_kernels.native.build import build_library
from perseid_kernels.weights import Int4Weight, Int8Weight, Weight
from tests.kernels.cases import int4_weight, int8_weight

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backend() -> NativeBackend:
    return NativeBackend(build_library())


def weights(rng: torch.Generator) -> list[Weight]:
    """Blocks of 32 and 16, groups of several blocks, float16 and float32 scales, partial last panels."""
    int8 = int8_weight(rng, 41, 544, 32)
    return [
        int4_weight(rng, 70, 544, 32, "q4_1"),
        int4_weight(rng, 70, 544, 32, "q4_0"),
        int4_weight(rng, 33, 256, 128, "q4_0"),
        int4_weight(rng, 33, 96, 16, "q4_0"),
        int4_weight(rng, 33, 96, 16, "q4_1"),
        int8,
        replace(int8, scale=int8.scale.half().float()),
        int8_weight(rng, 35, 48, 16),
    ]


def product(backend: NativeBackend, weight: Weight, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape[0], weight.shape[0])
    backend.matmul(x, backend.pack(weight, CPU), out)
    return out


def test_weights_are_exact(backend: NativeBackend, rng: torch.Generator) -> None:
    for weight in weights(rng):
        expected = weight.dequantize()
        assert torch.equal(backend.embed(backend.pack(weight, CPU), torch.arange(weight.shape[0])), expected)
        assert torch.equal(product(backend, weight, torch.eye(weight.shape[1])), expected.T)


def bound(weight: Weight, x: torch.Tensor, share: float) -> torch.Tensor:
    """Σ_blocks share · max |x of the block| · Σ |W of the block|, plus float32's rounding of the sums (18 blocks, each
    added within half an ULP of the whole)."""
    num_outputs, _ = weight.shape
    block = 32 if weight.group_size % 32 == 0 else 16
    values = weight.dequantize().double()
    largest = x.abs().view(len(x), -1, block).amax(dim=2).double()
    return share * largest @ values.abs().view(num_outputs, -1, block).sum(dim=2).T + 2e-6 * (
        x.abs().double() @ values.abs().T
    )


def spread_rows(weight: Weight, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(9, weight.shape[1], generator=rng) * torch.logspace(-3, 3, weight.shape[1])


def test_activations_keep_their_bits(backend: NativeBackend, rng: torch.Generator) -> None:
    """21 bits beside 4-bit codes, 19 beside 8-bit ones."""
    for weight in weights(rng):
        x = spread_rows(weight, rng)
        exact = x.double() @ weight.dequantize().double().T
        share = 2**-21 if isinstance(weight, Int4Weight) else 2**-19
        assert ((product(backend, weight, x) - exact).abs() <= bound(weight, x, share)).all()


@pytest.mark.parametrize(("activations", "share"), [("int16", 2**-15), ("int8", 1 / 254)])
def test_fewer_bytes_err_as_much_as_they_say(activations: str, share: float, rng: torch.Generator) -> None:
    backend = NativeBackend(build_library(), activations=activations)
    for weight in weights(rng):
        x = spread_rows(weight, rng)
        exact = x.double() @ weight.dequantize().double().T
        together = product(backend, weight, x)
        assert ((together - exact).abs() <= bound(weight, x, share)).all()
        assert torch.equal(product(backend, weight, x[4:5])[0], together[4])
        if backend.has_integer_matmul:
            assert ((together - exact).abs() > bound(weight, x, share / 64)).any(), "no byte was left out"


def test_sums_that_pass_32_bits_on_the_way(backend: NativeBackend) -> None:
    """The largest codes and activations of one sign: the bytes' sums wrap, and their end must not."""
    for code, size in ((15, 32), (0, 32), (15, 16)):
        codes = torch.full((16, size // 2), code * 17, dtype=torch.uint8)
        for codebook in (torch.arange(16.0), torch.arange(16.0) - 8):
            weight = Int4Weight(codes, codebook, torch.ones(16, 1), None, size)
            for x in (torch.full((1, size), 1.0 - 2**-20), torch.full((1, size), -1.0)):
                expected = x.double() @ weight.dequantize().double().T
                torch.testing.assert_close(product(backend, weight, x).double(), expected, rtol=2**-20, atol=0)
    for code in (-128, -127, 127):
        weight = Int8Weight(torch.full((16, 32), code, dtype=torch.int8), torch.ones(16, 1), 32)
        for x in (torch.full((1, 32), 1.0 - 2**-20), torch.full((1, 32), -1.0)):
            expected = x.double() @ weight.dequantize().double().T
            torch.testing.assert_close(product(backend, weight, x).double(), expected, rtol=2**-18, atol=0)


@pytest.mark.parametrize("num_rows", [2, 7, 8, 9, 15, 16, 17, 31, 500])
def test_rows_do_not_see_each_other(backend: NativeBackend, rng: torch.Generator, num_rows: int) -> None:
    for weight in weights(rng):
        x = torch.randn(num_rows, weight.shape[1], generator=rng)
        together = product(backend, weight, x)
        for row in {0, num_rows // 2, num_rows - 1}:
            assert torch.equal(product(backend, weight, x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("activations", ["int16", "int8"])
@pytest.mark.parametrize("num_rows", [2, 3, 4, 5, 6, 7, 8, 500])
def test_nor_with_fewer_bytes(activations: Activations, rng: torch.Generator, num_rows: int) -> None:
    """Whose tiles have other sizes."""
    backend = NativeBackend(build_library(), activations=activations)
    for weight in weights(rng):
        x = torch.randn(num_rows, weight.shape[1], generator=rng)
        together = product(backend, weight, x)
        alone = torch.cat([product(backend, weight, x[row : row + 1]) for row in range(min(num_rows, 8))])
        assert torch.equal(together[:8], alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(backend: NativeBackend, rng: torch.Generator, value: float) -> None:
    for weight in weights(rng):
        x = torch.randn(3, weight.shape[1], generator=rng)
        x[1, 5] = value
        out = product(backend, weight, x)
        assert not out[1].isfinite().any()
        assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-25, 1e30])
def test_tiny_and_huge_rows(backend: NativeBackend, rng: torch.Generator, size: float) -> None:
    for weight in weights(rng):
        x = torch.full((2, weight.shape[1]), size)
        exact = x.double() @ weight.dequantize().double().T
        largest = size * weight.dequantize().abs().sum(dim=1).double()
        assert ((product(backend, weight, x) - exact).abs() <= 1e-4 * largest + 1e-25).all()
