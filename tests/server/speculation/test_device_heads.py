"""Heads on the device: the same candidates in one call as op by op, from files of every layout."""

from pathlib import Path

import pytest
import torch

from perseid_kernels.backend import Backend
from perseid_kernels.draft_heads import HeadsDelta
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.segments import PageList, Segments
from perseid_kernels.weights import DenseWeight, take_rows
from perseid_server.model.spec import BaseSpec
from perseid_server.speculation.device_heads import DeviceHeads, OpByOp, place_heads
from perseid_server.speculation.draft import Candidates
from perseid_server.speculation.heads_config import MAX_HEADS, RANKS, HeadsConfig
from perseid_server.speculation.heads_file import check_heads
from tests.fakes import tiny_spec
from tests.server.model.passes import backend_named
from tests.server.speculation.heads_folders import medusa_v1, medusa_v2, vllm, write_heads

CPU = torch.device("cpu")
BASE = tiny_spec()
VOCABULARY = tuple(range(3, BASE.vocab_size, 5))
LAYOUTS = {
    "shared": (medusa_v2(), None),
    "two layers": (medusa_v2(num_layers=2), None),
    "no bias": (medusa_v2(bias=False), None),
    "draft vocabulary": (medusa_v2(num_layers=2), VOCABULARY),
    "an lm_head each": (medusa_v1(), None),
    "an lm_head each, draft vocabulary": (medusa_v1(), VOCABULARY),
    "an lm_head of their own": (vllm(shared=True), None),
}


def placed(folder: Path, backend: Backend, base: BaseSpec = BASE) -> DeviceHeads:
    lm_head = DenseWeight(torch.randn(base.vocab_size, base.hidden_size, generator=torch.Generator().manual_seed(1)))

    def pack_lm_head(rows: tuple[int, ...] | None) -> object:
        return backend.pack_draft(lm_head if rows is None else take_rows(lm_head, torch.tensor(rows)), CPU)

    return place_heads(check_heads(folder, base), backend, CPU, pack_lm_head)


class _OpByOpOnly:
    """A backend without heads in one call."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def fuse_heads(self, heads: object) -> None:
        """There is none."""

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)


def hidden_states(num_rows: int, base: BaseSpec = BASE) -> torch.Tensor:
    return torch.randn(num_rows, base.hidden_size, generator=torch.Generator().manual_seed(2)) / 4


def delta_for(num_rows: int) -> HeadsDelta:
    """An adapter that changes some heads' blocks, on every second row."""
    random = torch.Generator().manual_seed(3)
    slices = (BASE.hidden_size,) * MAX_HEADS
    pages = RankPages.of(
        torch.randn(2, 16 * MAX_HEADS, BASE.hidden_size, generator=random),
        torch.randn(2, 16, sum(slices), generator=random),
        slices,
    )
    segments = Segments.build([PageList.of((1,)) if row % 2 else None for row in range(num_rows)])
    assert segments is not None
    return HeadsDelta(pages, segments)


def assert_alike(first: list[Candidates], second: list[Candidates]) -> None:
    """Same probabilities by rank; same tokens but where two are as likely as each other."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for tokens, chances, others, expected in zip(
            one.token_ids, one.probabilities, other.token_ids, other.probabilities, strict=True
        ):
            assert chances == pytest.approx(expected, rel=1e-3, abs=1e-7)
            by_token = dict(zip(others, expected, strict=True))
            for token, chance in zip(tokens, chances, strict=True):
                assert by_token.get(token, expected[-1]) == pytest.approx(chance, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_call_as_op_by_op(tmp_path: Path, layout: str, with_delta: bool) -> None:
    tensors, vocabulary = LAYOUTS[layout]
    folder = write_heads(tmp_path, tensors, config=HeadsConfig(draft_vocabulary=vocabulary) if vocabulary else None)
    native = backend_named("native")
    hidden, delta = hidden_states(5), delta_for(5) if with_delta else None
    op_by_op = placed(folder, _OpByOpOnly(native))  # type: ignore[arg-type]
    proposed = placed(folder, native).propose(hidden, delta)
    assert_alike(proposed, op_by_op.propose(hidden, delta))
    tokens = [token for of_row in proposed for of_head in of_row.token_ids for token in of_head]
    assert set(tokens) <= set(vocabulary or range(BASE.vocab_size))
    assert len(tokens) == 5 * 3 * min(RANKS, len(vocabulary or range(BASE.vocab_size)))


@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("name", ["eager", "triton"])
def test_every_backend_says_the_same(tmp_path: Path, name: str, with_delta: bool) -> None:
    """These heads are too narrow to be rounded."""
    folder = write_heads(tmp_path, medusa_v2(num_layers=2))
    hidden, delta = hidden_states(5), delta_for(5) if with_delta else None
    expected = placed(folder, backend_named("native")).propose(hidden, delta)
    assert_alike(placed(folder, backend_named(name)).propose(hidden, delta), expected)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_rounded_heads_say_nearly_the_same(tmp_path: Path, num_layers: int) -> None:
    """The native backend holds them in 8 bits where their width allows it."""
    base = tiny_spec(hidden_size=32)
    tensors = {name: values / 8 for name, values in medusa_v2(num_layers=num_layers, base=base).items()}
    folder, hidden = write_heads(tmp_path, tensors), hidden_states(20, base)
    exact = placed(folder, backend_named("eager"), base).propose(hidden)
    rounded = placed(folder, backend_named("native"), base).propose(hidden)
    assert exact != rounded
    for one, other in zip(exact, rounded, strict=True):
        for chances, expected in zip(other.probabilities, one.probabilities, strict=True):
            assert chances == pytest.approx(expected, rel=0.1, abs=0.01)


def test_a_backend_without_it_goes_op_by_op(tmp_path: Path) -> None:
    heads = placed(write_heads(tmp_path), backend_named("eager"))
    assert isinstance(heads._ask, OpByOp)
    (candidates,) = heads.propose(torch.full((1, BASE.hidden_size), torch.nan))
    assert candidates.probabilities == [[0.0] * RANKS] * 3
