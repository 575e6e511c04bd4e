"""What an objective sees: one batch of the student's samples, noised, and the networks to compare them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.networks import Correction
from minidistill.networks.draws import Entrance

__all__ = ["Batch", "column", "dmd_scale", "no_weights", "per_sample"]


@dataclass
class Batch:
    """The student's samples x0, to be noised to x0 + sigma * noise, and everything to hold them against.

    In `generator_loss` x0 carries the graph back to the student and gradients pass through `teacher`, `fake`, `ratio`
    and `own` without reaching their weights; in `critic_loss` x0 is detached. What an objective did not ask for
    (`Needs`) is None.
    """

    x0: Tensor  # (n, *shape) the student's samples; zeros if needs_samples is False
    sigma: Tensor  # (n,) noise levels, in data units
    noise: Tensor  # (n, *shape) standard normal
    teacher: Callable[..., Tensor]  # D_p(x, sigma, label)
    fake: Any = None  # D_q(x, sigma, label), the denoiser of the student's own samples; callable
    label: Tensor | None = None  # (n,) the classes that x0 was asked for; None for an unconditional teacher
    ratio: Callable[..., Tensor] | None = None  # (x, sigma, label) -> (n,), the learned log p_sigma / q_sigma
    real: Tensor | None = None  # (n, *shape) the teacher's samples or data
    real_label: Tensor | None = None  # (n,) their classes
    sigma_data: float = 1.0  # the data's standard deviation: what losses are made free of units with
    uniform: Tensor | None = None  # (n,) numbers in [0, 1), for objectives that draw a parameter
    pair_x0: Tensor | None = None  # (n, *shape) what the student makes of the pairs' noise, with its graph
    pair_y: Tensor | None = None  # (n, *shape) what the teacher's sampler made of the same noise
    pair_z: Tensor | None = None  # (n, *shape) that noise, standard normal
    pair_label: Tensor | None = None  # (n,) the pairs' classes
    student: Callable[..., Tensor] | None = None  # (x, sigma, label) -> (n, *shape): the student called at any level,
    # and with to=..., aim=True what `Generator` documents under those names
    frozen: Callable[..., Tensor] | None = None  # the same for targets without gradient, and for derivatives in x and
    # the levels: the bare network, which several processes need not compute in step
    target: Callable[..., Tensor] | None = None  # the same of its average, without gradient (needs_target)
    second_teacher: Callable[..., Tensor] | None = None  # another D(x, sigma, label) (needs_second_teacher)
    own: Any = None  # a network that the objective itself put there before training (`prepare.Run.own`)
    entry: Entrance | None = None  # what the student's call for x0 was given; None in the critic's step
    progress: float = 0.0  # how much of the run is over, 0 to 1
    generator: torch.Generator | None = None  # for draws of the objective's own, on x0's device

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


def per_sample(values: Tensor) -> Tensor:
    """Sum over everything but the first axis: (n, *shape) -> (n,)."""
    return values.flatten(1).sum(1)


def column(values: Tensor, x: Tensor) -> Tensor:
    """(n,) -> (n, 1, ...), to go with samples x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def dmd_scale(x0: Tensor, teacher_x0: Tensor, sigma_data: float = 1.0) -> Tensor:
    """sigma_data / mean|x0 - D_teacher|, (n, 1, ..., 1), without gradient: the normaliser of DMD (Yin 2024, equation
    8), which makes every noise level pull about equally hard. The mean is at least 1e-5 sigma_data, as in SiD's
    code."""
    gap = (x0 - teacher_x0).detach().abs().flatten(1).mean(1) / sigma_data
    return (1 / gap.clamp(min=1e-5)).reshape(-1, *[1] * (x0.ndim - 1))


def no_weights(x0: Tensor) -> Tensor:
    """The scale 1 for every sample, shaped to multiply x0."""
    return torch.ones((len(x0), *[1] * (x0.ndim - 1)), dtype=x0.dtype, device=x0.device)
