"""The request-level router is sure of prompts like those it was trained on, and of no others."""

import numpy as np
import pytest

from perseid_router.request_router import BASE, HASH_BITS, RequestRouter, bucket_of, count_buckets, ngram_hashes
from perseid_router.request_router_training import RouterSample, fit

HEAD, TAIL = tuple(range(10)), tuple(range(10, 15))
COMMON = range(20, 60)  # words that prompts of every kind have
UNKNOWN = range(5000, 9000)
NUM_ADAPTERS = 3
ALL = {0, 1, 2, BASE}


def words_of(kind: int) -> range:
    return range(100 + 50 * kind, 150 + 50 * kind)


def prompt(kind: int, random: np.random.Generator) -> tuple[int, ...]:
    """In the template: words of its kind, words that all have, and some that are in no other prompt."""
    body = [*random.choice(words_of(kind), 12), *random.choice(COMMON, 6), *random.choice(UNKNOWN, 2)]
    random.shuffle(body)
    return (*HEAD, *(int(word) for word in body), *TAIL)


def samples(seed: int, count: int = 60) -> list[RouterSample]:
    random = np.random.default_rng(seed)
    return [RouterSample(prompt(c % 4, random), BASE if c % 4 == 3 else c % 4) for c in range(4 * count)]


@pytest.fixture(scope="module")
def router() -> RequestRouter:
    return fit(samples(0), NUM_ADAPTERS)


def test_prompts_like_those_of_the_training_are_decided_and_right(router):
    decided = [(router.decide(each.token_ids, ALL), each.column) for each in samples(1, 50)]
    assert all(column in (None, truth) for column, truth in decided)
    assert sum(column == truth for column, truth in decided) > 0.8 * len(decided)


def test_prompts_of_unknown_words_are_left_to_the_token_gates(router):
    random = np.random.default_rng(2)
    for length in (1, 20, 300):
        for _ in range(30):
            body = tuple(int(word) for word in random.choice(UNKNOWN, length))
            assert router.decide((*HEAD, *body, *TAIL), ALL) is None


def test_a_few_known_words_among_unknown_ones_are_not_enough(router):
    random = np.random.default_rng(3)
    for kind in range(NUM_ADAPTERS):
        body = [*random.choice(words_of(kind), 4), *random.choice(UNKNOWN, 40)]
        assert router.decide((*HEAD, *(int(word) for word in body), *TAIL), ALL) is None


def test_prompts_that_ask_for_several_are_left_to_the_token_gates(router):
    random = np.random.default_rng(4)
    for kinds in ((0, 1), (1, 2), (2, 0), (0, 1, 2)):
        for _ in range(20):
            body = sum((prompt(kind, random)[len(HEAD) : -len(TAIL)] for kind in kinds), ())
            assert router.decide((*HEAD, *body, *TAIL), ALL) is None


def test_the_template_alone_tells_nothing(router):
    for tokens in ((*HEAD, *TAIL), HEAD, TAIL, ()):
        assert router.decide(tokens, ALL) is None


def test_what_is_not_allowed_is_not_given_to_another(router):
    random = np.random.default_rng(5)
    for kind, column in ((0, 0), (1, 1), (3, BASE)):
        found = [router.decide(prompt(kind, random), ALL - {column}) for _ in range(20)]
        assert found == [None] * 20
        assert any(router.decide(prompt(kind, random), {column}) == column for _ in range(5))


def test_a_seed_decides_everything():
    once, again, other = (fit(samples(0, 15), NUM_ADAPTERS, seed=seed, hash_bits=10) for seed in (3, 3, 4))
    assert once.config() == again.config()
    for name, values in once.tensors().items():
        assert np.array_equal(values, again.tensors()[name]), name
    assert not np.array_equal(once.weight, other.weight)


def test_without_prompts_of_the_base_it_is_never_chosen():
    router = fit([each for each in samples(0, 30) if each.column != BASE], NUM_ADAPTERS, hash_bits=12)
    random = np.random.default_rng(6)
    assert all(router.decide(prompt(3, random), ALL) is None for _ in range(20))
    assert any(router.decide(prompt(0, random), ALL) == 0 for _ in range(10))


def test_kinds_that_cannot_be_told_apart_are_not_decided():
    random = np.random.default_rng(7)
    mixed = [RouterSample(prompt(0, random), column) for column in (0, 1) for _ in range(60)]
    router = fit(mixed, 2, hash_bits=12)
    decided = [router.decide(prompt(0, random), {0, 1, BASE}) for _ in range(40)]
    assert sum(column is not None for column in decided) < 8


def test_it_is_small_and_comes_back_from_its_parts(router):
    again = RequestRouter.of(router.config(), router.tensors(), NUM_ADAPTERS)
    assert again.config() == router.config()
    assert (1 << HASH_BITS) * (12 * 2 + 2 * 4) < 1_500_000  # ten adapters: a float16 matrix, and two float32 columns
    halved = router.tensors() | {"weight": router.weight.astype("f2").astype("f4")}
    coarse = RequestRouter.of(router.config(), halved, NUM_ADAPTERS)
    for each in samples(8, 10):
        evidence, other = router.evidence(each.token_ids), coarse.evidence(each.token_ids)
        assert np.allclose(evidence.probabilities, other.probabilities, atol=0.01)


@pytest.mark.parametrize(
    ("changed", "words"),
    [([RouterSample((1, 2), 7)], "column 7"), ([RouterSample((1, 2), 0)] * 4, "column 0 has 4 prompts")],
)
def test_samples_that_cannot_train_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        fit(changed, 1)


def test_hashes_are_the_same_everywhere():
    """SplitMix64 from the state of a token: its first output for seed 0 is a published number."""
    assert hex(int(ngram_hashes([0])[0])) == "0xe220a8397b1dcdaf"
    hashes = ngram_hashes([3, 1, 4, 1, 5])
    assert len(hashes) == 5 + 4 + 3
    assert len(set(hashes.tolist())) == 11  # the token 1 is there twice
    assert len(ngram_hashes([])) == 0
    assert len(ngram_hashes([1, 2])) == 3


def test_buckets_count_every_ngram():
    buckets, counts = count_buckets([7, 7, 7, 7], 10)
    assert sorted(counts.tolist()) == [2, 3, 4]
    assert set(buckets.tolist()) == set(bucket_of(ngram_hashes([7, 7, 7]), 10).tolist())
