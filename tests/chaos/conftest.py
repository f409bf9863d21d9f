"""Every fault has a short form over the fake model and, where a model can make a difference, a long one over the real
small base (`make chaos`).
"""

from pathlib import Path

import pytest

from tests.chaos.sites import Site, fake_site, real_site


@pytest.fixture
def fake(tmp_path: Path) -> Site:
    """The fake model: what happens between processes, or on a disk, is the same with any."""
    return fake_site(tmp_path / "site")


@pytest.fixture(params=["fake", pytest.param("real", marks=[pytest.mark.chaos, pytest.mark.timeout(900)])])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    """What the fault happens to."""
    return (fake_site if request.param == "fake" else real_site)(tmp_path / "site")
