"""Score distillation with nothing trained but the student: something known stands for the denoiser of its samples.

Distribution matching moves samples along D_p - D_q. Without a network for D_q there are

    x0, the sample itself                          SDS: all the noise is foreign to the student's law
    x_t - sigma e(x_t+, sigma+)                    ASD: what noise the teacher sees at a higher level

and for both the student does not stop at the teacher's law. SDS's mean pull is sigma^2 times the teacher's score,
averaged over noise, which every sample climbs by itself, to the modes of the smoothed law: it is the limit of
distribution matching with a q that is a single point. ASD's noise is nearer to what a fake network would find, since a
law with noise is more like the student's, whatever that is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill.distillation.batch import Batch, column, dmd_scale, no_weights, per_sample
from minidistill.distillation.objective import Terms

__all__ = ["AsynchronousScore", "ScoreDistillation"]


@dataclass(frozen=True)
class ScoreDistillation(Terms):
    """SDS (Poole 2023): gradient -(D_p(x_t) - x0) dx/dtheta / sigma_data^2. normalise: DMD's per-sample scale."""

    normalise: bool = True

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher_x0 = batch.teacher(batch.xt, batch.sigma, batch.label)
            scale = dmd_scale(batch.x0, teacher_x0, batch.sigma_data) if self.normalise else no_weights(batch.x0)
            pull = scale * (teacher_x0 - self.stand_in(batch)) / batch.sigma_data**2
        return {"matching": -per_sample(pull * batch.x0)}

    def stand_in(self, batch: Batch) -> Tensor:
        """What stands for D_q, (n, *shape)."""
        return batch.x0


@dataclass(frozen=True)
class AsynchronousScore(ScoreDistillation):
    """ASD (Ma 2024, ScaleDreamer): the teacher at a higher level sigma+, with the same noise, in the fake network's
    place; sigma+ is drawn.

    eta: how much higher at most, as a share of the way from the lowest level in time: ln(sigma+ / sigma) is uniform
        from 0 to eta ln(sigma / least). Time is ln sigma, in which levels are even.
    least: the lowest level, in standard deviations of the data.
    """

    eta: float = 0.1
    least: float = 0.035
    needs_uniform = True

    def stand_in(self, batch: Batch) -> Tensor:
        assert batch.uniform is not None
        above = (batch.sigma / (self.least * batch.sigma_data)).clamp(min=1)
        later = batch.sigma * above ** (self.eta * batch.uniform)
        x = batch.x0 + column(later, batch.x0) * batch.noise
        found = (x - batch.teacher(x, later, batch.label)) / column(later, x)
        return batch.xt - column(batch.sigma, x) * found
