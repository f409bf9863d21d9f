"""Cross-entropy through a projection that is not trained.

The gradient of the projection's input is known as soon as the logits are, so it is computed in the forward pass, and
the logits, by far the largest tensor of a step, are never kept. In bfloat16 (where the projection is) the two products
take a fraction of the time; the softmax is float32.

Shape legend: M positions, E hidden size, V' classes.
"""

from typing import Any

import torch
from torch import Tensor


def frozen_cross_entropy(x_ME: Tensor, weight_VE: Tensor, targets_M: Tensor) -> Tensor:
    """Mean of −log softmax(x Wᵀ)[target] over the positions whose target is not negative; 0 where there are none.

    x float32 [M, E]; weight float32 or bfloat16 [V', E], gets no gradient; targets int64 [M].
    """
    return _FrozenCrossEntropy.apply(x_ME, weight_VE, targets_M)  # type: ignore[no-any-return, no-untyped-call]


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ME: Tensor, weight_VE: Tensor, targets_M: Tensor) -> Tensor:
        known = (targets_M >= 0).nonzero()[:, 0]
        gradient_ME = torch.zeros_like(x_ME)
        ctx.save_for_backward(gradient_ME)
        if not len(known):
            return x_ME.new_zeros(())
        targets_K = targets_M[known, None]
        logits_KV = (x_ME[known].to(weight_VE.dtype) @ weight_VE.T).float()
        target_logits_K = logits_KV.gather(1, targets_K)[:, 0]
        normalizer_K = logits_KV.logsumexp(1)
        shares_KV = logits_KV.sub_(normalizer_K[:, None]).exp_()
        shares_KV.scatter_add_(1, targets_K, shares_KV.new_full(targets_K.shape, -1.0))
        gradient_ME[known] = (shares_KV.to(weight_VE.dtype) @ weight_VE).float() / len(known)
        return (normalizer_K - target_logits_K).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ME,) = ctx.saved_tensors
        return gradients[0] * gradient_ME, None, None
