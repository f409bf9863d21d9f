"""The ops by Triton kernels: CUDA (and HIP) devices, and the CPU through Triton's interpreter, for tests.

Nothing here waits for the device inside a layer: sizes come from shapes and from `Segments`' host copy, and the
row-tile work list is built once for a step's `Segments`. Shape legend: backend.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perseid_kernels.activation import silu_mul
from perseid_kernels.attention import attention
from perseid_kernels.backend import AttentionBatch, SlotMoves
from perseid_kernels.best import best
from perseid_kernels.draft_heads import DraftHeads, FusedHeads
from perseid_kernels.expand import expand
from perseid_kernels.fused import FusedDecoder, FusedForward
from perseid_kernels.gate import choose
from perseid_kernels.matmul_dense import PackedDense, matmul_dense, pack_dense
from perseid_kernels.matmul_q4 import PackedInt4, matmul_q4, pack_int4
from perseid_kernels.matmul_q4 import unpack_rows as unpack_q4_rows
from perseid_kernels.matmul_q8 import PackedInt8, matmul_q8, pack_int8
from perseid_kernels.matmul_q8 import unpack_rows as unpack_q8_rows
from perseid_kernels.move_slots import move_slots
from perseid_kernels.norm import add_rms_norm, rms_norm
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.rope import rope_and_store
from perseid_kernels.routed_lora import add_chosen
from perseid_kernels.routing import Gates, RoutedRows
from perseid_kernels.row_tiles import RowTiles, StaticSegments
from perseid_kernels.segments import Segments
from perseid_kernels.shrink import shrink
from perseid_kernels.weights import DenseWeight, Int4Weight, Int8Weight, Weight

PackedWeight = PackedInt4 | PackedInt8 | PackedDense


class TritonBackend:
    """`Backend` by Triton kernels. The interpreter computes bfloat16 wrongly: give it float32."""

    name = "triton"
    kv_dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, device: torch.device, compute_dtype: torch.dtype = torch.bfloat16) -> None:
        if device.type == "cpu" and compute_dtype == torch.bfloat16:
            raise ValueError("compute_dtype bfloat16 on the CPU: Triton's interpreter computes it wrongly, use float32")
        self.device = device
        self.compute_dtype = compute_dtype
        self._step: tuple[Segments, RowTiles] | None = None
        self._capture_stream: torch.cuda.Stream | None = None

    def pack(self, weight: Weight, device: torch.device) -> PackedWeight:
        """Lay the weight out as its kernel reads it."""
        match weight:
            case Int4Weight():
                return pack_int4(weight, device)
            case Int8Weight():
                return pack_int8(weight, device)
            case DenseWeight():
                return pack_dense(weight, device, self.compute_dtype)

    def pack_draft(self, weight: Weight, device: torch.device) -> PackedWeight:
        """As exactly as others."""
        return self.pack(weight, device)

    def matmul(self, x_TK: Tensor, packed: PackedWeight, out_TN: Tensor) -> None:
        """out = x Wᵀ."""
        match packed:
            case PackedInt4():
                matmul_q4(x_TK, packed, out_TN)
            case PackedInt8():
                matmul_q8(x_TK, packed, out_TN)
            case PackedDense():
                matmul_dense(x_TK, packed, out_TN)

    def embed(self, packed: PackedWeight, token_ids_T: Tensor) -> Tensor:
        """Rows `token_ids` of W; once a step, so plain torch."""
        match packed:
            case PackedInt4():
                return unpack_q4_rows(packed, token_ids_T).to(self.compute_dtype)
            case PackedInt8():
                return unpack_q8_rows(packed, token_ids_T).to(self.compute_dtype)
            case PackedDense():
                return packed.values[token_ids_T]

    def add_lora(self, x_TK: Tensor, pages: RankPages, segments: Segments, out_TN: Tensor) -> None:
        """One shrink for all slices, one expand: two launches a linear."""
        tiles = self._row_tiles(segments)
        if tiles.num_tiles:
            z = shrink(x_TK, pages, segments, tiles)
            expand(z, pages, segments, tiles, out_TN)

    def add_routed(self, x_TK: Tensor, gates: Gates, pages: RankPages, routed: RoutedRows, out_TN: Tensor) -> None:
        """Gates, choice, shrink, expand: four launches a linear, whose grids follow from shapes."""
        if not routed.rows.numel() or not gates.num_gated:
            return
        choice = choose(x_TK, gates, routed)
        if routed.max_pages:
            add_chosen(x_TK, pages, routed, choice, out_TN)

    def new_pool(self) -> Any:
        """A pool of memory for `record`; None where there are no graphs."""
        return torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def record(self, run: Callable[[], object], pool: Any = None) -> Callable[[], None]:
        """Run `run` (twice on a GPU), and return what repeats its ops on the same tensors: one replay of a CUDA graph.

        `run` may read tensors that are filled between replays (token ids, positions, block tables, an
        AttentionBatch of the longest context, `StaticSegments`), and must not read back from the device. What it
        allocates belongs to the graph, or to all that are recorded with the same `pool`: replay one at a time, and
        keep nothing there that another's replay may overwrite. On the CPU (the interpreter) the result is `run`
        itself.
        """
        if self.device.type != "cuda":
            run()
            return partial(_discard, run)
        if self._capture_stream is None:  # a graph is captured beside the default stream
            self._capture_stream = torch.cuda.Stream(self.device)
        stream, current = self._capture_stream, torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()  # compiles the kernels, and uploads what they cache
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: a loader thread may allocate and copy while this one captures
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            run()
        return graph.replay

    def rms_norm(self, x_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) · weight."""
        return rms_norm(x_TN, weight_N, eps)

    def add_rms_norm(self, x_TN: Tensor, residual_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        """residual += x in place; returns rms_norm(residual)."""
        return add_rms_norm(x_TN, residual_TN, weight_N, eps)

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        """silu(gate) · up."""
        return silu_mul(gate_up_T2F)

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
        rope_and_store(q_THD, k_THD, v_THD, cos_XD, sin_XD, positions_T, k_cache, v_cache, slots_T)

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
        attention(q_THD, k_cache, v_cache, batch, scale, out_THD)

    def move_slots(self, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], moves: SlotMoves) -> None:
        """One launch for all layers."""
        move_slots(k_caches, v_caches, moves)

    def best(self, logits_LV: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit of each row and the lowest index at which it stands."""
        return best(logits_LV)

    def fuse(self, model: FusedDecoder) -> FusedForward | None:  # noqa: ARG002
        """None: a GPU replays a graph instead."""
        return None

    def fuse_heads(self, heads: DraftHeads) -> FusedHeads | None:  # noqa: ARG002
        """None: op by op; their products take the time."""
        return None

    def _row_tiles(self, segments: Segments) -> RowTiles:
        """The work list of the step's segments: every layer of a step passes the same object."""
        if isinstance(segments, StaticSegments):
            return segments.tiles
        if self._step is None or self._step[0] is not segments:
            self._step = (segments, RowTiles.build(segments))
        return self._step[1]


def _discard(run: Callable[[], object]) -> None:
    run()
