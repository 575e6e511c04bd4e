"""Score implicit matching: minimise a distance between the scores themselves.

SIM (Luo 2024) and SiD (Zhou 2024) are one family; the distance and alpha are its parameters. Scores are
compared as denoisers, y = D_q - D_p = sigma^2 (s_q - s_p), which puts all noise levels on one scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from minidistill.distillation.batch import Batch, dmd_scale, no_weights, per_sample
from minidistill.distillation.matching import fake_loss
from minidistill.divergences import ScoreDistance


@dataclass(frozen=True)
class ScoreImplicitMatching:
    """E_{x ~ sg[q_sigma]} d(D_q - D_p), by SIM's score-gradient theorem (Luo 2024, theorem 3.1):
    loss = -d'(y) . (D_q(x_t) - x0), differentiated through x0 and x_t, the sampling law frozen."""

    distance: ScoreDistance
    normalise: bool = False
    needs_ratio = False

    def critic_loss(self, batch: Batch) -> Tensor:
        return fake_loss(batch)

    def generator_loss(self, batch: Batch) -> Tensor:
        teacher_x0, fake_x0 = batch.denoise_both(batch.xt)
        y = fake_x0 - teacher_x0
        scale = dmd_scale(batch.x0, teacher_x0) if self.normalise else no_weights(y)
        return -per_sample(scale * self.distance.gradient(y) * (fake_x0 - batch.x0))


@dataclass(frozen=True)
class ScoreIdentity:
    """SiD (Zhou 2024): (1 - alpha) |D_p - D_q|^2 + (D_p - D_q) . (D_q - x0), gradient through both networks' inputs.

    alpha = 1/2 has half the exact gradient of the Fisher divergence E_q |D_p - D_q|^2, alpha = 1 is half SIM with
    squared L2, and alpha = 1.2 is the paper's empirical choice.
    """

    alpha: float = 1.2
    normalise: bool = True
    needs_ratio = False

    def critic_loss(self, batch: Batch) -> Tensor:
        return fake_loss(batch)

    def generator_loss(self, batch: Batch) -> Tensor:
        teacher_x0, fake_x0 = batch.denoise_both(batch.xt)
        gap = teacher_x0 - fake_x0
        scale = dmd_scale(batch.x0, teacher_x0) if self.normalise else no_weights(gap)
        return per_sample(scale * gap * ((1 - self.alpha) * gap + fake_x0 - batch.x0))
