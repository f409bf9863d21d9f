"""Backends under test: each by its name, on the device the session tests on."""

import pytest
import torch

from perseid_kernels.backend import Backend
from perseid_kernels.eager_backend import EagerBackend
from perseid_kernels.triton_backend import TritonBackend
from tests.kernels.cases import DEVICE


@pytest.fixture
def rng() -> torch.Generator:
    """Random numbers that are the same in every run."""
    return torch.Generator().manual_seed(20240812)


@pytest.fixture(params=["eager", "triton"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """A float32 backend: eager, or Triton (through the interpreter unless TRITON_INTERPRET=0)."""
    return EagerBackend() if request.param == "eager" else TritonBackend(DEVICE, torch.float32)


@pytest.fixture
def triton_backend() -> TritonBackend:
    """The Triton backend alone, where a test is about its kernels."""
    return TritonBackend(DEVICE, torch.float32)
