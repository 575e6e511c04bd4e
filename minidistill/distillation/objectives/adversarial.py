"""The adversarial term that DMD2, f-distill and SiDA have in common."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

from minidistill.distillation.batch import Batch

__all__ = ["adversarial"]


def adversarial(logit: Tensor, batch: Batch, scale: Tensor) -> Tensor:
    """(sigma / sigma_data)^2 scale softplus(-logit), (n,), for a logit about log r at x_t: (n,), or (n, h, w) and then
    its places' mean.

    At the exact ratio softplus(-logit) = log(1 + 1/r) pulls along (s_p - s_q) / (1 + r), the gradient of the softened
    reverse KL; the factors make that commensurable with the score term at every noise level. Derived here.
    """
    loss = softplus(-logit)
    loss = loss if loss.ndim == 1 else loss.flatten(1).mean(1)
    return scale.flatten() * (batch.sigma / batch.sigma_data).square() * loss
