"""Cross-entropy through a projection that is not trained, against tokens and against a teacher.

    L = mean over positions of  −Σ_v q[v] · log softmax(x Wᵀ)[v],   q = (1 − s) · 1[v = target] + s · softmax(t Wᵀ)[v]

t is the state from which the target itself was told: what the base thought of all tokens there, of which the target is
one. A small data set says more that way (Hinton et al., arXiv:1503.02531). s is 0 where there is no such state.

The gradient of the projection's input is known as soon as the logits are, so it is computed in the forward pass, and
the logits, by far the largest tensor of a step, are never kept. In bfloat16 (where the projection is) the products
take a fraction of the time; the softmax is float32.

Shape legend: M positions, E hidden size, V' classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Teacher:
    """States from which targets were told, and how much their distribution counts there."""

    states_ME: Tensor
    softness_M: Tensor  # float32, s


def frozen_cross_entropy(x_ME: Tensor, weight_VE: Tensor, targets_M: Tensor, teacher: Teacher | None = None) -> Tensor:
    """L over the positions whose target is not negative; 0 where there are none. The value that is returned is that
    against the targets alone, to be compared between runs; the gradient is L's.

    x float32 [M, E]; weight float32 or bfloat16 [V', E], gets no gradient; targets int64 [M].
    """
    states_ME = None if teacher is None else teacher.states_ME
    softness_M = None if teacher is None else teacher.softness_M
    return _FrozenCrossEntropy.apply(  # type: ignore[no-any-return, no-untyped-call]
        x_ME, weight_VE, targets_M, states_ME, softness_M
    )


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ME: Tensor,
        weight_VE: Tensor,
        targets_M: Tensor,
        states_ME: Tensor | None,
        softness_M: Tensor | None,
    ) -> Tensor:
        known = (targets_M >= 0).nonzero()[:, 0]
        gradient_ME = torch.zeros_like(x_ME)
        ctx.save_for_backward(gradient_ME)
        if not len(known):
            return x_ME.new_zeros(())
        targets_K = targets_M[known, None]
        logits_KV = _logits(x_ME[known], weight_VE)
        target_logits_K = logits_KV.gather(1, targets_K)[:, 0]
        normalizer_K = logits_KV.logsumexp(1)
        shares_KV = logits_KV.sub_(normalizer_K[:, None]).exp_()
        hardness_K1 = shares_KV.new_ones((len(known), 1))
        if states_ME is not None and softness_M is not None:
            softness_K1 = softness_M[known, None]
            shares_KV -= _logits(states_ME[known], weight_VE).softmax(1).mul_(softness_K1)
            hardness_K1 = 1.0 - softness_K1
        shares_KV.scatter_add_(1, targets_K, -hardness_K1)
        gradient_ME[known] = (shares_KV.to(weight_VE.dtype) @ weight_VE).float() / len(known)
        return (normalizer_K - target_logits_K).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient_ME,) = ctx.saved_tensors
        return gradients[0] * gradient_ME, None, None, None, None


def _logits(x_ME: Tensor, weight_VE: Tensor) -> Tensor:
    return (x_ME.to(weight_VE.dtype) @ weight_VE.T).float()
