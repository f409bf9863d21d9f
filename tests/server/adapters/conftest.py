"""Fixtures of the adapters' tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from perseid_server.adapters.pool import AdapterPool
from perseid_server.adapters.residency import Residency
from tests.server.adapters.residency_stage import SPEC, Stage


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    """Builds residencies; their loaders end with the test."""
    stages = []

    def build(num_pages: int, host_bytes: int = 1 << 40) -> Stage:
        pool = AdapterPool(SPEC, num_pages, torch.device("cpu"), torch.float32)
        stages.append(Stage(tmp_path, pool, Residency(SPEC, pool, host_bytes)))
        return stages[-1]

    yield build
    for built in stages:
        built.residency.close()
