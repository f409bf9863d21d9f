"""The second stage: gates trained through the whole model, on its own routing (MeteoRA's joint loss).

    L = −mean over answer tokens of log p(token) + β · mean over gates of Σ_t w_t · −log softmax(l_t)[label_t]

The base and the adapters are frozen, the gradient goes to the gates alone. With k = 1 the weight of what is chosen is 1
whatever its logit, so the first term would teach nothing: k is at least 2.

Shape legend: T rows, P projections, C columns, L rows that predict an answer's token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from perseid_router.training.features import balanced_weights
from perseid_router.training.trainer import GateTrainer
from perseid_server.errors import InvalidRequest
from perseid_server.training.samples import Sample
from perseid_server.training.torch_decoder import Forward, Routing, TorchDecoder, unpacked
from perseid_server.training.workbench import Workbench

LEARNING_RATE = 2e-4
LONGEST_GRADIENT = 1.0


@dataclass(frozen=True, slots=True)
class JointReport:
    """One step's two losses."""

    language: float
    gates: float


class JointTrainer:
    """Goes on with a trainer's gates. `close` makes them plain tensors again."""

    def __init__(
        self, bench: Workbench, trainer: GateTrainer, *, k: int, temperature: float, beta: float, null_weight: float
    ) -> None:
        if k < 2:
            raise InvalidRequest(f"--joint with k {k}: with one column its weight is always 1; expected k of 2 or more")
        self._decoder: TorchDecoder = unpacked(bench)
        self._trainer = trainer
        self._null = bench.null
        self._routing = Routing(self._logits, k, temperature)
        self._beta, self._null_weight = beta, null_weight
        self.num_steps = 0
        self._parameters = [*trainer.weights.values(), *trainer.biases.values()]
        for parameter in self._parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(self._parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)

    def close(self) -> None:
        """Let the gates go."""
        for parameter in self._parameters:
            parameter.requires_grad_(False)
            parameter.grad = None

    def step(self, samples: Sequence[Sample]) -> JointReport:
        """One step on some samples, all in one pass."""
        forward = self.forward(samples)
        language, gates = self._language_loss(forward, samples), self._gate_loss(forward, samples)
        self._optimizer.zero_grad()
        (language + self._beta * gates).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, LONGEST_GRADIENT)
        self._optimizer.step()
        self.num_steps += 1
        return JointReport(float(language.detach()), float(gates.detach()))

    def forward(self, samples: Sequence[Sample]) -> Forward:
        """A pass with the gates' own routing."""
        device = self._decoder.embedding_VE.device

        def longs(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return self._decoder.forward(
            longs([token for sample in samples for token in sample.token_ids]),
            longs([place for sample in samples for place in range(len(sample))]),
            longs([index for index, sample in enumerate(samples) for _ in range(len(sample))]),
            self._routing,
        )

    def state(self) -> dict[str, Any]:
        """Beside the trainer's: what a resumed run needs."""
        return {"num_steps": self.num_steps, "optimizer": self._optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.num_steps = int(state["num_steps"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _logits(self, layer: int, fused: str, x_TK: Tensor) -> Tensor | None:
        linear = self._trainer.linears.get(fused)
        if linear is None or not any(linear.gated[layer]):
            return None
        return self._trainer.logits(layer, fused, x_TK)

    def _language_loss(self, forward: Forward, samples: Sequence[Sample]) -> Tensor:
        flags = [sample.predicts_answer(place) for sample in samples for place in range(len(sample))]
        following = [token for sample in samples for token in (*sample.token_ids[1:], 0)]
        device = forward.hidden_TE.device
        rows_L = torch.tensor([row for row, flag in enumerate(flags) if flag], dtype=torch.int64, device=device)
        targets_L = torch.tensor(following, dtype=torch.int64, device=device)[rows_L]
        return functional.cross_entropy(self._decoder.logits(forward.hidden_TE[rows_L]), targets_L)

    def _gate_loss(self, forward: Forward, samples: Sequence[Sample]) -> Tensor:
        device = forward.hidden_TE.device
        labels_T = torch.tensor([column for sample in samples for column in sample.columns], device=device)
        teaches = torch.tensor([train for sample in samples for train in sample.train], device=device)
        rows = teaches.nonzero().squeeze(1)
        weights_R = balanced_weights(labels_T[rows], self._null + 1, self._null_weight)
        losses = []
        for layer, fused, logits in forward.gates:
            gated = self._trainer.linears[fused].gated[layer]
            for place, has_gate in enumerate(gated):
                if has_gate:
                    each = functional.cross_entropy(logits[rows, place], labels_T[rows], reduction="none")
                    losses.append(weights_R @ each)
        return torch.stack(losses).mean()
