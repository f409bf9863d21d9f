"""The greedy choice: largest logit, lowest index among equals, NaN told."""

import pytest
import torch

from perseid_kernels.backend import Backend
from tests.kernels.cases import DEVICE


def chosen(backend: Backend, logits: torch.Tensor) -> tuple[list[float], list[int]]:
    values, indices = backend.best(logits.to(DEVICE))
    return values.tolist(), indices.tolist()


@pytest.mark.parametrize("width", [1, 7, 16, 17, 311, 2345])
def test_every_place_can_be_the_best(backend: Backend, rng: torch.Generator, width: int) -> None:
    logits = torch.randn(width, width, generator=rng)
    logits.fill_diagonal_(9.0)
    assert chosen(backend, logits) == ([9.0] * width, list(range(width)))


def test_the_lowest_of_equals(backend: Backend) -> None:
    logits = torch.zeros(3, 50)
    logits[0, [49, 20, 33]] = 2.0
    logits[1, [17, 16]] = 2.0
    assert chosen(backend, logits) == ([2.0, 2.0, 0.0], [20, 16, 0])


def test_negative_and_infinite(backend: Backend) -> None:
    logits = torch.full((3, 40), -5.0)
    logits[0, 39] = -4.0
    logits[1] = -torch.inf
    logits[2, 21] = torch.inf
    assert chosen(backend, logits) == ([-4.0, -torch.inf, torch.inf], [39, 0, 21])


@pytest.mark.parametrize("place", [0, 3, 16, 38, 39])
def test_nan_is_told_wherever_it_stands(backend: Backend, place: int) -> None:
    logits = torch.zeros(3, 40)
    logits[1, place] = torch.nan
    logits[1, 5] = torch.inf
    values, _ = backend.best(logits.to(DEVICE))
    assert values.isnan().tolist() == [False, True, False]


def test_no_rows(backend: Backend) -> None:
    assert chosen(backend, torch.empty(0, 8)) == ([], [])
