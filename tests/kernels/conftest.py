"""Backends under test: each by its name, on the device the session tests on."""

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from perseid_kernels.backend import Backend
from perseid_kernels.eager_backend import EagerBackend
from perseid_kernels.native import load_native_backend
from perseid_kernels.triton_backend import TritonBackend
from tests.kernels.cases import DEVICE, INTERPRETED
from tests.tools import require_tool


@pytest.fixture
def rng() -> torch.Generator:
    """Random numbers that are the same in every run."""
    return torch.Generator().manual_seed(20240812)


@pytest.fixture(params=["eager", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """A float32 backend: eager, native, or Triton (through the interpreter unless TRITON_INTERPRET=0)."""
    if request.param == "eager":
        return EagerBackend()
    if request.param == "native":
        return request.getfixturevalue("native_backend")
    return TritonBackend(DEVICE, torch.float32)


@pytest.fixture
def native_backend() -> Backend:
    """The C++ backend; needs a compiler and tensors on the CPU."""
    if DEVICE.type != "cpu":
        pytest.skip("the native backend computes on the CPU; this session tests on a GPU")
    native = load_native_backend()
    if native is None:
        require_tool("c++", "Debian: g++")
    assert native is not None
    return native


@pytest.fixture
def triton_backend() -> TritonBackend:
    """The Triton backend alone, where a test is about its kernels."""
    return TritonBackend(DEVICE, torch.float32)


@pytest.fixture
def ordered_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tl.dot` that adds the products of an element one after the other, whatever the tile's shape.

    On a tensor core an element's sum over K does not depend on how wide the tile is. The interpreter's `tl.dot` is
    numpy's BLAS, which picks its loops by the shape.
    """

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data.copy()
        for k in range(a.data.shape[1]):
            total += a.data[:, k : k + 1] * b.data[k : k + 1]
        assert total.dtype == np.float32
        return interpreter.TensorHandle(total, d.dtype.scalar)

    if INTERPRETED:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
