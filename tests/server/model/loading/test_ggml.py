"""GGML blocks against the gguf package's own dequantiser, on random bytes: every bit pattern a block can hold."""

import gguf
import numpy as np
import pytest
import torch

from perseid_kernels.weights import Int4Weight, Int8Weight
from perseid_server.model.checkpoint.ggml import DECODERS
from perseid_server.model.headers.gguf import GGML_TYPES

SCALES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q8_0": (0,), "Q6_K": (208,)}
GROUPS = {"Q4_0": 32, "Q4_1": 32, "Q4_K": 32, "Q8_0": 32, "Q6_K": 16}


def random_rows(kind: str, num_rows: int, blocks_a_row: int) -> np.ndarray:
    """Blocks of random bytes, with finite scales of both signs where the block keeps its float16s."""
    rng = np.random.default_rng(7)
    nbytes = next(one.nbytes for one in GGML_TYPES.values() if one.name == kind)
    blocks = rng.integers(0, 256, (num_rows, blocks_a_row, nbytes), dtype=np.uint8)
    for place in SCALES[kind]:
        scale = rng.normal(0, 0.01, blocks.shape[:-1]).astype(np.float16)
        blocks[..., place : place + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(num_rows, -1)


@pytest.mark.parametrize("kind", SCALES)
def test_quantised_types_are_exact(kind: str) -> None:
    rows = random_rows(kind, num_rows=5, blocks_a_row=3)
    weight = DECODERS[kind](rows)
    expected = gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])
    assert torch.equal(weight.dequantize(), torch.from_numpy(expected))
    assert weight.shape == expected.shape
    assert isinstance(weight, Int4Weight | Int8Weight)
    assert weight.group_size == GROUPS[kind]
    assert weight.scale.dtype == torch.float32
    assert isinstance(weight, Int4Weight) == kind.startswith("Q4")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_types_keep_their_element_type(kind: str) -> None:
    values = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    rows = np.ascontiguousarray(gguf.quantize(values, gguf.GGMLQuantizationType[kind])).view(np.uint8).reshape(3, -1)
    weight = DECODERS[kind](rows)
    assert weight.values.dtype == {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    expected = gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])
    assert torch.equal(weight.dequantize(), torch.from_numpy(expected.reshape(3, 64)))


def test_type_table_is_ggufs() -> None:
    for qtype, (block, nbytes) in gguf.GGML_QUANT_SIZES.items():
        ours = GGML_TYPES[qtype.value]
        assert (ours.name, ours.block, ours.nbytes) == (qtype.name, block, nbytes)
