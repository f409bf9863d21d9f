"""Triton's own way to a compiled kernel, up to the compiler, which is a fake one: there is no device here."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from perseid_kernels.compilation import watch_compilation

DEVICE = SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: GPUTarget("cuda", 90, 32)
)


def _copy(source, target, size: tl.constexpr):
    places = tl.arange(0, size)
    tl.store(target + places, tl.load(source + places))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> JITFunction:
    """Compiled, not interpreted."""
    for hook in ("jit_cache_hook", "jit_post_compile_hook"):
        monkeypatch.setattr(triton.knobs.runtime, hook, None)
    monkeypatch.setattr(driver, "_active", DEVICE)
    return JITFunction(_copy)


def compile_for(kernel: JITFunction, seen: list[str], size: int) -> None:
    """As a launch does, without the launch."""

    def compile_(*_args, **_kwargs):
        seen.append("compiles")
        if size == 0:
            raise RuntimeError("no such kernel")
        return SimpleNamespace()

    kernel.device_caches[0]  # made at the first look
    kernel.compile = compile_
    kernel.warmup(torch.float32, torch.float32, size, grid=(1,))


def test_each_compilation_is_told_of_before_and_after_and_nothing_else_is(kernel: JITFunction) -> None:
    seen: list[str] = []
    watch_compilation(lambda: seen.append("began"), lambda: seen.append("ended"))
    compile_for(kernel, seen, 16)
    assert seen == ["began", "compiles", "ended"]
    compile_for(kernel, seen, 16)
    assert seen == ["began", "compiles", "ended"], "it is there already"
    compile_for(kernel, seen, 32)
    assert seen == ["began", "compiles", "ended"] * 2
    with pytest.raises(RuntimeError, match="no such kernel"):
        compile_for(kernel, seen, 0)
    assert seen[6:] == ["began", "compiles"]
