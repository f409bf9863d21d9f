"""Medusa heads and their training (Medusa-1, arXiv:2401.10774).

    x_0 = hidden state;  x_{l+1} = x_l + SiLU(W_l x_l + b_l);  logits = L x_last
    loss = Σ_h decay^h · mean over positions of CE(logits of head h, token h + 2 places on)

The token counts 1 − softness, the base's whole distribution at its place the rest (`frozen_loss.py`).

L, the base's lm_head over the draft vocabulary, is frozen and shared.

Shape legend: M positions of a step, H heads, E hidden size, V' draft vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from perseid_server.training.medusa.config import HeadsOptions
from perseid_server.training.medusa.frozen_loss import Teacher, frozen_cross_entropy
from perseid_server.training.medusa.positions import Positions


class MedusaHeads:
    """float32 weights [head][layer] [E, E] and biases [E], zero at first: then every head says what the base says."""

    def __init__(self, options: HeadsOptions, hidden_size: int, device: torch.device) -> None:
        layers, size = range(options.num_layers), hidden_size
        self.weights = [
            [torch.zeros((size, size), device=device, requires_grad=True) for _ in layers]
            for _ in range(options.num_heads)
        ]
        self.biases = [
            [torch.zeros(size, device=device, requires_grad=True) for _ in layers] for _ in range(options.num_heads)
        ]

    @property
    def parameters(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        return [one for part in (self.weights, self.biases) for of_head in part for one in of_head]

    def states(self, hidden_ME: Tensor) -> list[Tensor]:
        """What each head multiplies the lm_head by, H times float32 [M, E]."""
        return [self._state(head, hidden_ME.float()) for head in range(len(self.weights))]

    def _state(self, head: int, x_ME: Tensor) -> Tensor:
        for weight_EE, bias_E in zip(self.weights[head], self.biases[head], strict=True):
            x_ME = x_ME + functional.silu(functional.linear(x_ME, weight_EE, bias_E))
        return x_ME

    def tensors(self) -> dict[str, Tensor]:
        """In Medusa v2's names, float16 on the host."""
        named = {
            f"{head}.{layer}.linear.{name}": one
            for name, part in (("weight", self.weights), ("bias", self.biases))
            for head, of_head in enumerate(part)
            for layer, one in enumerate(of_head)
        }
        return {name: one.detach().to("cpu", torch.float16).contiguous() for name, one in named.items()}


@dataclass(frozen=True, slots=True)
class StepReport:
    """Mean cross-entropy of each head, in nats."""

    losses: tuple[float, ...]


class HeadsTrainer:
    """Takes steps over positions in an order that the seed and the step's number decide."""

    def __init__(self, options: HeadsOptions, positions: Positions, lm_head_VE: Tensor, num_steps: int) -> None:
        self._options, self._positions = options, positions
        self._lm_head_VE = lm_head_VE
        self.num_steps = num_steps
        self.step_number = 0
        self.heads = MedusaHeads(options, positions.hidden_ME.shape[1], lm_head_VE.device)
        self._optimizer = torch.optim.AdamW(
            self.heads.parameters, lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=options.weight_decay
        )

    def step(self) -> StepReport:
        """One step of the optimizer."""
        options, device = self._options, self._lm_head_VE.device
        chosen_M = self._chosen(self.step_number)
        targets_MH = self._positions.targets_MH[chosen_M].to(device)
        states = self.heads.states(self._positions.hidden_ME[chosen_M].to(device))
        losses = [
            frozen_cross_entropy(state_ME, self._lm_head_VE, targets_MH[:, head], self._teacher(chosen_M, head))
            for head, state_ME in enumerate(states)
        ]
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._optimizer.zero_grad(set_to_none=True)
        torch.stack([options.decay**head * loss for head, loss in enumerate(losses)]).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.heads.parameters, options.clip)
        self._optimizer.step()
        self.step_number += 1
        return StepReport(tuple(float(loss.detach()) for loss in losses))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "parameters": [one.detach() for one in self.heads.parameters],
            "optimizer": self._optimizer.state_dict(),
            "step": self.step_number,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        with torch.no_grad():
            for parameter, held in zip(self.heads.parameters, state["parameters"], strict=True):
                parameter.copy_(held)
        self._optimizer.load_state_dict(state["optimizer"])
        self.step_number = state["step"]

    def _learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        warm_up = max(1, round(self._options.warm_up * self.num_steps))
        rate, step = self._options.learning_rate, self.step_number
        if step < warm_up:
            return rate * (step + 1) / warm_up
        return rate * (1 + math.cos(math.pi * (step - warm_up) / max(self.num_steps - warm_up, 1))) / 2

    def _teacher(self, chosen_M: Tensor, head: int) -> Teacher | None:
        """The states from which the head's targets were told."""
        if not self._options.softness:
            return None
        device = self._lm_head_VE.device
        rows_M, known_M = self._positions.told_by(chosen_M, head)
        return Teacher(self._positions.hidden_ME[rows_M].to(device), (self._options.softness * known_M).to(device))

    def _chosen(self, step: int) -> Tensor:
        """Positions of a step, int64 [M]: every round takes all of them in an order of its own."""
        count, size = len(self._positions), min(self._options.batch, len(self._positions))
        per_round = count // size  # what is left over is among the next round's
        order = torch.randperm(
            count, generator=torch.Generator().manual_seed(self._options.seed * 1_000_003 + step // per_round)
        )
        place = step % per_round * size
        return order[place : place + size]
