"""Score mismatching: a denoiser that denoises what is real and nothing else; the student wants to be denoised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidistill.distillation.batch import Batch, column, per_sample
from minidistill.distillation.objective import Terms
from minidistill.distillation.prepare import own_denoiser
from minidistill.distillation.settings import Settings

__all__ = ["ScoreMismatching", "noise_found"]


@dataclass(frozen=True)
class ScoreMismatching(Terms):
    """SMM (Ye 2023): one network that predicts noise, E(x_t), learns

        |E(y_real) - e|^2 + |E(y_fake)|^2,      e the noise that is there,

    and the student |E(x_t) - e|^2 / 2, differentiated through E. At its best E is rho(x) E[e | x, real], rho = p / (p +
    q): a discriminator with the score for a direction. (In the paper E is fitted to another, independent noise at the
    student's samples: the same minimiser, 0, with that noise's variance.) From data alone, with no teacher but its
    weights to begin with, where it has any.

    It does not rest at the real law: where q = p a narrower student is easier to denoise, and has less loss. On a ring
    of eight Gaussians, from new students, it lost one to four of them.

    highest: of the noise levels, log-uniform from settings.sigma_min, in standard deviations of the data; the paper has
        ten levels up to about 0.6.
    r1: of the penalty (sigma^2 / 2) |grad of |E - e|^2 / 2|^2 at real samples, along a random direction as
        `ratios.gradient_penalty`.
    """

    highest: float = 1.0
    r1: float = 0.01
    needs_real = True
    needs_fake = False

    def before_training(self, run: Any, settings: Settings) -> None:
        run.own = own_denoiser(run, settings)

    def noise_levels(self, n: int, settings: Settings, progress: float, generator: torch.Generator) -> Tensor:
        u = torch.rand(n, generator=generator, device=generator.device)
        return settings.sigma_min * (self.highest * settings.sigma_data / settings.sigma_min) ** u

    def critic_loss(self, batch: Batch) -> Tensor:
        xt, _, sigma, label = batch.real_and_fake()
        real, fake = noise_found(batch.own, xt, sigma, label).chunk(2)
        loss = per_sample((real - batch.noise).square()) + per_sample(fake.square())
        if self.r1:
            step, at, real_label = 0.1, xt.chunk(2)[0], None if label is None else label.chunk(2)[0]
            e = torch.randn(at.shape, generator=batch.generator, dtype=xt.dtype, device=xt.device)
            beside = noise_found(batch.own, at + step * column(batch.sigma, at) * e, batch.sigma, real_label)
            change = per_sample((beside - batch.noise).square() - (real - batch.noise).square()) / 2
            loss = loss + self.r1 * (change / step).square() / 2
        return loss

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        found = noise_found(batch.own, batch.xt, batch.sigma, batch.label)
        return {"mismatch": per_sample((found - batch.noise).square()) / 2}


def noise_found(own: Any, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
    """The noise that a denoiser sees in x, (x - D) / sigma, (n, *shape)."""
    return (x - own(x, sigma, label)) / column(sigma, x)
