"""The kinds of GPU that launch knobs are chosen for."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    # One shape of matrix instruction for tiles of every size: the 32 × 32 one sums K in other steps, and a row's
    # bits would depend on how many rows there are.
    "gfx942": {"matrix_instr_nonkdim": 16},
}


@lru_cache(maxsize=16)
def device_class(device: torch.device) -> str:
    """sm_80, sm_90 or gfx942: whose limits the device keeps. Others, and the CPU (Triton's interpreter), take
    sm_80's knobs, which ask for the least."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] == 9 else "sm_80"


def compiler_options(kind: str) -> dict[str, Any]:
    """What Triton's compiler is told for every kernel with a `tl.dot` on this kind of device."""
    return dict(_OPTIONS.get(kind, {}))
