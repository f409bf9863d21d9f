"""Medusa heads on the device: asked in one call where the backend has one, op by op elsewhere.

The equation stands in `perseid_kernels/draft_heads.py`. The first blocks of all heads share their input and are one
product; heads that share the lm_head are rows of one product.

Shape legend: S sequences, H heads, E hidden size, V draft vocabulary, K candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from perseid_kernels.backend import Backend
from perseid_kernels.draft_heads import DraftBlock, Drafted, DraftHeads, FusedHeads, HeadsDelta, likeliest
from perseid_kernels.weights import DenseWeight
from perseid_server.speculation.draft import Candidates
from perseid_server.speculation.heads_config import RANKS
from perseid_server.speculation.heads_file import CheckedHeads

PackLmHead = Callable[[tuple[int, ...] | None], Any]
"""The base's lm_head in the backend's layout, only these rows of it, ascending; None: all."""


class DeviceHeads:
    """Frozen, like the base they look at."""

    def __init__(self, heads: DraftHeads, backend: Backend, device: torch.device) -> None:
        self.device = device
        self._ask: FusedHeads = backend.fuse_heads(heads) or OpByOp(heads, backend)

    def propose(self, hidden_SE: Tensor, delta: HeadsDelta | None = None) -> list[Candidates]:
        """Each head's likeliest tokens after each row."""
        drafted = self._ask(hidden_SE, delta)
        tokens, chances = drafted.token_ids_SHK.tolist(), drafted.probabilities_SHK.tolist()
        return [Candidates(*of_row) for of_row in zip(tokens, chances, strict=True)]


@dataclass(frozen=True, slots=True)
class OpByOp:
    """`FusedHeads` on any backend."""

    heads: DraftHeads
    backend: Backend

    @torch.inference_mode()
    def __call__(self, hidden_SE: Tensor, delta: HeadsDelta | None = None) -> Drafted:
        """In the backend's compute dtype; the choice in float32."""
        logits_SHV = self._logits(self._residual(hidden_SE, delta))
        return likeliest(logits_SHV.float(), self.heads.num_candidates, self.heads.vocabulary_V)

    def _residual(self, hidden_SE: Tensor, delta: HeadsDelta | None) -> Tensor:
        rows, width = hidden_SE.shape
        out = self._apply(self.heads.first, hidden_SE, delta)
        x_SHE = hidden_SE[:, None] + silu(out.reshape(rows, self.heads.num_heads, width))
        for layer in self.heads.further:
            blocks = [self._apply(block, x_SHE[:, head].contiguous()) for head, block in enumerate(layer)]
            x_SHE = x_SHE + silu(torch.stack(blocks, dim=1))
        return x_SHE

    def _apply(self, block: DraftBlock, x_SE: Tensor, delta: HeadsDelta | None = None) -> Tensor:
        """W x + b + what adapters add; their pages are for as many heads as there may be, at least those there are."""
        width = block.weight.shape[0]
        room_SN = x_SE.new_zeros((x_SE.shape[0], width if delta is None else sum(delta.pages.slices)))
        out = room_SN[:, :width]
        self.backend.matmul(x_SE, block.weight, out)
        if block.bias_N is not None:
            out.add_(block.bias_N)
        if delta is not None:
            self.backend.add_lora(x_SE, delta.pages, delta.segments, room_SN)
        return out

    def _logits(self, x_SHE: Tensor) -> Tensor:
        rows, heads, width = x_SHE.shape
        num_tokens = self.heads.lm_heads[0].shape[0]
        if len(self.heads.lm_heads) == 1:
            logits = x_SHE.new_empty((rows * heads, num_tokens))
            self.backend.matmul(x_SHE.reshape(-1, width), self.heads.lm_heads[0], logits)
            return logits.view(rows, heads, num_tokens)
        of_heads = [x_SHE.new_empty((rows, num_tokens)) for _ in range(heads)]
        for head, (lm_head, out) in enumerate(zip(self.heads.lm_heads, of_heads, strict=True)):
            self.backend.matmul(x_SHE[:, head].contiguous(), lm_head, out)
        return torch.stack(of_heads, dim=1)


def place_heads(checked: CheckedHeads, backend: Backend, device: torch.device, pack_lm_head: PackLmHead) -> DeviceHeads:
    """Checked heads, on the device."""
    tensors = checked.tensors()

    def block(weights: Sequence[Any], biases: Sequence[Any]) -> DraftBlock:
        dense = torch.cat([torch.from_numpy(weight) for weight in weights])
        zeros = torch.zeros(dense.shape[1])
        parts = [zeros if bias is None else torch.from_numpy(bias) for bias in biases]
        has_bias = any(bias is not None for bias in biases)
        bias_N = torch.cat(parts).to(device, backend.compute_dtype) if has_bias else None
        return DraftBlock(backend.pack_draft(DenseWeight(dense), device), bias_N)

    heads = range(checked.info.num_heads)
    vocabulary = checked.config.draft_vocabulary
    own = [backend.pack_draft(DenseWeight(torch.from_numpy(weight)), device) for weight in tensors.lm_heads]
    lm_heads = own or [pack_lm_head(vocabulary)]
    described = DraftHeads(
        num_heads=len(heads),
        first=block([tensors.weights[head][0] for head in heads], [tensors.biases[head][0] for head in heads]),
        further=[
            [block([tensors.weights[head][layer]], [tensors.biases[head][layer]]) for head in heads]
            for layer in range(1, checked.info.num_layers)
        ],
        lm_heads=lm_heads,
        vocabulary_V=None if vocabulary is None else torch.tensor(vocabulary, device=device),
        num_candidates=min(RANKS, lm_heads[0].shape[0]),
    )
    return DeviceHeads(described, backend, device)
