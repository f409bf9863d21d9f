"""The cheap stage: every gate is a softmax classifier of its own on its linear's detached input (MeteoRA).

    l = Ĝ (x / r) + b        r_k = √(mean of x_k²): inputs of all linears and dimensions are alike to the optimiser
    loss = Σ_t w_t · −log softmax(l_t)[label_t]        for each gate by itself

With p = softmax(l) the gradient is closed: ∂/∂Ĝ = Σ_t w_t (p_t − onehot_t) (x_t / r)ᵀ, ∂/∂b = Σ_t w_t (p_t − onehot_t),
taken while the pass goes on. What is served is G = Ĝ / r.

Shape legend: L layers, P projections of a fused linear, C columns, K inputs, R rows.
Source: MeteoRA (arXiv:2405.13053), its cross entropy without the language model's loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perseid_router.training.features import Batch, FusedGates
from perseid_router.training.options import TrainingOptions

MeanSquares = Mapping[str, Tensor]
"""By fused linear: [L, K]."""

_SMALLEST_SQUARE = 1e-8


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step, averaged over all gates."""

    loss: float
    accuracy: float  # weighted as the loss is, so every column counts the same
    learning_rate: float


class GateTrainer:
    """All gates of a set. `calibrate` first, then `step` until `options.steps`; resumable between steps."""

    def __init__(
        self, linears: Sequence[FusedGates], num_columns: int, options: TrainingOptions, device: torch.device
    ) -> None:
        self.linears = {linear.fused: linear for linear in linears}
        self.num_columns = num_columns
        self.options = options
        self.num_steps = 0
        generator = torch.Generator().manual_seed(options.seed)
        self.weights: dict[str, Tensor] = {}  # Ĝ, [L, P · C, K]
        self.biases: dict[str, Tensor] = {}  # [L, P · C]
        self.mean_squares: dict[str, Tensor] = {}  # r², [L, K]
        for linear in linears:
            layers, rows = len(linear.gated), len(linear.projections) * num_columns
            drawn = torch.randn((layers, rows, linear.num_inputs), generator=generator) * options.init_std
            self.weights[linear.fused] = drawn.to(device)
            self.biases[linear.fused] = torch.zeros((layers, rows), device=device)
            self.mean_squares[linear.fused] = torch.ones((layers, linear.num_inputs), device=device)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": list(self.weights.values()), "weight_decay": options.weight_decay},
                {"params": list(self.biases.values()), "weight_decay": 0.0},
            ],
            lr=options.learning_rate,
            betas=(0.9, 0.99),
        )

    def calibrate(self, mean_squares: MeanSquares) -> None:
        """Take r² from what `mean_squares_of` found."""
        for fused, held in self.mean_squares.items():
            held.copy_(mean_squares[fused].clamp_min(_SMALLEST_SQUARE))

    @torch.no_grad()
    def step(self, batch: Batch) -> StepReport:
        """One pass and one step of AdamW."""
        gradients = {fused: torch.zeros_like(weight) for fused, weight in self.weights.items()}
        bias_gradients = {fused: torch.zeros_like(bias) for fused, bias in self.biases.items()}
        labels_R, weights_R = batch.labels_R, batch.weights_R
        losses: list[Tensor] = []
        hits: list[Tensor] = []

        def observe(layer: int, fused: str, x_RK: Tensor) -> None:
            scaled_RK = x_RK.float() * self.mean_squares[fused][layer].rsqrt()
            logits = self._logits(layer, fused, scaled_RK)
            mask_P = self._mask(layer, fused)
            log_p = logits.log_softmax(-1)
            chosen = labels_R[:, None, None].expand(-1, log_p.shape[1], 1)
            losses.append(-(weights_R @ log_p.gather(2, chosen).squeeze(2))[mask_P])
            hits.append((weights_R @ (logits.argmax(-1) == labels_R[:, None]).float())[mask_P])
            error = log_p.exp()
            error.scatter_add_(2, chosen, error.new_full(chosen.shape, -1.0))
            error *= weights_R[:, None, None] * mask_P[:, None]
            flat = error.flatten(1)
            gradient, bias_gradient = flat.T @ scaled_RK, flat.sum(0)
            scale = _clip_scale(gradient, bias_gradient, self.options.clip)
            gradients[fused][layer] = gradient * scale
            bias_gradients[fused][layer] = bias_gradient * scale

        batch.show(observe)
        rate = self.options.learning_rate_at(self.num_steps)
        self._apply(gradients, bias_gradients, rate)
        self.num_steps += 1
        return StepReport(float(torch.cat(losses).mean()), float(torch.cat(hits).mean()), rate)

    def logits(self, layer: int, fused: str, x_RK: Tensor) -> Tensor:
        """Gate logits of inputs as the linear sees them, float32 [R, P, C]."""
        return self._logits(layer, fused, x_RK.float() * self.mean_squares[fused][layer].rsqrt())

    def served(self, fused: str) -> tuple[Tensor, Tensor]:
        """(G [L, P · C, K], b [L, P · C]) for inputs as the linears see them."""
        return self.weights[fused] * self.mean_squares[fused].rsqrt()[:, None], self.biases[fused]

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, for `torch.save`."""
        return {
            "num_steps": self.num_steps,
            **{
                name: {fused: held.detach() for fused, held in getattr(self, name).items()}
                for name in ("weights", "biases", "mean_squares")
            },
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.num_steps = int(state["num_steps"])
        for name in ("weights", "biases", "mean_squares"):
            for fused, held in getattr(self, name).items():
                held.copy_(state[name][fused])
        self._optimizer.load_state_dict(state["optimizer"])

    def _logits(self, layer: int, fused: str, scaled_RK: Tensor) -> Tensor:
        flat = torch.addmm(self.biases[fused][layer], scaled_RK, self.weights[fused][layer].T)
        return flat.view(len(flat), len(self.linears[fused].projections), self.num_columns)

    def _mask(self, layer: int, fused: str) -> Tensor:
        return torch.tensor(self.linears[fused].gated[layer], device=self.biases[fused].device)

    def _apply(self, gradients: dict[str, Tensor], bias_gradients: dict[str, Tensor], rate: float) -> None:
        for fused in self.weights:
            self.weights[fused].grad = gradients[fused]
            self.biases[fused].grad = bias_gradients[fused]
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()


def mean_squares_of(batches: Sequence[Batch], linears: Sequence[FusedGates], device: torch.device) -> MeanSquares:
    """The mean of x_k² in every gated linear, [L, K]. Rows count by their weights."""
    sums = {linear.fused: torch.zeros((len(linear.gated), linear.num_inputs), device=device) for linear in linears}
    for batch in batches:
        weights_R = batch.weights_R / len(batches)

        def observe(layer: int, fused: str, x_RK: Tensor, weights_R: Tensor = weights_R) -> None:
            sums[fused][layer] += weights_R @ x_RK.float().square()

        batch.show(observe)
    return sums


def _clip_scale(gradient: Tensor, bias_gradient: Tensor, longest: float) -> Tensor:
    norm = (gradient.square().sum() + bias_gradient.square().sum()).sqrt()
    return (longest / norm.clamp_min(1e-12)).clamp_max(1.0)
