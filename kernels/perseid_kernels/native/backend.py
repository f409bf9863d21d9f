"""`Backend` on the C++ library: each op checks what the pointers stand for, then is one call.

All numbers are float32. Every sum has an order fixed by the shapes of the weights and by the row itself, so a row's
results are the same, bit by bit, in any batch. Shape legend: backend.py of the package.
"""

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from perseid_kernels.backend import Activations, AttentionBatch, SlotMoves
from perseid_kernels.draft_heads import DraftHeads, FusedHeads
from perseid_kernels.fused import FusedDecoder, FusedForward
from perseid_kernels.native.decoder import NativeForward
from perseid_kernels.native.draft_heads import NativeHeads
from perseid_kernels.native.library import constant, function
from perseid_kernels.native.pack import Layout, NativeWeight, pack, pack_draft
from perseid_kernels.native.profile import Profile, profiling
from perseid_kernels.native.routing import NativeGates, NativeRouted
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.routing import Gates, RoutedRows
from perseid_kernels.segments import Segments
from perseid_kernels.weights import Weight

_PLANES = {"float32": 0, "int8": 1, "int16": 2, "exact": 3}


class NativeBackend:
    """`Backend` in C++, on the CPU."""

    name = "native"
    compute_dtype = torch.float32
    kv_dtypes = (torch.float32,)

    def __init__(
        self, path: Path, num_threads: int | None = None, activations: Activations | Literal["float32"] = "exact"
    ) -> None:
        """Load the library. `num_threads` defaults to torch's (OMP_NUM_THREADS, else the physical cores).

        `activations` is how products with whole-number codes hold them on a CPU that multiplies bytes (AVX-512 VNNI):
        "exact" in three bytes, as exact as float32 and several times faster; "int16" and "int8" in two and one, faster
        still and no longer exact (`native/quantize.h` has the errors); "float32" not as integers. Other codes and other
        CPUs take the float32 product, whatever is asked for.
        """
        library = ctypes.CDLL(str(path))
        self._matmul = function(library, "matmul")
        self._embed = function(library, "embed")
        self._add_lora = function(library, "add_lora")
        self._add_routed = function(library, "add_routed")
        self._rms_norm = function(library, "rms_norm")
        self._add_rms_norm = function(library, "add_rms_norm")
        self._silu_mul = function(library, "silu_mul")
        self._rope_and_store = function(library, "rope_and_store")
        self._attention = function(library, "attention")
        self._move_slots = function(library, "move_slots")
        self._best = function(library, "best")
        self._forward = function(library, "forward")
        self._draft = function(library, "draft")
        self._set_profile = function(library, "set_profile")
        self._layout = Layout(
            panel=constant(library, "panel"),
            planes=_PLANES[activations] if constant(library, "has_integer_matmul") else 0,
        )
        function(library, "set_num_threads")(num_threads or torch.get_num_threads())

    @property
    def has_integer_matmul(self) -> bool:
        """Whether this CPU, and the activations asked for, have it."""
        return self._layout.planes > 0

    def pack(self, weight: Weight, device: torch.device) -> NativeWeight:
        """Panels of outputs."""
        if device.type != "cpu":
            raise ValueError(f"device {device}: the native backend computes on the CPU")
        return pack(weight, self._layout)

    def pack_draft(self, weight: Weight, device: torch.device) -> NativeWeight:
        """Dense weights as codes of 8 bits; activations in 8 bits too, where bytes can be multiplied."""
        if device.type != "cpu":
            raise ValueError(f"device {device}: the native backend computes on the CPU")
        return pack_draft(weight, self._layout)

    def matmul(self, x_TK: Tensor, packed: NativeWeight, out_TN: Tensor) -> None:
        """out = x Wᵀ."""
        x, out = _rows(x_TK), _rows(out_TN)
        assert (x.shape[1], out.shape[1]) == packed.shape[::-1]
        self._matmul(packed.address, x.data_ptr(), x.shape[0], x.stride(0), out.data_ptr(), out.stride(0))

    def embed(self, packed: NativeWeight, token_ids_T: Tensor) -> Tensor:
        """Rows `token_ids` of W."""
        out = torch.empty((token_ids_T.shape[0], packed.shape[1]))
        self._embed(packed.address, _ids(token_ids_T).data_ptr(), out.shape[0], out.data_ptr())
        return out

    def add_lora(self, x_TK: Tensor, pages: RankPages, segments: Segments, out_TN: Tensor) -> None:
        """Shrink and expand in one call."""
        assert pages.a.dtype == pages.b.dtype == torch.float32
        x, out = _rows(x_TK), _rows(out_TN)
        self._add_lora(
            x.data_ptr(),
            x.stride(0),
            x.shape[1],
            pages.a.data_ptr(),
            pages.b.data_ptr(),
            pages.live.data_ptr(),
            _slice_ends(pages.slices).data_ptr(),
            len(pages.slices),
            segments.rows.data_ptr(),
            segments.indptr.data_ptr(),
            segments.pages.data_ptr(),
            segments.weights.data_ptr(),
            segments.page_indptr.data_ptr(),
            segments.indptr.shape[0] - 1,
            out.data_ptr(),
            out.stride(0),
        )

    def add_routed(self, x_TK: Tensor, gates: Gates, pages: RankPages, routed: RoutedRows, out_TN: Tensor) -> None:
        """Choose, shrink and expand in one call."""
        assert pages.a.dtype == pages.b.dtype == torch.float32
        assert gates.weight.shape == (len(pages.slices) * routed.table.num_columns, x_TK.shape[1])
        x, out = _rows(x_TK), _rows(out_TN)
        native_gates, rows = NativeGates.of(gates), NativeRouted.of(routed)
        self._add_routed(
            x.data_ptr(),
            x.stride(0),
            x.shape[1],
            pages.a.data_ptr(),
            pages.b.data_ptr(),
            pages.live.data_ptr(),
            _slice_ends(pages.slices).data_ptr(),
            len(pages.slices),
            ctypes.addressof(native_gates),
            ctypes.addressof(rows),
            out.data_ptr(),
            out.stride(0),
        )

    def rms_norm(self, x_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) · weight over the last dimension."""
        x_THN = x_TN if x_TN.dim() == 3 else x_TN.unsqueeze(1)
        rows, heads, width = x_THN.shape
        assert x_THN.dtype == torch.float32
        assert x_THN.stride(2) == 1
        out = torch.empty(x_TN.shape)
        self._rms_norm(
            x_THN.data_ptr(), rows, heads, width, x_THN.stride(0), x_THN.stride(1), _norm(weight_N), eps, out.data_ptr()
        )
        return out

    def add_rms_norm(self, x_TN: Tensor, residual_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        """residual += x in place; returns rms_norm(residual)."""
        assert x_TN.is_contiguous()
        assert residual_TN.is_contiguous()
        rows, width = x_TN.shape
        out = torch.empty((rows, width))
        self._add_rms_norm(x_TN.data_ptr(), residual_TN.data_ptr(), rows, width, _norm(weight_N), eps, out.data_ptr())
        return out

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        """silu(gate) · up."""
        gate_up = _rows(gate_up_T2F)
        out = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2))
        self._silu_mul(gate_up.data_ptr(), out.shape[0], out.shape[1], gate_up.stride(0), out.data_ptr())
        return out

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
        q, k, v = _heads(q_THD), _heads(k_THD), _heads(v_THD)
        assert k_cache.dtype == v_cache.dtype == torch.float32
        self._rope_and_store(
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            *(q.shape[0], q.shape[1], k.shape[1], q.shape[2]),
            cos_XD.data_ptr(),
            sin_XD.data_ptr(),
            _ids(positions_T).data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            _ids(slots_T).data_ptr(),
        )

    def attention(
        self,
        q_THD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        out_THD: Tensor,
    ) -> None:
        """Causal attention over the paged cache."""
        _, block_size, num_kv_heads, head_dim = k_cache.shape
        q, out = _heads(q_THD), _heads(out_THD)
        self._attention(
            q.data_ptr(),
            q.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            batch.query_start.data_ptr(),
            batch.context_len.data_ptr(),
            batch.block_table.data_ptr(),
            batch.block_table.stride(0),
            batch.context_len.shape[0],
            None if batch.trees is None else _ids(batch.trees.ancestors).data_ptr(),
            *(q.shape[1], num_kv_heads, head_dim, block_size),
            scale,
            out.data_ptr(),
            out.stride(0),
        )

    def move_slots(self, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], moves: SlotMoves) -> None:
        """One call for all layers; paths share no slots, so it is enough that all moves are done in order."""
        caches = (*k_caches, *v_caches)
        assert all(cache.dtype == torch.float32 for cache in caches)
        addresses = (ctypes.c_void_p * len(caches))(*[cache.data_ptr() for cache in caches])
        self._move_slots(
            ctypes.addressof(addresses),
            len(caches),
            caches[0][0, 0].numel(),
            _ids(moves.sources).data_ptr(),
            _ids(moves.targets).data_ptr(),
            moves.sources.shape[0],
        )

    def best(self, logits_LV: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit of each row and the lowest index at which it stands."""
        rows, width = logits_LV.shape
        assert logits_LV.dtype == torch.float32
        assert logits_LV.is_contiguous()
        values, indices = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
        self._best(logits_LV.data_ptr(), rows, width, values.data_ptr(), indices.data_ptr())
        return values, indices

    def fuse(self, model: FusedDecoder) -> FusedForward:
        """The whole forward pass in one call."""
        return NativeForward(self._forward, model)

    def fuse_heads(self, heads: DraftHeads) -> FusedHeads:
        """All of it in one call."""
        return NativeHeads(self._draft, heads)

    def profiling(self) -> AbstractContextManager[Profile]:
        """Count the seconds of each op of every whole pass, whichever backend object runs it: the library counts."""
        return profiling(self._set_profile)


def _rows(x_TN: Tensor) -> Tensor:
    """A float32 matrix of contiguous rows."""
    assert x_TN.dtype == torch.float32
    assert x_TN.stride(1) == 1 or x_TN.shape[1] == 1
    return x_TN


def _heads(x_THD: Tensor) -> Tensor:
    """Float32 [T, H, D] whose rows are contiguous."""
    assert x_THD.dtype == torch.float32
    assert x_THD.stride(2) == 1
    assert x_THD.stride(1) == x_THD.shape[2] or x_THD.shape[1] == 1
    return x_THD


def _ids(values_T: Tensor) -> Tensor:
    assert values_T.dtype == torch.int64
    assert values_T.is_contiguous()
    return values_T


def _norm(weight_N: Tensor) -> int:
    assert weight_N.dtype == torch.float32
    assert weight_N.is_contiguous()
    return weight_N.data_ptr()


@lru_cache(maxsize=64)
def _slice_ends(slices: tuple[int, ...]) -> Tensor:
    return torch.tensor(slices).cumsum(0)
