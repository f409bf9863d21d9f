"""Pages: taken all or none, given back, and written without touching their neighbours."""

from dataclasses import replace

import pytest
import torch

from perseid_kernels.segments import PAGE_RANK
from perseid_server.adapters.lora import check_adapter
from perseid_server.adapters.lowering import LoweredLinear, lower
from perseid_server.adapters.pool import AdapterPool
from perseid_server.model.spec import FUSED_LINEARS
from tests.fakes import tiny_spec
from tests.server.adapters.folders import write_adapter

SPEC = tiny_spec()
SENTINEL = 7.0


def new_pool(num_pages: int = 4, dtype: torch.dtype = torch.float32) -> AdapterPool:
    return AdapterPool(SPEC, num_pages, torch.device("cpu"), dtype)


def all_tensors(pool: AdapterPool) -> list[torch.Tensor]:
    held = [pages for layer in pool.layers for pages in layer.values()]
    return [tensor for pages in (*held, pool.heads) for tensor in (pages.a, pages.b, pages.live)]


def fill(pool: AdapterPool) -> None:
    """Every page holds an adapter of full rank."""
    for layer in pool.layers:
        for pages in layer.values():
            pages.a.fill_(SENTINEL)
            pages.b.fill_(SENTINEL)
            pages.live.fill_(PAGE_RANK)


@pytest.fixture
def linears(tmp_path) -> tuple[LoweredLinear, ...]:
    """An adapter of two pages that leaves some linears alone."""
    return tuple(lower(check_adapter(write_adapter(tmp_path, rank=20), SPEC), SPEC))


def test_pages_are_taken_all_or_none():
    pool = new_pool(4)
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    first = pool.allocate(3)
    assert first is not None
    assert len(set(first)) == 3
    assert pool.allocate(2) is None
    assert pool.num_free == 1


def test_freed_pages_are_used_again():
    pool = new_pool(2)
    pages = pool.allocate(2)
    assert pages is not None
    pool.free(pages[:1])
    assert pool.allocate(1) == pages[:1]


def test_pages_that_were_written_before_are_taken_first():
    """A page takes memory when it is first written: adapters that come and go must not walk through the whole pool."""
    pool = new_pool(64)
    kept = pool.allocate(3)
    used: set[int] = set()
    for count in (1, 2, 3, 2, 1) * 20:
        pages = pool.allocate(count)
        assert kept is not None
        assert pages is not None
        assert not set(pages) & set(kept)
        used |= set(pages)
        pool.free(pages)
    assert len(used) == 3


def test_a_page_number_means_the_same_in_every_layer_and_linear():
    for tensor in all_tensors(new_pool(5)):
        assert tensor.shape[0] == 5
    pool = new_pool(5)
    for fused, parts in FUSED_LINEARS.items():
        shape = SPEC.fused_shape(fused)
        assert pool.layers[0][fused].a.shape == (5, PAGE_RANK * len(parts), shape.in_features)
        assert pool.layers[0][fused].b.shape == (5, PAGE_RANK, shape.out_features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_per_page_is_what_a_page_takes(dtype):
    pool = new_pool(3, dtype)
    assert sum(tensor.nbytes for tensor in all_tensors(pool)) == 3 * AdapterPool.bytes_per_page(SPEC, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writing_fills_the_given_pages_in_the_given_order(dtype, linears):
    pool = new_pool(4, dtype)
    pool.write((3, 1), linears)
    for linear in linears:
        for page, position in ((3, 0), (1, 1)):
            stored = pool.layers[linear.layer][linear.fused]
            for tensor, values in ((stored.a, linear.a), (stored.b, linear.b)):
                assert torch.equal(tensor[page], torch.from_numpy(values[position]).to(dtype))


def test_writing_leaves_other_pages_alone_and_clears_what_is_not_adapted(linears):
    pool = new_pool(4)
    fill(pool)
    before = [tensor.clone() for tensor in all_tensors(pool)]
    pool.write((0, 2), linears)
    for tensor, was in zip(all_tensors(pool), before, strict=True):
        assert torch.equal(tensor[[1, 3]], was[[1, 3]])
    adapted = {(linear.layer, linear.fused) for linear in linears}
    for layer in range(SPEC.num_layers):
        for fused in FUSED_LINEARS:
            if (layer, fused) not in adapted:
                stored = pool.layers[layer][fused]
                assert not any(tensor[[0, 2]].any() for tensor in (stored.a, stored.b, stored.live))
    assert {fused for _, fused in adapted} < set(FUSED_LINEARS), "the adapter leaves something alone"


def test_a_page_that_is_written_again_holds_nothing_of_before(linears):
    pool = new_pool(2)
    fill(pool)
    nothing = [replace(linear, pairs=(None,) * len(linear.pairs)) for linear in linears]
    pool.write((0, 1), nothing)
    assert not any(tensor.any() for tensor in all_tensors(pool))
