"""Triton compiles a kernel when it is first launched with arguments of a new kind, which takes seconds: whoever would
take that for a hang must be told.
"""

from collections.abc import Callable
from typing import Any

from perseid_kernels._triton import triton


def watch_compilation(began: Callable[[], None], ended: Callable[[], None]) -> None:
    """Have these called before and after each compilation in this process, on the thread that compiles. After one that
    fails, nothing is called. They take the place of those that were set before."""
    runtime = triton.knobs.runtime
    runtime.jit_cache_hook = _hook(began)
    runtime.jit_post_compile_hook = _hook(ended)


def _hook(tell: Callable[[], None]) -> Callable[..., bool]:
    def hook(**_: Any) -> bool:
        tell()
        return False  # True would keep Triton from compiling

    return hook
