"""Medusa heads, described for a backend that can ask them in one call (`Backend.fuse_heads`).

    x_h = r_L(… r_1(x)),   r_l(x) = x + SiLU(W_{h,l} x + b_{h,l})       residual blocks of head h; x the hidden state
    logits_h = U_h x_h                                                 over the draft vocabulary
    p_h = softmax(logits_h)

of which the K likeliest tokens are wanted, with their p. x is the base's last hidden state after the final norm. The
first blocks of all heads share their input: they are one product, to whose outputs an adapter may add low-rank products
as to any linear's. Source: Medusa (Cai et al., arXiv:2401.10774), section 3.1.

Shape legend: S rows, H heads, L layers, E hidden size, V draft vocabulary, K candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import silu

from perseid_kernels.rank_pages import RankPages
from perseid_kernels.segments import Segments


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """y = W x + b, of one head or of several, one below the other."""

    weight: Any  # [N, E], in the backend's layout; canonical for the oracle
    bias_N: Tensor | None


@dataclass(frozen=True, slots=True)
class DraftHeads:
    """All heads, as they lie on the device."""

    num_heads: int
    first: DraftBlock  # [H · E, E]
    further: Sequence[Sequence[DraftBlock]]  # [L − 1][H], each [E, E]
    lm_heads: Sequence[Any]  # U, [V, E] as `DraftBlock.weight`: one for all heads, or one for each
    vocabulary_V: Tensor | None  # int64 token ids, ascending; None: row v of U is token v
    num_candidates: int  # K ≤ V


@dataclass(frozen=True, slots=True)
class HeadsDelta:
    """What adapters add to the outputs of the first blocks."""

    pages: RankPages  # slices of width E, one for each head that may be, at least H
    segments: Segments


@dataclass(frozen=True, slots=True)
class Drafted:
    """The likeliest tokens of each row and head, likeliest first.

    A row of logits with NaN or +∞ gives K different tokens of the vocabulary with probability 0.
    """

    probabilities_SHK: Tensor  # float32
    token_ids_SHK: Tensor  # int64


class FusedHeads(Protocol):
    """Heads in one call."""

    def __call__(self, hidden_SE: Tensor, delta: HeadsDelta | None = None) -> Drafted:
        """Of each row by itself: other rows change nothing."""
        ...


def likeliest(logits_SHV: Tensor, num_candidates: int, vocabulary_V: Tensor | None = None) -> Drafted:
    """The definition of the choice, from float32 logits; which of equal ones comes first is not promised here."""
    largest, places = logits_SHV.masked_fill(logits_SHV.isnan(), -torch.inf).topk(num_candidates)
    shares = (largest - logits_SHV.logsumexp(dim=-1, keepdim=True)).exp()
    is_number = logits_SHV.amax(dim=-1, keepdim=True) < torch.inf  # no NaN among them either
    probabilities = shares.nan_to_num(nan=0.0).where(is_number, 0.0)
    return Drafted(probabilities, places if vocabulary_V is None else vocabulary_V[places])


def draft_logits_oracle(heads: DraftHeads, hidden_SE: Tensor, added_SN: Tensor | None = None) -> Tensor:
    """The definition: float32 logits [S, H, V] of canonical weights. `added_SN`: the adapters' products, [S, H · E]."""
    num_rows, width = hidden_SE.shape
    blocks_SN = _linear(hidden_SE, heads.first)
    if added_SN is not None:
        blocks_SN = blocks_SN + added_SN
    x_SHE = hidden_SE[:, None] + silu(blocks_SN.view(num_rows, heads.num_heads, width))
    for layer in heads.further:
        x_SHE = x_SHE + silu(torch.stack([_linear(x_SHE[:, head], block) for head, block in enumerate(layer)], dim=1))
    lm_heads = heads.num_heads * list(heads.lm_heads) if len(heads.lm_heads) == 1 else heads.lm_heads
    return torch.stack([x_SHE[:, head] @ lm_head.dequantize().T for head, lm_head in enumerate(lm_heads)], dim=1)


def _linear(x_SE: Tensor, block: DraftBlock) -> Tensor:
    product: Tensor = x_SE @ block.weight.dequantize().T
    return product if block.bias_N is None else product + block.bias_N
