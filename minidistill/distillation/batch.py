"""What an objective sees: one batch of the student's samples, noised, and the networks to compare them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill import _validate


@dataclass
class Batch:
    """x0 (n, *shape) from the student, to be noised to x0 + sigma * noise.

    In `generator_loss`, x0 carries the graph back to the student; in `critic_loss` it is detached.
    """

    x0: Tensor
    sigma: Tensor  # (n,)
    noise: Tensor  # like x0
    teacher: Callable[..., Tensor]
    fake: Callable[..., Tensor]
    label: Tensor | None = None
    ratio: Callable[..., Tensor] | None = None  # the discriminator's logit, about log p / q, (n,)
    real: Tensor | None = None  # (n, *shape) the teacher's samples or data, for the ratio
    real_label: Tensor | None = None
    sigma_data: float = 1.0

    @property
    def xt(self) -> Tensor:
        """The noised samples, (n, *shape)."""
        return self.x0 + _validate.broadcast_sigma(self.sigma, self.x0) * self.noise

    def denoise_both(self, xt: Tensor) -> tuple[Tensor, Tensor]:
        """(D_teacher, D_fake) at xt, each (n, *shape)."""
        return self.teacher(xt, self.sigma, self.label), self.fake(xt, self.sigma, self.label)


def per_sample(values: Tensor) -> Tensor:
    """Sum over everything but the first axis: (n, *shape) -> (n,)."""
    return values.flatten(1).sum(1)


def dmd_scale(x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """1 / mean|x0 - D_teacher|, (n, 1, ..., 1), without gradient: the normaliser of DMD (Yin 2024, equation 8),
    which makes every noise level pull about equally hard."""
    gap = (x0 - teacher_x0).detach().abs().flatten(1).mean(1).clamp(min=1e-3)
    return (1 / gap).reshape(-1, *[1] * (x0.ndim - 1))


def no_weights(x0: Tensor) -> Tensor:
    """The scale 1 for every sample, shaped to multiply x0."""
    return torch.ones((len(x0), *[1] * (x0.ndim - 1)), dtype=x0.dtype, device=x0.device)
