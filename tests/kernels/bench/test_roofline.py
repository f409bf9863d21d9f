"""Counts of bytes and operations, by hand on sizes small enough for it."""

import pytest

from perseid_kernels.bench.products import product_target_met
from perseid_kernels.bench.roofline import (
    LLAMA_8B,
    ModelShape,
    Rates,
    Work,
    attention_work,
    decode_work,
    lora_parameters,
    lora_work,
    matmul_work,
    pages_of,
    routed_work,
)

TINY = ModelShape(
    hidden=8, layers=2, ffn=12, heads=2, kv_heads=1, head_dim=4, vocabulary=10, group_size=4
)  # fmt: skip


def test_the_floor_is_the_larger_of_the_two_times() -> None:
    rates = Rates(bandwidth=100, flops=1000)
    assert Work(bytes=200, flops=100).floor(rates) == 2
    assert Work(bytes=200, flops=100).bound(rates) == "memory"
    assert Work(bytes=200, flops=4000).floor(rates) == 4
    assert Work(bytes=200, flops=4000).bound(rates) == "compute"


def test_a_product_reads_weight_and_x_and_writes_out() -> None:
    work = matmul_work(num_rows=3, num_outputs=5, num_inputs=7, weight_bytes=11, itemsize=2)
    assert work == Work(bytes=11 + 3 * (7 + 5) * 2, flops=2 * 3 * 5 * 7)


def test_low_rank_sums_read_each_adapter_once() -> None:
    assert lora_parameters(7, (5, 3), rank=4) == 4 * 7 * 2 + 4 * (5 + 3)
    work = lora_work(num_rows=6, num_inputs=7, slices=(5, 3), rank=4, adapters=2, itemsize=2)
    assert work.bytes == 2 * 88 * 2 + 6 * (7 + 8 + 8) * 2
    assert work.flops == 2 * 6 * 88
    assert lora_work(6, 7, (5, 3), 4, adapters=0, itemsize=2) == Work(0, 0)


def test_routed_sums_read_all_gates_and_the_chosen_adapters() -> None:
    """Two of nine adapters in the first projection, none in the second: its three rows chose the base."""
    work = routed_work(3, 7, (5, 3), columns=10, rank=4, distinct=(2, 0), picks=4, itemsize=2)
    gates = 2 * 10 * (7 + 1)
    assert work.bytes == gates * 4 + (2 * 4 * (7 + 5)) * 2 + 3 * (7 + 8 + 8) * 2
    assert work.flops == 2 * 3 * gates + 2 * 4 * 4 * (7 + 4)


def test_attention_reads_keys_and_values_of_the_key_heads() -> None:
    work = attention_work(3, context=10, heads=4, kv_heads=2, head_dim=8, kv_itemsize=2, itemsize=4)
    assert work.bytes == 3 * 10 * 2 * 2 * 8 * 2 + 3 * 2 * 4 * 8 * 4
    assert work.flops == 3 * 10 * 4 * 8 * 2 * 2


def test_a_decode_step_counts_weights_cache_logits_and_adapters() -> None:
    linears = 8 * 16 + 8 * 8 + 8 * 24 + 12 * 8
    assert sum(inputs * sum(slices) for inputs, slices in TINY.linears().values()) == linears
    base = decode_work(TINY, num_rows=3, context=5, adapters=0, rank=16, weight_bytes=1000, itemsize=2)
    cache = 3 * 5 * 2 * 1 * 4 * 2 * 2  # two layers
    assert base.bytes == 1000 + cache + 3 * 10 * 2
    assert base.flops == 2 * 3 * (2 * linears + 8 * 10) + 2 * (4 * 3 * 5 * 2 * 4)
    adapted = decode_work(TINY, 3, 5, adapters=2, rank=16, weight_bytes=1000, itemsize=2)
    one = 2 * 16 * ((3 * 8 + 16) + (8 + 8) + (2 * 8 + 24) + (12 + 8))
    assert adapted.bytes - base.bytes == 2 * one * 2
    assert adapted.flops - base.flops == 2 * 3 * one


def test_the_8b_shape_is_8b() -> None:
    weights = sum(inputs * sum(slices) for inputs, slices in LLAMA_8B.linears().values()) * LLAMA_8B.layers
    assert weights + 2 * LLAMA_8B.hidden * LLAMA_8B.vocabulary == pytest.approx(8.03e9, rel=0.001)


def test_pages_of_a_rank() -> None:
    assert [pages_of(rank) for rank in (1, 8, 16, 17, 64, 128)] == [1, 1, 1, 2, 4, 8]


@pytest.mark.parametrize(
    ("rows", "of_floor", "of_rate", "met"),
    [
        (1, 1.25, 0.0, True),
        (16, 1.26, 0.9, False),
        (17, 9.0, 0.0, None),
        (256, 9.0, 0.6, True),
        (4096, 1.0, 0.59, False),
    ],
)
def test_targets_of_a_product(rows: int, of_floor: float, of_rate: float, met: bool | None) -> None:
    assert product_target_met(rows, of_floor, of_rate) is met
