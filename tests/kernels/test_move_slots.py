"""Slots that move, in all layers at once, against one move at a time."""

import pytest
import torch
from torch import Tensor

from perseid_kernels.backend import Backend, SlotMoves
from perseid_kernels.move_slots import move_slots_oracle
from perseid_kernels.triton_backend import TritonBackend
from tests.kernels.cases import DEVICE

NUM_BLOCKS, BLOCK_SIZE = 6, 16

# Paths of (source, target). The first paths' targets are sources of moves before them: a slot must be read before it is
# written. Blocks lie in any order, so a path's slots go up and down.
CHAINED = [(4, 1), (5, 2), (9, 4), (11, 5), (15, 9), (80, 11), (83, 15), (16, 80)]
PATHS = {
    "one move": [[(7, 3)]],
    "a target that was a source": [CHAINED],
    "several paths": [CHAINED, [(40, 38)], [(50, 48), (52, 49), (60, 50)], [(95, 0)]],
}


def moves_of(paths: list[list[tuple[int, int]]]) -> SlotMoves:
    sources, targets = zip(*[move for path in paths for move in path], strict=True)
    indptr = torch.tensor([0, *(len(path) for path in paths)]).cumsum(0).to(torch.int32)
    return SlotMoves(torch.tensor(sources).to(DEVICE), torch.tensor(targets).to(DEVICE), indptr.to(DEVICE))


def caches(rng: torch.Generator, layers: int, width: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    shape = (NUM_BLOCKS, BLOCK_SIZE, *width)
    return tuple(torch.randn(shape, generator=rng).to(dtype).to(DEVICE) for _ in range(layers))


def assert_moves(backend: Backend, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], moves: SlotMoves) -> None:
    expected = [move_slots_oracle(cache, moves) for cache in (*keys, *values)]
    assert not any(torch.equal(new, old) for new, old in zip(expected, (*keys, *values), strict=True))
    backend.move_slots(keys, values, moves)
    for cache, new in zip((*keys, *values), expected, strict=True):
        assert torch.equal(cache, new)


@pytest.mark.parametrize("case", PATHS)
@pytest.mark.parametrize("width", [(3, 64), (1, 40)])
def test_moves_are_done_in_order(backend: Backend, rng: torch.Generator, case: str, width: tuple[int, int]) -> None:
    keys, values = (caches(rng, 3, width, torch.float32) for _ in range(2))
    assert_moves(backend, keys, values, moves_of(PATHS[case]))


def test_wide_slots_of_many_layers_are_shared_out(backend: Backend, rng: torch.Generator) -> None:
    """More than a program, and than a task, takes at once."""
    keys, values = (caches(rng, 5, (16, 96), torch.float32) for _ in range(2))
    assert_moves(backend, keys, values, moves_of(PATHS["several paths"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_caches_of_sixteen_bits(triton_backend: TritonBackend, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Moved as integers, which the interpreter gets right for bfloat16 too."""
    keys, values = (caches(rng, 2, (2, 24), dtype) for _ in range(2))
    assert_moves(triton_backend, keys, values, moves_of(PATHS["several paths"]))


def test_each_set_of_caches_has_its_own_table(backend: Backend, rng: torch.Generator) -> None:
    moves = moves_of(PATHS["one move"])
    for _ in range(3):
        keys, values = (caches(rng, 2, (2, 32), torch.float32) for _ in range(2))
        assert_moves(backend, keys, values, moves)
        assert_moves(backend, values[:1], keys[:1], moves_of([[(9, 8)]]))


def test_the_oracle_by_hand() -> None:
    cache = torch.arange(8.0).view(2, 4, 1, 1)
    moved = move_slots_oracle(cache, SlotMoves(torch.tensor([3, 5]), torch.tensor([1, 3]), torch.tensor([0, 2])))
    assert moved.flatten().tolist() == [0, 3, 2, 5, 4, 5, 6, 7]
    assert cache.flatten().tolist() == list(range(8))
