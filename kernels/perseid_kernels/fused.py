"""A whole decoder, described for a backend that can run it in one call (`Backend.fuse`).

The description holds what `Decoder.forward` of the server reads, in the backend's own layouts; the numbers are the
same either way. Shape legend: backend.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from perseid_kernels.backend import AttentionBatch
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.routing import RoutedRows
from perseid_kernels.segments import Segments


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """y = W x + bias + the rows' low-rank products. Parts fill the outputs one after the other."""

    parts: Sequence[Any]  # packed weights, [N_i, K]
    bias_N: Tensor | None
    pages: RankPages | None


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One layer and its caches, [NB, BS, Hkv, D]."""

    input_norm_E: Tensor
    qkv: FusedLinear
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    o: FusedLinear
    post_attention_norm_E: Tensor
    gate_up: FusedLinear
    down: FusedLinear
    k_cache: Tensor
    v_cache: Tensor


@dataclass(frozen=True, slots=True)
class FusedDecoder:
    """All layers, and what stands before and after them."""

    layers: Sequence[FusedLayer]
    embedding: Any  # packed [V, E]
    lm_head: Any  # packed [V, E]
    final_norm_E: Tensor
    cos_XD: Tensor
    sin_XD: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    attention_scale: float


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a forward pass ends with, for the L rows whose logits are wanted."""

    hidden_LE: Tensor  # after the final norm, in the backend's compute dtype
    logits_LV: Tensor  # float32


class FusedForward(Protocol):
    """One step through a fused decoder."""

    def __call__(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        attention: AttentionBatch,
        segments: Segments | None,
        logits_rows_L: Tensor,
        routed: Sequence[RoutedRows] = (),
    ) -> Outputs:
        """Of the rows named. Writes every row's K and V into the caches."""
        ...
