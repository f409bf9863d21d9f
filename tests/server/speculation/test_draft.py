"""Growing trees: against all paths, sorted; merged with a repeated text."""

import itertools
import random
from math import prod

import pytest

from perseid_server.speculation.claims import Claim
from perseid_server.speculation.draft import NGRAM_CLAIMS, Candidates, Draft, DraftBuilder
from perseid_server.speculation.ngram import Match


def as_claimed(claim: Claim) -> float:
    return claim.probability


def paths(draft: Draft | None) -> dict[tuple[int, ...], float]:
    """Token path → value."""
    if draft is None:
        return {}
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tree.token_ids, draft.tree.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return dict(zip(found, draft.tree.values, strict=True))


def random_candidates(source: random.Random, heads: int, ranks: int) -> Candidates:
    tokens = [source.sample(range(100), ranks) for _ in range(heads)]
    chances = [sorted((source.random() / 2 for _ in range(ranks)), reverse=True) for _ in range(heads)]
    return Candidates(tokens, chances)


@pytest.mark.parametrize("num_nodes", [1, 5, 20, 63])
def test_the_likeliest_paths_are_taken(num_nodes: int) -> None:
    source = random.Random(num_nodes)
    for _ in range(20):
        candidates = random_candidates(source, 3, 4)
        builder = DraftBuilder(as_claimed)
        builder.add_heads(candidates, 63)
        draft = builder.build(num_nodes, 10)
        everything = {
            tuple(candidates.token_ids[head][rank] for head, rank in enumerate(ranks)): prod(
                candidates.probabilities[head][rank] for head, rank in enumerate(ranks)
            )
            for depth in (1, 2, 3)
            for ranks in itertools.product(range(4), repeat=depth)
        }
        best = sorted((value for value in everything.values() if value >= 0.01), reverse=True)[:num_nodes]
        assert sorted(paths(draft).values(), reverse=True) == pytest.approx(best)
        assert all(paths(draft)[path] == pytest.approx(everything[path]) for path in paths(draft))
        assert draft is not None
        assert list(draft.tree.values) == sorted(draft.tree.values, reverse=True), "any beginning is the best"


def test_no_deeper_than_the_request_can_take() -> None:
    builder = DraftBuilder(as_claimed)
    builder.add_heads(random_candidates(random.Random(0), 4, 3), 63)
    for depth in (1, 2):
        assert max(len(path) for path in paths(builder.build(63, depth))) == depth
    assert builder.build(63, 0) is None
    assert builder.build(0, 9) is None


def test_a_repeated_text_is_a_chain() -> None:
    builder = DraftBuilder(as_claimed)
    builder.add_match([1, 2, 3, 4, 5, 1, 2, 3], Match(3, 3), 4)
    first, further = NGRAM_CLAIMS[3]
    assert paths(builder.build(9, 9)) == pytest.approx(
        {(4,): first, (4, 5): first * further, (4, 5, 1): first * further**2, (4, 5, 1, 2): first * further**3}
    )


def test_sources_that_agree_share_nodes() -> None:
    """The node has the value of the more certain one, and both are held to it."""
    builder = DraftBuilder(as_claimed)
    builder.add_heads(Candidates([[4, 6], [9, 5]], [[0.7, 0.1], [0.5, 0.4]]), 10)
    builder.add_match([1, 2, 3, 4, 5, 1, 2, 3], Match(3, 3), 2)
    draft = builder.build(10, 10)
    assert draft is not None
    found = paths(draft)
    assert found[4,] == 0.7
    assert found[4, 5] == pytest.approx(0.7 * NGRAM_CLAIMS[3][1])
    assert found[4, 9] == pytest.approx(0.7 * 0.5)
    claims = dict(zip(found, draft.claims, strict=True))
    assert [claim.kind for claim in claims[4,]] == [("medusa", 0), ("ngram", 3, True)]
    assert [claim.kind for claim in claims[4, 9]] == [("medusa", 1)]


def test_experience_decides() -> None:
    builder = DraftBuilder(lambda claim: claim.probability * (0.1 if claim.kind == ("medusa", 0) else 1.0), 0.05)
    builder.add_heads(Candidates([[4], [5]], [[0.9], [0.5]]), 10)
    assert paths(builder.build(9, 9)) == pytest.approx({(4,): 0.09}), "what follows is below the least value"


def test_broken_heads_draft_nothing() -> None:
    builder = DraftBuilder(as_claimed)
    builder.add_heads(Candidates([[1, 2]], [[0.0, 0.0]]), 10)
    builder.add_heads(Candidates([], []), 10)
    assert builder.build(9, 9) is None
