"""Objectives with one thing changed, to find out what it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidistill.distillation import Batch, Terms
from minidistill.distillation.batch import dmd_scale, per_sample
from minidistill.distillation.objective import Through
from minidistill.distillation.objectives import fake_loss
from minidistill.distillation.settings import Settings
from minidistill.score_matching import log_uniform_sigma

__all__ = ["LargeLevelsFirst", "PartlyFrozen", "SmoothFake"]


@dataclass(frozen=True)
class PartlyFrozen(Terms):
    """`sim_l2` without the gradient through one of its two parts: the gap y = D_q - D_p, or D_q in the residual. With
    both frozen it has reverse KL's gradient."""

    frozen: str  # "y" or "D_q"

    def critic_loss(self, batch: Batch) -> Tensor:
        return fake_loss(batch)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        teacher_x0, fake_x0 = batch.denoise_both(batch.xt)
        y, scale = fake_x0 - teacher_x0, dmd_scale(batch.x0, teacher_x0, batch.sigma_data)
        y, fake_x0 = (y.detach(), fake_x0) if self.frozen == "y" else (y, fake_x0.detach())
        return {"implicit": -2 * per_sample(scale * y * (fake_x0 - batch.x0)) / batch.sigma_data**2}


@dataclass(frozen=True)
class LargeLevelsFirst(Through):
    """An objective whose lowest noise level comes down, from sigma_data to where it is usually, in the first `share` of
    the run."""

    objective: Any
    share: float = 0.5

    def noise_levels(self, n: int, settings: Settings, progress: float, generator: torch.Generator) -> Tensor:
        above = settings.sigma_data / settings.sigma_min
        least = settings.sigma_min * above ** max(0.0, 1 - progress / self.share)
        return log_uniform_sigma(n, least, settings.sigma_max, generator, generator.device)


@dataclass(frozen=True)
class SmoothFake(Through):
    """An objective whose fake network also pays for its slope: weight times |D_q(x + h) - D_q(x)|^2 / |h|^2 at the
    student's noised samples, h a tenth of the noise in a random direction."""

    objective: Any
    weight: float = 0.1

    def critic_loss(self, batch: Batch) -> Tensor:
        h = 0.1 * torch.randn(batch.xt.shape, generator=batch.generator, device=batch.xt.device)
        h = h * batch.sigma.reshape(-1, *[1] * (h.ndim - 1))
        change = batch.fake(batch.xt + h, batch.sigma, batch.label) - batch.fake(batch.xt, batch.sigma, batch.label)
        loss: Tensor = self.objective.critic_loss(batch)
        return loss + self.weight * per_sample(change.square()) / per_sample(h.square())
