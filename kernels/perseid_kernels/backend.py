"""The set of ops a decoder is written in. Three backends implement it:

    native   CPU: the C++ library in `native/`, float32, built by the system's compiler at first use
    eager    CPU or CUDA: plain torch; the fallback without a compiler, and the readable form
    triton   CUDA, or the CPU through Triton's interpreter (tests)

`backend_for(device)` picks one. A decoder holds the backend it was given and calls nothing else, so a test can
run the same decoder on any of them.

Shape legend: T rows of the batch, S sequences, N outputs, K inputs, H query heads, Hkv key/value heads, D head dim,
P pages, C = PAGE_RANK · slices columns of a shrink, NB cache blocks of BS tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from perseid_kernels.rank_pages import RankPages
from perseid_kernels.routing import Gates, RoutedRows
from perseid_kernels.segments import Segments
from perseid_kernels.weights import Weight

if TYPE_CHECKING:
    from perseid_kernels.draft_heads import DraftHeads, FusedHeads
    from perseid_kernels.fused import FusedDecoder, FusedForward


MAX_TREE_ROWS = 64
"""Rows of a tree at most: the bits of an ancestor mask."""


@dataclass(frozen=True, slots=True)
class TreeRows:
    """Rows of drafted trees: those of a sequence branch instead of following one another. R of the step's T rows.

    Bit j of a row's mask is set where it sees row j of its own sequence's rows in this step: its ancestors, which stand
    before it, and itself. It sees the whole prefix too, which are the cache's first `context_len[s] - rows of s`
    tokens. Its position is the prefix' length + the number of its bits − 1.

    Such a row gets the bits that it would get as the only new row of a sequence whose last tokens are its ancestors:
    its keys are taken in that order.
    """

    ancestors: Tensor  # int64 [T]; 0 on rows of sequences that are no trees. 64 bits, the last one the sign
    rows: Tensor  # int32 [R], ascending
    sequences: Tensor  # int32 [R], of each of these rows


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the rows of a step lie in their sequences. Rows of a sequence stand together, in order.

    Row r of sequence s has position `context_len[s] - (query_start[s+1] - query_start[s]) + r` and sees the keys
    at positions ≤ its own; rows of a tree (`TreeRows`) see their ancestors instead, and the cache holds all rows of the
    tree behind the prefix, in the order of the batch. The K and V of all the step's rows are in the cache before
    attention runs.
    """

    query_start: Tensor  # int32 [S+1]
    context_len: Tensor  # int32 [S], tokens in the cache with this step's rows
    block_table: Tensor  # int32 [S, max blocks], cache block of the sequence's i-th group of BS tokens
    max_query_len: int  # of sequences that are no trees; 1 where all are
    max_context_len: int
    trees: TreeRows | None = None


@dataclass(frozen=True, slots=True)
class SlotMoves:
    """Cache slots whose contents move: what was accepted of trees goes behind its prefix. M moves, of P paths.

    A path's moves are done in order: in the order of the sequence `targets[i] < sources[i]`, both ascending, so that no
    move overwrites the source of a later one (slots, whose blocks lie anywhere, need not ascend). Paths share no slots.
    """

    sources: Tensor  # int64 [M]
    targets: Tensor  # int64 [M]
    indptr: Tensor  # int32 [P+1], first move of each path, and M


class Backend(Protocol):
    """All tensors live on one device. Activations are [T, ·] contiguous rows of `compute_dtype`."""

    name: str
    compute_dtype: torch.dtype  # float32 on CPU; bfloat16 on CUDA

    @property
    def kv_dtypes(self) -> tuple[torch.dtype, ...]:
        """What the caches of `rope_and_store` and `attention` may hold."""
        ...

    def pack(self, weight: Weight, device: torch.device) -> Any:
        """Turn a canonical weight into this backend's layout on `device`. The result has `.nbytes` and `.shape`."""
        ...

    def pack_draft(self, weight: Weight, device: torch.device) -> Any:
        """The same for a weight that drafts alone are made with: it may be held, and multiplied, less exactly."""
        ...

    def matmul(self, x_TK: Tensor, packed: Any, out_TN: Tensor) -> None:
        """out = x Wᵀ, accumulated in float32. `out` may be a column slice of a wider row-major tensor."""
        ...

    def embed(self, packed: Any, token_ids_T: Tensor) -> Tensor:
        """Rows `token_ids` of a packed [vocab, hidden] weight, dequantised: [T, hidden]."""
        ...

    def add_lora(self, x_TK: Tensor, pages: RankPages, segments: Segments, out_TN: Tensor) -> None:
        """out[t] += Σ_j w_j · (x[t] @ A[p_j]ᵀ) @ B[p_j] for the pages p_j of row t (equation in segments.py)."""
        ...

    def add_routed(self, x_TK: Tensor, gates: Gates, pages: RankPages, routed: RoutedRows, out_TN: Tensor) -> None:
        """Choose adapters for the routed rows by their gates and add their products, as `routing.py` says; adds to
        `routed.tally`. A row's numbers do not depend on the other rows."""
        ...

    def rms_norm(self, x_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) · weight over the last dimension; x may be [T, N] or [T, H, D]."""
        ...

    def add_rms_norm(self, x_TN: Tensor, residual_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        """residual += x in place; returns rms_norm(residual)."""
        ...

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        """silu(gate) · up for gate = the first half of the columns, up = the second: [T, F]."""
        ...

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
        """Rotate q and k in place (Hugging Face's half-split layout; cos, sin [max positions, D/2] float32), then
        write k and v into cache slot `slots[t]` = block · BS + offset. q, k, v may be views of one qkv tensor
        (row stride larger than H·D). Caches are [NB, BS, Hkv, D]."""
        ...

    def attention(
        self,
        q_THD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        out_THD: Tensor,
    ) -> None:
        """Causal attention over the paged cache: out = softmax(scale · q Kᵀ) V, float32 softmax, GQA by
        head h reading key/value head h // (H / Hkv)."""
        ...

    def move_slots(self, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], moves: SlotMoves) -> None:
        """K and V of the slots move, in all layers at once. Caches are [NB, BS, Hkv, D], all of one shape and dtype."""
        ...

    def best(self, logits_LV: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row of float32 logits: the largest (NaN if any is), and the lowest index at which it stands."""
        ...

    def fuse(self, model: "FusedDecoder") -> "FusedForward | None":
        """The whole forward pass as one call, with the same results as op by op; None where there is none."""
        ...

    def fuse_heads(self, heads: "DraftHeads") -> "FusedHeads | None":
        """All of what Medusa heads are asked as one call; None where there is only op by op."""
        ...


@runtime_checkable
class Recorder(Protocol):
    """What a backend has besides where a step can be recorded once and repeated on new contents of its tensors.

    Such a backend takes `StaticSegments`, and padding rows: those with a negative slot are stored nowhere, and a
    sequence without a row (`query_start[s+1] == query_start[s]`) is skipped. The CPU backends have none of this.
    """

    def new_pool(self) -> Any:
        """Memory that recordings can take turns in."""
        ...

    def record(self, run: Callable[[], object], pool: Any = None) -> Callable[[], None]:
        """Run `run`; the result repeats its ops on the same tensors, whatever they hold by then. What `run`
        allocates is overwritten by the next repetition of any recording of the same pool."""
        ...


Activations = Literal["exact", "int16", "int8"]
"""How a CPU's 4- and 8-bit products hold activations: as exactly as float32, or in so many bits (lossy, faster)."""


def backend_for(
    device: torch.device, compute_dtype: torch.dtype | None = None, activations: Activations = "exact"
) -> Backend:
    """The fastest backend for a device: Triton on CUDA; on the CPU the native library, eager without a compiler.

    `compute_dtype` defaults to bfloat16 on CUDA; the CPU computes in float32 only. Backends are imported here, so
    that a CPU process never imports triton. Raises ValueError for a device or dtype no backend serves, and
    ModuleNotFoundError for CUDA without triton.
    """
    if device.type == "cuda":
        if find_spec("triton") is None:
            raise ModuleNotFoundError(f"device {device}: CUDA needs triton; pip install 'perseid[gpu]'")
        from perseid_kernels.triton_backend import TritonBackend  # noqa: PLC0415  (keeps triton off the CPU path)

        return TritonBackend(device, compute_dtype or torch.bfloat16)
    if device.type != "cpu":
        raise ValueError(f"device {device}: no backend serves {device.type!r}; use cpu or cuda")
    if compute_dtype not in {None, torch.float32}:
        raise ValueError(f"compute_dtype {compute_dtype}: the CPU backends compute in float32")
    from perseid_kernels.native import load_native_backend  # noqa: PLC0415  (compiles a library at first use)

    native = load_native_backend(activations)
    if native is not None:
        return native
    from perseid_kernels.eager_backend import EagerBackend  # noqa: PLC0415

    return EagerBackend()
