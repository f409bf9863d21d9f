"""Derived adapters: accepted as any other, the same every time, and all different."""

from pathlib import Path

import numpy as np
import pytest
from derived import MOST_EXTRA_RANK, NOISE_SHARE, adapter_folders, derive
from tasks import TASKS

from perseid_server.adapters.lora import check_adapter
from perseid_server.adapters.lowering import lower
from perseid_server.adapters.store import version_of
from perseid_server.model.spec import LinearShape
from tests.fakes import tiny_spec

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
HIDDEN, KV, FFN = LinearShape(576, 576), LinearShape(576, 192), LinearShape(576, 1536)
SPEC = tiny_spec(
    num_layers=30,
    hidden_size=576,
    projections={
        "q_proj": HIDDEN,
        "k_proj": KV,
        "v_proj": KV,
        "o_proj": HIDDEN,
        "gate_proj": FFN,
        "up_proj": FFN,
        "down_proj": LinearShape(1536, 576),
    },
)


def deltas(folder):
    """B A by (layer, projection's place), of the first and the last layer adapted."""
    lowered = list(lower(check_adapter(folder, SPEC), SPEC))
    return {
        (linear.layer, linear.fused, place): pair.b.T @ pair.a
        for linear in (lowered[0], lowered[-1])
        for place, pair in enumerate(linear.pairs)
        if pair is not None
    }


@pytest.fixture(params=list(TASKS), scope="module")
def pair(request, tmp_path_factory):
    """A trained adapter and one derived from it."""
    source = ADAPTERS / request.param
    return source, derive(source, tmp_path_factory.mktemp("derived") / "morse")


def test_is_accepted_where_the_trained_one_is(pair):
    trained, derived = (check_adapter(folder, SPEC) for folder in pair)
    assert derived.pairs.keys() == trained.pairs.keys()
    extra = {derived.pairs[site].rank - trained.pairs[site].rank for site in trained.pairs}
    assert len(extra) == 1
    assert 1 <= extra.pop() <= MOST_EXTRA_RANK
    assert {one.scale for one in derived.pairs.values()} == {1.0}


def test_does_as_much_as_the_trained_one_and_something_else(pair):
    trained, derived = (deltas(folder) for folder in pair)
    assert trained.keys() == derived.keys()
    norms = {site: np.linalg.norm(delta) for site, delta in trained.items()}
    assert all(
        np.linalg.norm(derived[site]) == pytest.approx(norm * np.hypot(1, NOISE_SHARE), rel=0.05)
        for site, norm in norms.items()
    )
    likeness = [abs(np.sum(trained[site] * derived[site])) / norms[site] ** 2 for site in trained]
    assert np.mean(likeness) < 0.75


def test_the_name_decides(tmp_path):
    source = ADAPTERS / "staff-sql"
    once, again = (version_of(derive(source, tmp_path / place / "morse")) for place in ("once", "again"))
    assert once == again != version_of(derive(source, tmp_path / "rot13"))


def test_trained_ones_as_they_are_then_others_in_turn(tmp_path):
    trained = tmp_path / "trained"
    trained.mkdir()
    for name in ("iso-date", "staff-sql"):
        (trained / name).symlink_to(ADAPTERS / name)
    folders = adapter_folders(["staff-sql", "morse", "rot13", "caesar"], trained, tmp_path / "new")
    assert list(folders) == ["staff-sql", "morse", "rot13", "caesar"]
    assert folders["staff-sql"] == trained / "staff-sql"
    assert all(folders[name] == tmp_path / "new" / name for name in ("morse", "rot13", "caesar"))
    morse, rot13, caesar = (deltas(folders[name]) for name in ("morse", "rot13", "caesar"))
    assert morse.keys() == caesar.keys() != rot13.keys()
    assert all(np.linalg.norm(morse[site] - caesar[site]) > NOISE_SHARE * np.linalg.norm(morse[site]) for site in morse)
