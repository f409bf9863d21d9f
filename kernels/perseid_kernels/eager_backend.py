"""The ops in plain torch, for CPU and CUDA: the readable form, and the fallback without a compiler.

Weights stay packed: a product dequantises a slice of output rows at a time, so no 16- or 32-bit copy of a large
weight ever exists. Shape legend: backend.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from perseid_kernels.backend import MAX_TREE_ROWS, AttentionBatch, SlotMoves
from perseid_kernels.best import best
from perseid_kernels.draft_heads import DraftHeads, FusedHeads
from perseid_kernels.fused import FusedDecoder, FusedForward
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.routing import Gates, RoutedRows
from perseid_kernels.segments import PAGE_RANK, Segments
from perseid_kernels.weights import DenseWeight, Int4Weight, Int8Weight, Weight, take_rows

_SLICE_WEIGHTS = 1 << 22  # weights dequantised at a time: 16 MB of float32


@dataclass(frozen=True, slots=True)
class EagerWeight:
    """A canonical weight on the backend's device."""

    weight: Weight

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return sum(tensor.nbytes for tensor in _tensors(self.weight))


class EagerBackend:
    """`Backend` in plain torch."""

    name = "eager"
    kv_dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, compute_dtype: torch.dtype = torch.float32) -> None:
        self.compute_dtype = compute_dtype

    def pack(self, weight: Weight, device: torch.device) -> EagerWeight:
        """Keep the canonical form, moved to `device`."""
        return EagerWeight(_move(weight, device))

    def pack_draft(self, weight: Weight, device: torch.device) -> EagerWeight:
        """As exactly as others."""
        return self.pack(weight, device)

    def matmul(self, x_TK: Tensor, packed: EagerWeight, out_TN: Tensor) -> None:
        """out = x Wᵀ, a slice of W's rows at a time."""
        num_outputs, num_inputs = packed.shape
        height = max(1, _SLICE_WEIGHTS // num_inputs)
        for start in range(0, num_outputs, height):
            rows = slice(start, min(start + height, num_outputs))
            values = take_rows(packed.weight, rows).dequantize().to(self.compute_dtype)
            out_TN[:, rows] = linear(x_TK, values)

    def embed(self, packed: EagerWeight, token_ids_T: Tensor) -> Tensor:
        """Rows `token_ids` of W."""
        return take_rows(packed.weight, token_ids_T).dequantize().to(self.compute_dtype)

    def add_lora(self, x_TK: Tensor, pages: RankPages, segments: Segments, out_TN: Tensor) -> None:
        """out[t] += Σ_j w_j · (x[t] @ A[p_j]ᵀ) @ B[p_j], a segment at a time over all its pages at once."""
        spans = list(pairwise(segments.indptr.tolist()))
        page_spans = list(pairwise(segments.page_indptr.tolist()))
        for (first, end), (first_page, end_page) in zip(spans, page_spans, strict=True):
            rows = segments.rows[first:end].long()
            used, weights = segments.pages[first_page:end_page], segments.weights[first_page:end_page]
            _add_pages(x_TK, pages, used, rows, weights, out_TN)

    def add_routed(self, x_TK: Tensor, gates: Gates, pages: RankPages, routed: RoutedRows, out_TN: Tensor) -> None:
        """Choose for all rows and projections at once, then add a column at a time."""
        rows, columns = routed.rows.long(), routed.table.num_columns
        products = linear(x_TK[rows].float(), gates.weight)
        logits = (
            torch.where(routed.table.absolute.bool().repeat(len(gates.gated)), products.abs(), products) + gates.bias
        )
        weights_RSC, entropy_RS = _choose(logits.view(rows.numel(), -1, columns), routed)
        gated = torch.tensor(gates.gated, device=weights_RSC.device)
        weights_RSC *= gated[:, None]
        routed.tally[:, :columns] += weights_RSC.sum(dim=1)
        routed.tally[:, columns] += (entropy_RS * gated).sum(dim=1)
        for column, (first, end) in enumerate(pairwise(routed.page_indptr.tolist())):
            users = weights_RSC[:, :, column].any(dim=1).nonzero()[:, 0]
            weights_RSJ = weights_RSC[users, :, column, None]
            _add_pages(x_TK, pages, routed.pages[first:end], rows[users], weights_RSJ, out_TN)

    def rms_norm(self, x_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) · weight over the last dimension."""
        x = x_TN.float()
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return (x * inverse * weight_N.float()).to(x_TN.dtype)

    def add_rms_norm(self, x_TN: Tensor, residual_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        """residual += x in place; returns rms_norm(residual)."""
        residual_TN += x_TN
        return self.rms_norm(residual_TN, weight_N, eps)

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        """silu(gate) · up."""
        gate, up = gate_up_T2F.float().chunk(2, dim=-1)
        return (silu(gate) * up).to(gate_up_T2F.dtype)

    def rope_and_store(
        self,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        cos_XD: Tensor,
        sin_XD: Tensor,
        positions_T: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots_T: Tensor,
    ) -> None:
        """Rotate q and k in place, then write k and v into their cache slots."""
        cos, sin = cos_XD[positions_T, None], sin_XD[positions_T, None]
        for x in (q_THD, k_THD):
            a, b = x.float().chunk(2, dim=-1)
            x.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))
        k_cache.view(-1, *k_cache.shape[2:])[slots_T] = k_THD.to(k_cache.dtype)
        v_cache.view(-1, *v_cache.shape[2:])[slots_T] = v_THD.to(v_cache.dtype)

    def attention(
        self,
        q_THD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        out_THD: Tensor,
    ) -> None:
        """A sequence at a time: gather its keys and values, masked softmax in float32. Each row of a tree is taken as
        a decode after its ancestors."""
        spans = pairwise(batch.query_start.tolist())
        for s, ((start, end), context) in enumerate(zip(spans, batch.context_len.tolist(), strict=True)):
            keys = _gather(k_cache, batch.block_table[s], context)
            values = _gather(v_cache, batch.block_table[s], context)
            if batch.trees is None or not batch.trees.ancestors[start:end].any():
                out_THD[start:end] = _attend(q_THD[start:end], keys, values, scale).to(out_THD.dtype)
                continue
            for row in range(start, end):
                seen = _places_seen(context - (end - start), int(batch.trees.ancestors[row]))
                out_THD[row : row + 1] = _attend(q_THD[row : row + 1], keys[seen], values[seen], scale)

    def move_slots(self, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], moves: SlotMoves) -> None:
        """Read all, then write all: no move reads what another one wrote."""
        for cache in (*k_caches, *v_caches):
            slots = cache.view(-1, *cache.shape[2:])
            slots[moves.targets] = slots[moves.sources]

    def best(self, logits_LV: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit of each row and the lowest index at which it stands."""
        return best(logits_LV)

    def fuse(self, model: FusedDecoder) -> FusedForward | None:  # noqa: ARG002
        """None: there is only op by op."""
        return None

    def fuse_heads(self, heads: DraftHeads) -> FusedHeads | None:  # noqa: ARG002
        """None: there is only op by op."""
        return None


def _add_pages(
    x_TK: Tensor, pages: RankPages, used_J: Tensor, rows_R: Tensor, weights_RSJ: Tensor, out_TN: Tensor
) -> None:
    """Add the products of pages `used` to some rows. Their weights may be the same for all rows and projections."""
    num_pages = used_J.numel()
    if not num_pages or not rows_R.numel():
        return
    used = used_J.long()
    a = pages.a[used].view(num_pages, len(pages.slices), PAGE_RANK, -1)
    z = torch.einsum("tk,psrk->tspr", x_TK[rows_R], a)
    z = (z.float() * weights_RSJ[..., None]).to(pages.b.dtype)
    b_parts = torch.split(pages.b[used], list(pages.slices), dim=-1)
    delta = torch.cat([torch.einsum("tpr,prn->tn", z[:, i], b) for i, b in enumerate(b_parts)], dim=1)
    out_TN.index_add_(0, rows_R, delta.to(out_TN.dtype))


def _choose(logits_RSC: Tensor, routed: RoutedRows) -> tuple[Tensor, Tensor]:
    """(weights [R, S, C], zero where a column is not chosen; entropy [R, S] over all allowed columns)."""
    most = torch.finfo(torch.float32).max
    finite = logits_RSC.nan_to_num(nan=-most, posinf=most, neginf=-most)
    masked = finite.masked_fill(~routed.allowed.bool()[:, None], float("-inf"))
    ranks = masked.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)  # of equal ones the first
    scaled = (masked - masked.amax(dim=-1, keepdim=True)) / routed.temperature[:, None, None]
    weights = scaled.masked_fill(ranks >= routed.k[:, None, None], float("-inf")).softmax(dim=-1)
    return weights, torch.special.entr(scaled.softmax(dim=-1)).sum(dim=-1)


def _attend(q_NHD: Tensor, keys_CGD: Tensor, values_CGD: Tensor, scale: float) -> Tensor:
    """Causal attention of the last N of C positions; G key/value heads. float32 [N, H, D]."""
    num_rows, num_heads, head_dim = q_NHD.shape
    context, num_kv_heads, _ = keys_CGD.shape
    q = q_NHD.float().view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("nghd,cgd->nghc", q, keys_CGD.float()) * scale
    position = torch.arange(context - num_rows, context, device=q.device)
    unseen = torch.arange(context, device=q.device) > position[:, None]
    probabilities = torch.softmax(scores.masked_fill(unseen[:, None, None], float("-inf")), dim=-1)
    out = torch.einsum("nghc,cgd->nghd", probabilities, values_CGD.float())
    return out.reshape(num_rows, num_heads, head_dim)


def _places_seen(prefix: int, ancestors: int) -> list[int]:
    """Where the cache holds what a tree row sees: the prefix, and then its ancestors."""
    return [*range(prefix), *(prefix + j for j in range(MAX_TREE_ROWS) if ancestors >> j & 1)]


def _gather(cache: Tensor, blocks: Tensor, context: int) -> Tensor:
    """The first `context` tokens of a paged sequence: [context, Hkv, D]."""
    block_size = cache.shape[1]
    used = blocks[: -(-context // block_size)].long()
    return cache[used].flatten(0, 1)[:context]


def _move(weight: Weight, device: torch.device) -> Weight:
    match weight:
        case Int4Weight():
            offset = None if weight.offset is None else weight.offset.to(device)
            return Int4Weight(
                weight.codes.to(device),
                weight.codebook.to(device),
                weight.scale.to(device),
                offset,
                weight.group_size,
            )
        case Int8Weight():
            return Int8Weight(weight.codes.to(device), weight.scale.to(device), weight.group_size)
        case DenseWeight():
            return DenseWeight(weight.values.to(device))


def _tensors(weight: Weight) -> list[Tensor]:
    match weight:
        case Int4Weight():
            held = [weight.codes, weight.codebook, weight.scale]
            return held if weight.offset is None else [*held, weight.offset]
        case Int8Weight():
            return [weight.codes, weight.scale]
        case DenseWeight():
            return [weight.values]
