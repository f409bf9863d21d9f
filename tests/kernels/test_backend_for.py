"""Which backend a device gets."""

import sys
from types import ModuleType

import pytest
import torch

from perseid_kernels import backend as backend_module
from perseid_kernels.backend import backend_for
from perseid_kernels.eager_backend import EagerBackend
from perseid_kernels.triton_backend import TritonBackend


def install_native(monkeypatch: pytest.MonkeyPatch, native: object) -> list[str]:
    """As if the native library's loader returned `native`. What it is asked for is put into the list returned."""
    asked: list[str] = []

    def load(activations: str) -> object:
        asked.append(activations)
        return native

    module = ModuleType("perseid_kernels.native")
    module.load_native_backend = load
    monkeypatch.setitem(sys.modules, "perseid_kernels.native", module)
    return asked


def test_cpu_gets_the_native_library_where_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    native = object()
    asked = install_native(monkeypatch, native)
    assert backend_for(torch.device("cpu")) is native
    assert backend_for(torch.device("cpu"), activations="int8") is native
    assert asked == ["exact", "int8"]


def test_cpu_without_a_compiler_gets_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    install_native(monkeypatch, None)
    backend = backend_for(torch.device("cpu"))
    assert isinstance(backend, EagerBackend)
    assert backend.compute_dtype == torch.float32


def test_cuda_gets_triton_in_bfloat16_unless_told() -> None:
    backend = backend_for(torch.device("cuda"))
    assert isinstance(backend, TritonBackend)
    assert backend.compute_dtype == torch.bfloat16
    assert backend_for(torch.device("cuda"), torch.float16).compute_dtype == torch.float16


def test_cuda_without_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"perseid\[gpu\]"):
        backend_for(torch.device("cuda"))


def test_what_nobody_serves_is_refused() -> None:
    with pytest.raises(ValueError, match="device meta"):
        backend_for(torch.device("meta"))
    with pytest.raises(ValueError, match="compute_dtype torch"):
        backend_for(torch.device("cpu"), torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter"):
        TritonBackend(torch.device("cpu"), torch.bfloat16)
