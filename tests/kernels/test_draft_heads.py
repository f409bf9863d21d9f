"""Medusa heads in one call: the definition's candidates, whatever the heads look like and whoever else asks."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from perseid_kernels.backend import Backend
from perseid_kernels.draft_heads import (
    DraftBlock,
    Drafted,
    DraftHeads,
    FusedHeads,
    HeadsDelta,
    draft_logits_oracle,
    likeliest,
)
from perseid_kernels.expand import expand_oracle
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.segments import Segments
from perseid_kernels.shrink import shrink_oracle
from perseid_kernels.weights import DenseWeight, Weight
from tests.kernels.cases import int4_weight, int8_weight, lora_pool, random_page_lists

CPU = torch.device("cpu")
WIDTH, MOST_HEADS, NUM_PAGES = 96, 5, 20


@dataclass(frozen=True)
class Case:
    """Sizes of some heads."""

    num_heads: int = 3
    num_layers: int = 2
    vocab_size: int = 311
    own_lm_heads: bool = False
    has_bias: bool = True
    has_vocabulary: bool = False
    num_candidates: int = 10


CASES = [
    Case(),
    Case(num_heads=1, num_layers=1, has_bias=False),
    Case(num_heads=5, num_layers=3, vocab_size=10),
    Case(own_lm_heads=True, vocab_size=64, has_vocabulary=True),
    Case(num_heads=4, num_layers=1, vocab_size=2345, has_vocabulary=True),
    Case(num_layers=1, vocab_size=3, num_candidates=3),
    Case(vocab_size=40, num_candidates=1),
]


def random_heads(rng: torch.Generator, case: Case, lm_head: Weight | None = None) -> DraftHeads:
    """Canonical weights; those of the further blocks in float16, as published heads have them."""

    def block(num_heads: int, dtype: torch.dtype) -> DraftBlock:
        values = torch.randn(num_heads * WIDTH, WIDTH, generator=rng) / WIDTH**0.5
        bias = torch.randn(num_heads * WIDTH, generator=rng) if case.has_bias else None
        return DraftBlock(DenseWeight(values.to(dtype)), bias)

    num_lm_heads = case.num_heads if case.own_lm_heads else 1
    shape = (case.vocab_size, WIDTH)
    return DraftHeads(
        num_heads=case.num_heads,
        first=block(case.num_heads, torch.float32),
        further=[[block(1, torch.float16) for _ in range(case.num_heads)] for _ in range(case.num_layers - 1)],
        lm_heads=[lm_head or DenseWeight(torch.randn(shape, generator=rng) / 4) for _ in range(num_lm_heads)],
        vocabulary_V=torch.arange(case.vocab_size) * 3 + 1 if case.has_vocabulary else None,
        num_candidates=case.num_candidates,
    )


def fused(backend: Backend, heads: DraftHeads, *, exact: bool = True) -> FusedHeads:
    """The same heads in the backend's layouts, in one call."""
    pack_weight = backend.pack if exact else backend.pack_draft

    def pack(block: DraftBlock) -> DraftBlock:
        return DraftBlock(pack_weight(block.weight, CPU), block.bias_N)

    call = backend.fuse_heads(
        DraftHeads(
            heads.num_heads,
            pack(heads.first),
            [[pack(block) for block in layer] for layer in heads.further],
            [pack_weight(weight, CPU) for weight in heads.lm_heads],
            heads.vocabulary_V,
            heads.num_candidates,
        )
    )
    assert call is not None
    return call


def assert_likeliest(drafted: Drafted, logits_SHV: Tensor, heads: DraftHeads) -> None:
    """The K likeliest, up to what rounding can turn round: each rank has its probability, and its token has it too."""
    expected = likeliest(logits_SHV, heads.num_candidates, heads.vocabulary_V)
    tolerance = {"rtol": 1e-3, "atol": 1e-7}
    torch.testing.assert_close(drafted.probabilities_SHK, expected.probabilities_SHK, **tolerance)
    tokens = drafted.token_ids_SHK
    places = tokens if heads.vocabulary_V is None else torch.searchsorted(heads.vocabulary_V, tokens)
    chances = logits_SHV.softmax(dim=-1).gather(-1, places)
    torch.testing.assert_close(chances, expected.probabilities_SHK, **tolerance)
    assert all(len(set(of_head)) == heads.num_candidates for of_row in tokens.tolist() for of_head in of_row)


def random_delta(rng: torch.Generator, num_rows: int) -> HeadsDelta:
    """Pages for more heads than the ones under test have."""
    slices = (WIDTH,) * MOST_HEADS
    a, b = lora_pool(rng, NUM_PAGES, WIDTH, slices)
    segments = Segments.build(random_page_lists(rng, num_rows, NUM_PAGES))
    assert segments is not None
    return HeadsDelta(RankPages.of(a, b, slices), segments)


def added(delta: HeadsDelta, hidden: Tensor) -> Tensor:
    """What adapters add to the outputs of all the heads that may be."""
    pages, nothing = delta.pages, torch.zeros(hidden.shape[0], WIDTH * MOST_HEADS)
    return expand_oracle(shrink_oracle(hidden, pages.a, delta.segments), pages.b, pages.slices, delta.segments, nothing)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 70])
@pytest.mark.parametrize("case", CASES)
def test_the_definition(native_backend: Backend, rng: torch.Generator, case: Case, num_rows: int) -> None:
    heads = random_heads(rng, case)
    hidden = torch.randn(num_rows, WIDTH, generator=rng)
    assert_likeliest(fused(native_backend, heads)(hidden), draft_logits_oracle(heads, hidden), heads)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_packed_lm_heads(native_backend: Backend, rng: torch.Generator, kind: str) -> None:
    lm_head = int4_weight(rng, 311, WIDTH, 32, "q4_1") if kind == "int4" else int8_weight(rng, 311, WIDTH, 32)
    heads = random_heads(rng, Case(), lm_head)
    hidden = torch.randn(3, WIDTH, generator=rng) / 8
    assert_likeliest(fused(native_backend, heads)(hidden), draft_logits_oracle(heads, hidden), heads)


@pytest.mark.parametrize("case", [Case(), Case(num_heads=MOST_HEADS, num_layers=1, has_bias=False)])
def test_adapters_change_the_first_blocks(native_backend: Backend, rng: torch.Generator, case: Case) -> None:
    heads, delta = random_heads(rng, case), random_delta(rng, 11)
    hidden = torch.randn(11, WIDTH, generator=rng) / 8
    change = added(delta, hidden)[:, : case.num_heads * WIDTH]
    assert change.abs().max() > 0.1
    assert_likeliest(fused(native_backend, heads)(hidden, delta), draft_logits_oracle(heads, hidden, change), heads)


@pytest.mark.parametrize("case", [Case(), Case(own_lm_heads=True)])
def test_rows_do_not_depend_on_one_another(native_backend: Backend, rng: torch.Generator, case: Case) -> None:
    ask = fused(native_backend, random_heads(rng, case))
    hidden = torch.randn(70, WIDTH, generator=rng)
    together = ask(hidden)
    for row in (0, 1, 33, 69):
        alone = ask(hidden[row : row + 1])
        assert torch.equal(together.probabilities_SHK[row], alone.probabilities_SHK[0])
        assert torch.equal(together.token_ids_SHK[row], alone.token_ids_SHK[0])


def test_a_row_without_adapter_is_as_if_there_were_none(native_backend: Backend, rng: torch.Generator) -> None:
    ask, delta = fused(native_backend, random_heads(rng, Case())), random_delta(rng, 11)
    hidden = torch.randn(11, WIDTH, generator=rng)
    plain, changed = ask(hidden), ask(hidden, delta)
    is_plain = torch.ones(11, dtype=torch.bool)
    is_plain[delta.segments.rows.long()] = False
    assert 0 < int(is_plain.sum()) < 11
    assert torch.equal(plain.probabilities_SHK[is_plain], changed.probabilities_SHK[is_plain])
    assert not torch.equal(plain.probabilities_SHK[~is_plain], changed.probabilities_SHK[~is_plain])


def chosen(backend: Backend, logits: Tensor, num_candidates: int = 4) -> Drafted:
    """From these logits [V]: the only head's lm_head has them in its first column, and x there is 1."""
    lm_head = torch.zeros(logits.shape[0], WIDTH)
    lm_head[:, 0] = logits
    nothing = DraftBlock(DenseWeight(torch.zeros(WIDTH, WIDTH)), None)
    heads = DraftHeads(1, nothing, [], [DenseWeight(lm_head)], None, num_candidates)
    return fused(backend, heads)(torch.eye(1, WIDTH))


def test_of_equal_ones_the_first(native_backend: Backend) -> None:
    logits = torch.zeros(100)
    logits[[99, 17, 40, 64, 50]] = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0])
    assert chosen(native_backend, logits).token_ids_SHK.tolist() == [[[99, 17, 40, 50]]]
    assert chosen(native_backend, torch.zeros(100)).token_ids_SHK.tolist() == [[[0, 1, 2, 3]]]


@pytest.mark.parametrize("width", [4, 5, 16, 19, 20, 21, 36, 133])
def test_every_place_can_be_the_likeliest(native_backend: Backend, width: int) -> None:
    for place in range(width):
        logits = torch.arange(width) / -100.0
        logits[place] = 3.0
        drafted = chosen(native_backend, logits)
        others = [other for other in range(width) if other != place]
        assert drafted.token_ids_SHK.tolist() == [[[place, *others[:3]]]]
        torch.testing.assert_close(drafted.probabilities_SHK[0, 0, 0], logits.softmax(0)[place])


@pytest.mark.parametrize("exact", [True, False])
def test_as_drafts_are_packed(native_backend: Backend, rng: torch.Generator, exact: bool) -> None:
    """Less exactly perhaps, but not by much, and the same in any batch."""
    heads = random_heads(rng, Case(num_heads=4))
    hidden = torch.randn(50, WIDTH, generator=rng)
    ask = fused(native_backend, heads, exact=exact)
    drafted, alone = ask(hidden), ask(hidden[7:8])
    assert torch.equal(drafted.token_ids_SHK[7], alone.token_ids_SHK[0])
    assert torch.equal(drafted.probabilities_SHK[7], alone.probabilities_SHK[0])
    chances = draft_logits_oracle(heads, hidden).softmax(dim=-1)
    found = chances.gather(-1, drafted.token_ids_SHK)
    assert (found - drafted.probabilities_SHK).abs().max() < (1e-5 if exact else 0.06)
    assert found.sum() > (1 - 1e-6 if exact else 0.99) * chances.topk(10).values.sum()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_broken_numbers_make_no_candidates(
    native_backend: Backend, rng: torch.Generator, broken: float, exact: bool
) -> None:
    """And do no harm to the other rows."""
    heads = random_heads(rng, Case(has_vocabulary=True))
    ask, hidden = fused(native_backend, heads, exact=exact), torch.randn(3, WIDTH, generator=rng)
    sound = ask(hidden)
    hidden[1, 5] = broken
    drafted = ask(hidden)
    assert not drafted.probabilities_SHK[1].any()
    assert set(drafted.token_ids_SHK[1].flatten().tolist()) <= set(heads.vocabulary_V.tolist())
    for row in (0, 2):
        assert torch.equal(drafted.probabilities_SHK[row], sound.probabilities_SHK[row])
        assert torch.equal(drafted.token_ids_SHK[row], sound.token_ids_SHK[row])


@pytest.mark.parametrize("place", [0, 3, 4, 70, 99])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_logit(native_backend: Backend, place: int, broken: float) -> None:
    """Of one token, wherever it stands: told by a broken weight."""
    logits = torch.zeros(100)
    logits[place] = broken
    for drafted in (chosen(native_backend, logits), likeliest(logits[None, None], 4)):
        assert drafted.probabilities_SHK.tolist() == [[[0.0] * 4]]
        assert len(set(drafted.token_ids_SHK.flatten().tolist())) == 4


def test_impossible_tokens(native_backend: Backend) -> None:
    """−∞ is a logit like others, as long as not all are."""
    logits = torch.full((100,), -torch.inf)
    logits[[40, 7]] = torch.tensor([1.0, 0.0])
    for drafted in (chosen(native_backend, logits), likeliest(logits[None, None], 4)):
        assert drafted.token_ids_SHK[0, 0, :2].tolist() == [40, 7]
        torch.testing.assert_close(drafted.probabilities_SHK[0, 0], torch.tensor([0.731059, 0.268941, 0.0, 0.0]))
        assert len(set(drafted.token_ids_SHK.flatten().tolist())) == 4


def test_no_rows(native_backend: Backend, rng: torch.Generator) -> None:
    drafted = fused(native_backend, random_heads(rng, Case()))(torch.empty(0, WIDTH))
    assert drafted.token_ids_SHK.shape == drafted.probabilities_SHK.shape == (0, 3, 10)
