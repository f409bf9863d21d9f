"""The tensors of one step, as the decoder reads them."""

from dataclasses import dataclass

from torch import Tensor

from perseid_kernels.backend import AttentionBatch
from perseid_kernels.segments import Segments


@dataclass(frozen=True, slots=True)
class StepBatch:
    """T rows: prefill chunks and decodes side by side, a sequence's rows together and in order."""

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64
    slots_T: Tensor  # int64, cache slot of each row: block · block_size + offset
    attention: AttentionBatch
    segments: Segments | None  # None: no row uses an adapter
    logits_rows: Tensor  # int64 [L], the rows whose next-token logits are wanted
