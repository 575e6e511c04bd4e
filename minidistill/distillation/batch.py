"""What an objective sees: one batch of the student's samples, noised, and the networks to compare them with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.networks import Correction

__all__ = ["Batch", "Terms", "dmd_scale", "no_weights", "per_sample", "term_gradients"]


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
    real: Tensor | None = None  # (n, *shape) the teacher's samples or data, for objectives with a critic of samples
    real_label: Tensor | None = None
    sigma_data: float = 1.0
    uniform: Tensor | None = None  # (n,) numbers in [0, 1), for objectives that draw a parameter
    pair_x0: Tensor | None = None  # (n, *shape) what the student makes of the pairs' noise, with its graph
    pair_y: Tensor | None = None  # (n, *shape) what the teacher's sampler made of the same noise

    @property
    def xt(self) -> Tensor:
        """The noised samples, (n, *shape)."""
        return self.x0 + _validate.broadcast_sigma(self.sigma, self.x0) * self.noise

    def denoise_both(self, xt: Tensor) -> tuple[Tensor, Tensor]:
        """(D_teacher, D_fake) at xt, each (n, *shape)."""
        teacher_x0 = self.teacher(xt, self.sigma, self.label)
        if isinstance(self.fake, Correction) and self.fake.teacher is self.teacher:  # it would be called twice
            return teacher_x0, teacher_x0 + self.fake.learned(xt, self.sigma, self.label)
        return teacher_x0, self.fake(xt, self.sigma, self.label)

    def real_and_fake(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(x_t, x0, sigma, label) of the real samples and then the student's, (2n, ...). Both get the same noise and
        level, which cancels some of the variance of a loss that compares them."""
        assert self.real is not None
        x0, xt = torch.cat([self.real, self.x0]), self.xt
        xt = torch.cat([self.real + (xt - self.x0), xt])
        label = None if self.label is None or self.real_label is None else torch.cat([self.real_label, self.label])
        return xt, x0, self.sigma.repeat(2), label


class Terms:
    """An objective whose generator loss is a sum of named terms, so that each one's gradient can be looked at."""

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def generator_loss(self, batch: Batch) -> Tensor:
        return reduce(torch.add, self.terms(batch).values())


def term_gradients(objective: Any, batch: Batch, wrt: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The gradient of each term's batch mean in `wrt`: the student's parameters, or `[batch.x0]` for the pull on
    each sample. Zeros where a term does not reach."""
    terms = objective.terms(batch)
    return {
        name: list(torch.autograd.grad(term.mean(), wrt, retain_graph=True, allow_unused=True, materialize_grads=True))
        for name, term in terms.items()
    }


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
