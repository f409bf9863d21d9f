"""Medusa heads on the device.

    x_h = r_L(… r_1(x)),   r_l(x) = x + SiLU(W_{h,l} x + b_{h,l})        residual blocks of head h, x the hidden state
    logits_h = lm_head_h x_h                                            over the draft vocabulary
    p_h = softmax(logits_h)

x is the base's last hidden state after the final norm. Source: Medusa (Cai et al., arXiv:2401.10774), section 3.1. The
first blocks of all heads share their input and are one product; heads that share the lm_head are rows of one product.

Shape legend: S sequences, H heads, E hidden size, V draft vocabulary, K candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from perseid_kernels.backend import Backend
from perseid_kernels.weights import DenseWeight
from perseid_server.speculation.draft import Candidates
from perseid_server.speculation.heads_config import MAX_HEADS, RANKS
from perseid_server.speculation.heads_file import CheckedHeads

AddDelta = Callable[[Tensor, Tensor], None]
"""out [S, MAX_HEADS · E] += the adapters' low-rank products of x [S, E], for as many heads as adapters can change."""

PackLmHead = Callable[[tuple[int, ...] | None], Any]
"""The base's lm_head in the backend's layout, only these rows of it, ascending; None: all."""


@dataclass(frozen=True, slots=True)
class _Block:
    """W of one or several heads, one below the other."""

    weight: Any  # packed [N, E]
    bias_N: Tensor | None

    def apply(self, backend: Backend, x_SE: Tensor, room_SN: Tensor | None = None) -> Tensor:
        """W x + b; into the first columns of `room`, if given."""
        width = self.weight.shape[0]
        out = x_SE.new_empty((x_SE.shape[0], width)) if room_SN is None else room_SN[:, :width]
        backend.matmul(x_SE.contiguous(), self.weight, out)
        return out if self.bias_N is None else out.add_(self.bias_N)


@dataclass(frozen=True, slots=True)
class DeviceHeads:
    """Frozen, like the base they look at."""

    backend: Backend
    device: torch.device
    num_heads: int
    first: _Block  # [H · E, E]
    further: tuple[tuple[_Block, ...], ...]  # [layer − 1][head]
    lm_heads: tuple[Any, ...]  # packed [V, E]; one for all heads, or one for each
    vocabulary_V: Tensor | None  # int64; None: the base's

    @torch.inference_mode()
    def propose(self, hidden_SE: Tensor, add_delta: AddDelta | None = None) -> list[Candidates]:
        """Each head's likeliest tokens after each row."""
        x_SHE = self._residual(hidden_SE, add_delta)
        probabilities, tokens = self._likeliest(self._logits(x_SHE))
        return [
            Candidates(of_row, chances) for of_row, chances in zip(tokens.tolist(), probabilities.tolist(), strict=True)
        ]

    def _residual(self, hidden_SE: Tensor, add_delta: AddDelta | None) -> Tensor:
        rows, width = hidden_SE.shape
        room = None if add_delta is None else hidden_SE.new_zeros((rows, MAX_HEADS * width))
        out = self.first.apply(self.backend, hidden_SE, room)
        if add_delta is not None and room is not None:
            add_delta(hidden_SE, room)
        x_SHE = hidden_SE[:, None] + silu(out.reshape(rows, self.num_heads, width))
        for layer in self.further:
            blocks = [block.apply(self.backend, x_SHE[:, head]) for head, block in enumerate(layer)]
            x_SHE = x_SHE + silu(torch.stack(blocks, dim=1))
        return x_SHE

    def _logits(self, x_SHE: Tensor) -> Tensor:
        rows, heads, width = x_SHE.shape
        num_tokens = self.lm_heads[0].shape[0]
        logits = torch.empty((rows, heads, num_tokens), dtype=x_SHE.dtype, device=x_SHE.device)
        if len(self.lm_heads) == 1:
            self.backend.matmul(x_SHE.reshape(-1, width), self.lm_heads[0], logits.view(-1, num_tokens))
            return logits.float()
        for head, lm_head in enumerate(self.lm_heads):
            of_head = torch.empty((rows, num_tokens), dtype=x_SHE.dtype, device=x_SHE.device)
            self.backend.matmul(x_SHE[:, head].contiguous(), lm_head, of_head)
            logits[:, head] = of_head
        return logits.float()

    def _likeliest(self, logits_SHV: Tensor) -> tuple[Tensor, Tensor]:
        """(probabilities, token ids), [S, H, K] each; broken numbers become no probability."""
        largest, places = logits_SHV.topk(min(RANKS, logits_SHV.shape[-1]), dim=-1)
        probabilities = (largest - logits_SHV.logsumexp(dim=-1, keepdim=True)).exp().nan_to_num(nan=0.0, posinf=0.0)
        tokens = places if self.vocabulary_V is None else self.vocabulary_V[places]
        return probabilities, tokens


def place_heads(checked: CheckedHeads, backend: Backend, device: torch.device, pack_lm_head: PackLmHead) -> DeviceHeads:
    """Checked heads, on the device."""
    tensors = checked.tensors()

    def block(weights: Sequence[Any], biases: Sequence[Any]) -> _Block:
        dense = torch.cat([torch.from_numpy(weight) for weight in weights])
        zeros = torch.zeros(dense.shape[1])
        parts = [zeros if bias is None else torch.from_numpy(bias) for bias in biases]
        has_bias = any(bias is not None for bias in biases)
        bias_N = torch.cat(parts).to(device, backend.compute_dtype) if has_bias else None
        return _Block(backend.pack(DenseWeight(dense), device), bias_N)

    heads = range(checked.info.num_heads)
    vocabulary = checked.config.draft_vocabulary
    lm_heads = [backend.pack(DenseWeight(torch.from_numpy(weight)), device) for weight in tensors.lm_heads]
    return DeviceHeads(
        backend=backend,
        device=device,
        num_heads=len(heads),
        first=block([tensors.weights[head][0] for head in heads], [tensors.biases[head][0] for head in heads]),
        further=tuple(
            tuple(block([tensors.weights[head][layer]], [tensors.biases[head][layer]]) for head in heads)
            for layer in range(1, checked.info.num_layers)
        ),
        lm_heads=tuple(lm_heads) or (pack_lm_head(vocabulary),),
        vocabulary_V=None if vocabulary is None else torch.tensor(vocabulary, device=device),
    )
