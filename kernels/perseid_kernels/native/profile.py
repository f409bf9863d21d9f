"""Where a forward pass spends its time: the library counts the seconds of each op while somebody listens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

OPS = ("embed", "norm", "qkv", "rope", "attention", "o", "gate_up", "silu", "down", "route", "lora", "lm_head")
"""`enum Op` of decoder.h. The products are without their low-rank sums, which are "lora" for
all four; "route" is what gates take to choose."""


class Profile:
    """Seconds of each op since it was begun or last reset."""

    def __init__(self) -> None:
        self.seconds: Tensor = torch.zeros(len(OPS), dtype=torch.float64)

    def reset(self) -> None:
        """Begin again."""
        self.seconds.zero_()

    def by_op(self) -> dict[str, float]:
        """Seconds by op."""
        return dict(zip(OPS, self.seconds.tolist(), strict=True))


@contextmanager
def profiling(set_profile: Callable[[int], None]) -> Iterator[Profile]:
    """All forward passes of the process are counted meanwhile."""
    profile = Profile()
    set_profile(profile.seconds.data_ptr())
    try:
        yield profile
    finally:
        set_profile(0)
