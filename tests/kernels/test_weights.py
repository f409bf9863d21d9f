"""The canonical weights' own definition, and which neighbours may share a product."""

import torch

from perseid_kernels.segments import PageList, Segments
from perseid_kernels.weights import DenseWeight, Int4Weight, Int8Weight, merge_outputs, quantize_int8
from tests.kernels.cases import CODEBOOKS, int4_weight, int8_weight


def test_int4_by_hand() -> None:
    """Low nibble first; each group its own scale and offset."""
    weight = Int4Weight(
        codes=torch.tensor([[0x10, 0xF2]], dtype=torch.uint8),
        codebook=CODEBOOKS["q4_0"],
        scale=torch.tensor([[2.0, 0.5]]),
        offset=torch.tensor([[100.0, -1.0]]),
        group_size=2,
    )
    assert weight.shape == (1, 4)
    assert weight.dequantize().tolist() == [[84.0, 86.0, -4.0, 2.5]]


def test_int8_by_hand() -> None:
    weight = Int8Weight(torch.tensor([[-128, 127]], dtype=torch.int8), torch.tensor([[0.5, 2.0]]), 1)
    assert weight.dequantize().tolist() == [[-64.0, 254.0]]


def test_rounded_to_8_bits(rng: torch.Generator) -> None:
    """To the nearest of 255 values, each group with the scale that lets its largest fit; zeros stay zeros."""
    values = torch.randn(5, 64, generator=rng)
    values[2, 32:] = 0.0
    values[3, 7] = -40.0
    rounded = quantize_int8(DenseWeight(values), 32)
    largest = values.view(5, 2, 32).abs().amax(dim=-1)
    torch.testing.assert_close(rounded.scale, largest / 127)
    error = (rounded.dequantize() - values).view(5, 2, 32).abs()
    assert (error <= 0.5001 * rounded.scale[..., None]).all()
    assert not rounded.dequantize()[2, 32:].any()


def test_merged_outputs_equal_the_parts_one_under_the_other(rng: torch.Generator) -> None:
    parts = [
        int4_weight(rng, 4, 64, 32, "q4_1"),
        int4_weight(rng, 2, 64, 32, "q4_1"),
        int4_weight(rng, 3, 64, 32, "q4_0"),  # other codebook, no offset
        int4_weight(rng, 1, 64, 64, "q4_0"),  # other group size
        int8_weight(rng, 2, 64, 32),
        int8_weight(rng, 2, 64, 32),
        DenseWeight(torch.ones(1, 64)),
        DenseWeight(torch.ones(1, 64, dtype=torch.float16)),
    ]
    merged = merge_outputs(list(parts))
    assert [weight.shape[0] for weight in merged] == [6, 3, 1, 4, 1, 1]
    stacked = torch.cat([weight.dequantize() for weight in parts])
    assert torch.equal(torch.cat([weight.dequantize() for weight in merged]), stacked)


def test_segments_group_equal_page_lists() -> None:
    first, second = PageList.of((3, 1)), PageList((3, 1), (1.0, 0.5))
    segments = Segments.build([first, None, second, PageList.of((3, 1))])
    assert segments is not None
    assert segments.rows.tolist() == [0, 3, 2]
    assert segments.indptr.tolist() == [0, 2, 3]
    assert segments.pages.tolist() == [3, 1, 3, 1]
    assert segments.page_indptr.tolist() == [0, 2, 4]
    assert segments.weights.tolist() == [1.0, 1.0, 1.0, 0.5]
    assert (segments.max_pages, segments.max_rows, segments.sizes) == (2, 2, ((2, 2), (1, 2)))
