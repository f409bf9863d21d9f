"""The functions of the compiled library, with the types of their arguments as `ops.h` has them."""

import ctypes
from collections.abc import Callable

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "matmul": (_POINTER, _POINTER, _INT, _INT, _POINTER, _INT),
    "embed": (_POINTER, _POINTER, _INT, _POINTER),
    "add_lora": (_POINTER, _INT, _INT, *[_POINTER] * 4, _INT, *[_POINTER] * 5, _INT, _POINTER, _INT),
    "add_routed": (_POINTER, _INT, _INT, *[_POINTER] * 4, _INT, *[_POINTER] * 3, _INT),
    "rms_norm": (_POINTER, *[_INT] * 5, _POINTER, _FLOAT, _POINTER),
    "add_rms_norm": (_POINTER, _POINTER, _INT, _INT, _POINTER, _FLOAT, _POINTER),
    "silu_mul": (_POINTER, _INT, _INT, _INT, _POINTER),
    "rope_and_store": (_POINTER, _INT, _POINTER, _INT, _POINTER, _INT, *[_INT] * 4, *[_POINTER] * 6),
    "attention": (_POINTER, _INT, *[_POINTER] * 5, _INT, _INT, _POINTER, *[_INT] * 4, _FLOAT, _POINTER, _INT),
    "move_slots": (_POINTER, _INT, _INT, _POINTER, _POINTER, _INT),
    "best": (_POINTER, _INT, _INT, _POINTER, _POINTER),
    "forward": (_POINTER, _POINTER),
    "draft": (_POINTER, _POINTER),
    "set_profile": (_POINTER,),
    "set_num_threads": (_INT,),
}


def function(library: ctypes.CDLL, name: str) -> Callable[..., None]:
    """An op of the library. The GIL is free while it runs."""
    found: Callable[..., None] = getattr(library, f"perseid_{name}")
    found.argtypes = _SIGNATURES[name]  # type: ignore[attr-defined]
    found.restype = None  # type: ignore[attr-defined]
    return found


def constant(library: ctypes.CDLL, name: str) -> int:
    """What a function without arguments says."""
    found = getattr(library, f"perseid_{name}")
    found.restype = ctypes.c_int64
    return int(found())
