"""Greedy choice: the largest logit of each row and the lowest index at which it stands.

    value[l] = max_v logits[l, v]        index[l] = min { v : logits[l, v] = value[l] }

torch's own argmax promises no order among equals; a greedy answer must not depend on the device or the batch.
"""

from torch import Tensor


def best(logits_LV: Tensor) -> tuple[Tensor, Tensor]:
    """Values float32 [L] (NaN where a row has one; the index then means nothing) and indices int64 [L]."""
    values_L = logits_LV.max(dim=-1).values
    return values_L, (logits_LV == values_L[:, None]).int().argmax(dim=-1)
