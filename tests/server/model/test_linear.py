"""The fused linear: parts in different forms side by side, biases where some projections have none."""

import pytest
import torch
from torch import Tensor

from perseid_kernels.weights import DenseWeight, Int8Weight, Weight
from perseid_server.model.checkpoint.nf4 import quantize_nf4
from perseid_server.model.linear import AdaptedLinear
from tests.server.model.passes import CPU, backend_named

WIDTHS = (48, 16, 32)
NUM_INPUTS = 64


@pytest.fixture(params=["eager", "native"])
def backend_name(request: pytest.FixtureRequest) -> str:
    return request.param


def weights_of(kinds: tuple[str, ...]) -> list[Weight]:
    generator = torch.Generator().manual_seed(len(set(kinds)))
    rows = [torch.randn(width, NUM_INPUTS, generator=generator) for width in WIDTHS]
    return [weight_of(kind, values) for kind, values in zip(kinds, rows, strict=True)]


def weight_of(kind: str, values: Tensor) -> Weight:
    if kind == "nf4":
        return quantize_nf4(values)
    if kind == "int8":
        return Int8Weight((values * 30).to(torch.int8), torch.full((len(values), NUM_INPUTS // 32), 1 / 30), 32)
    return DenseWeight(values.to(getattr(torch, kind)))


@pytest.mark.parametrize(
    ("kinds", "num_parts"),
    [
        (("nf4", "nf4", "nf4"), 1),
        (("nf4", "nf4", "int8"), 2),
        (("nf4", "bfloat16", "nf4"), 3),
        (("float32", "float32", "float32"), 1),
        (("float16", "bfloat16", "bfloat16"), 2),
    ],
)
@pytest.mark.parametrize("biased", [(), (0,), (0, 1, 2), (1, 2)])
def test_parts_stand_side_by_side(
    backend_name: str, kinds: tuple[str, ...], num_parts: int, biased: tuple[int, ...]
) -> None:
    weights = weights_of(kinds)
    generator = torch.Generator().manual_seed(0)
    biases = [torch.randn(width, generator=generator) if i in biased else None for i, width in enumerate(WIDTHS)]
    linear = AdaptedLinear.build(backend_named(backend_name), CPU, weights, biases)
    x = torch.randn(5, NUM_INPUTS, generator=generator)
    expected = [
        x.double() @ weight.dequantize().double().T + (0 if bias is None else bias)
        for weight, bias in zip(weights, biases, strict=True)
    ]
    assert len(linear.parts) == num_parts
    assert (linear.bias_N is None) == (not biased)
    assert linear.num_outputs == sum(WIDTHS)
    torch.testing.assert_close(linear(x).double(), torch.cat(expected, dim=1), atol=1e-4, rtol=1e-5)
