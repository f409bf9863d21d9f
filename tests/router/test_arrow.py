"""Arrow's directions are those of the full SVD of the product; its logits are comparable with the base's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseid_router.arrow import GAIN, THRESHOLD, arrow_gate, direction


def pair(rank: int, inputs: int, outputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=(rank, inputs)).astype("f4"), random.normal(size=(rank, outputs)).astype("f4")


def svd_direction(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the right singular vectors of the formed product, all singular values)"""
    _, values, vectors = np.linalg.svd(b.astype("f8").T @ a.astype("f8"))
    return vectors, values


def assert_is_top(v: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    vectors, _ = svd_direction(a, b)
    assert abs(vectors[0] @ v) == pytest.approx(1, abs=1e-12)
    assert v[np.abs(v).argmax()] > 0


@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(1, 8, 4), (4, 8, 16), (32, 40, 24), (12, 8, 8), (8, 30, 3)])
def test_the_direction_is_the_full_svds(rank, inputs, outputs):
    for seed in range(5):
        a, b = pair(rank, inputs, outputs, seed)
        v = direction(a, b)
        assert v is not None
        assert_is_top(v, a, b)


def test_scales_of_any_size_do_not_matter():
    a, b = pair(4, 8, 16)
    plain = direction(a, b)
    for scale_a, scale_b in ((1e30, 1e30), (1e-30, 1e-30), (1e-30, 1e35)):
        assert np.allclose(direction(a * np.float32(scale_a), b * np.float32(scale_b)), plain, atol=1e-6)


def test_rows_that_are_zero_or_repeated_are_no_matter():
    a, b = pair(4, 8, 16)
    for changed in ((np.vstack([a, 0 * a]), np.vstack([b, b])), (np.vstack([a, a[:1]]), np.vstack([b, b[:1]]))):
        v = direction(*changed)
        assert v is not None
        assert_is_top(v, *changed)


def test_a_product_of_zero_has_no_direction():
    a, b = pair(4, 8, 16)
    meets_nothing = np.array([[1, 0], [0, 0]], "f4"), np.array([[0, 0], [0, 1]], "f4")
    for changed in ((a, 0 * b), (0 * a, b), meets_nothing, (a[:0], b[:0])):
        assert direction(*changed) is None
        assert arrow_gate(*changed) is None


@given(rank=st.integers(1, 6), inputs=st.integers(1, 9), outputs=st.integers(1, 9), seed=st.integers(0, 10_000))
def test_the_direction_answers_as_strongly_as_any(rank, inputs, outputs, seed):
    """With equal singular values there is more than one; the gain along it is always the largest."""
    a, b = pair(rank, inputs, outputs, seed)
    a, b = np.round(a), np.round(b)  # repeated and vanishing singular values
    v = direction(a, b)
    _, values = svd_direction(a, b)
    if v is None:
        assert values[0] == 0
    else:
        assert np.linalg.norm(b.T @ (a @ v)) == pytest.approx(values[0], rel=1e-9)
        assert np.linalg.norm(v) == pytest.approx(1)


@pytest.mark.parametrize("known", [True, False])
def test_ordinary_inputs_have_the_same_mean_logit_whatever_the_direction(known):
    random = np.random.default_rng(1)
    spread = np.exp(random.normal(size=64)).astype("f4") if known else np.ones(64, "f4")
    x = random.normal(size=(40_000, 64)).astype("f4") * spread
    for seed in range(4):
        gate = arrow_gate(*pair(4, 64, 16, seed), np.square(spread) if known else None)
        assert gate is not None
        logits = np.abs(x @ gate.weight) + gate.bias
        assert logits.mean() == pytest.approx(GAIN * (1 - THRESHOLD), abs=0.05)
        assert (logits > 0).mean() == pytest.approx(0.11, abs=0.01)  # as the docstring says


def test_gain_and_threshold_are_folded_in():
    a, b = pair(4, 8, 16)
    v = direction(a, b)
    gate = arrow_gate(a, b, np.full(8, 9, "f4"), gain=3, threshold=1.5)
    assert gate is not None
    scale = np.sqrt(2 / np.pi) * 3
    x = np.random.default_rng(0).normal(size=8).astype("f4")
    assert abs(x @ gate.weight) + gate.bias == pytest.approx(3 * (abs(x @ v) / scale - 1.5), rel=1e-5)


def test_a_direction_along_which_no_input_lies_is_no_evidence():
    assert arrow_gate(*pair(4, 8, 16), np.zeros(8, "f4")) is None
