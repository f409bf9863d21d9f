"""Our NF4 against bitsandbytes on the CPU: the same dequantised values, bit for bit."""

import bitsandbytes.functional as bnb
import pytest
import torch

from perseid_server.errors import UnsupportedModel
from perseid_server.model.checkpoint.nf4 import NF4, dynamic_map, quantize_nf4, row_group

SHAPES = [(64, 64), (311, 320), (96, 96), (7, 48), (576, 576), (1, 16), (1200, 64)]


def by_bitsandbytes(weight: torch.Tensor) -> torch.Tensor:
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    state.dtype = torch.float32  # dequantise to float32 whatever the weight's type was
    # As one row: with AVX-512, bitsandbytes 0.50 counts blocks a row at a time and mixes up the maxima of matrices
    # whose width is no multiple of 64.
    state.shape = torch.Size((weight.numel(),))
    return bnb.dequantize_4bit(codes, state).view(weight.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02).to(dtype)
    assert torch.equal(quantize_nf4(weight).dequantize(), by_bitsandbytes(weight))


def test_equals_bitsandbytes_on_ties_zeros_and_outliers() -> None:
    levels = torch.cat((NF4, (NF4[1:] + NF4[:-1]) / 2))  # every level and every midpoint
    weight = levels[torch.randint(0, 31, (64, 128), generator=torch.Generator().manual_seed(3))].clone()
    weight[0] = 0
    weight[1, 5] = 1000.0
    weight[2] = 1e-30
    assert torch.equal(quantize_nf4(weight).dequantize(), by_bitsandbytes(weight))


def test_many_block_maxima() -> None:
    # 8-bit codes of block maxima rest on a grid: rare disagreements show only in numbers.
    weight = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantize_nf4(weight).dequantize(), by_bitsandbytes(weight))


def test_constants_are_bitsandbytes() -> None:
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())
    assert torch.equal(NF4, bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize(("num_inputs", "group"), [(64, 64), (96, 32), (48, 16), (4096, 64), (16, 16)])
def test_groups_never_cross_a_block_or_a_row(num_inputs: int, group: int) -> None:
    assert row_group(num_inputs, 64) == group


def test_widths_without_a_group_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"100 inputs.*multiple of 16"):
        quantize_nf4(torch.zeros(4, 100))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weights_are_refused(bad: float) -> None:
    weight = torch.zeros(4, 64)
    weight[2, 3] = bad
    with pytest.raises(UnsupportedModel, match="NaN or infinity"):
        quantize_nf4(weight)
