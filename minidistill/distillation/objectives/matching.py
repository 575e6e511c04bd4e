"""Distribution matching: move samples along h(r) (score_p - score_q).

One rule for every f-divergence (f-distill, Xu 2025); with h = 1 it is reverse KL, that is DMD without its
regression term (Yin 2024) and, without the normaliser, Diff-Instruct (Luo 2023). An adversarial term may join it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from minidistill.distillation.batch import Batch, dmd_scale, no_weights, per_sample
from minidistill.distillation.objective import Terms
from minidistill.distillation.objectives.adversarial import adversarial
from minidistill.divergences import FDivergence
from minidistill.score_matching import denoising_loss, edm_weight

__all__ = ["DistributionMatching", "fake_loss", "level_mean", "ratio_loss", "steady_log_ratio"]


def fake_loss(batch: Batch) -> Tensor:
    """The fake network's loss, (n,): denoise the student's own samples, with EDM's weights."""
    weight = edm_weight(batch.sigma, batch.sigma_data)
    return denoising_loss(batch.fake, batch.x0, batch.sigma, batch.noise, batch.label, weight)


def ratio_loss(batch: Batch) -> Tensor:
    """Logistic regression of noised real (1) against noised student samples (0), (n,): its minimiser is
    log p_sigma / q_sigma."""
    assert batch.ratio is not None
    xt, _, sigma, label = batch.real_and_fake()
    real, fake = batch.ratio(xt, sigma, label).chunk(2)
    return softplus(-real) + softplus(fake)


@dataclass(frozen=True)
class DistributionMatching(Terms):
    """Gradient -E[ h(r) (s_p - s_q) dx/dtheta ] of D_f(p_sigma || q_sigma), averaged over noise levels.

    Four stabilisers, each with its switch:

    scale: divide by DMD's mean |x0 - D_p|, one number a sample.
    clip: bound on |log r|, which bounds the weights; None for none.
    levels: how many groups of like noise level, of equal size, r is divided by its mean in, which is 1 for the exact
        ratio; 0 for no division.
    unit_mean: divide h by its batch mean. Means are over what is computed at once, so over a piece where a batch is
        accumulated in pieces.
    normalise: False switches all four off; the loss's gradient is then that of (sigma / sigma_data)^2 D_f exactly.

    And what f-distill takes over from DMD2 (Yin 2024b):

    adversarial_weight: of a term through the logit of the very discriminator whose exponential is r (see
        `adversarial`); with real data it can correct the teacher. 0 for none.
    critic_steps: as in `distill`, which takes its own where this is None.
    """

    divergence: FDivergence
    normalise: bool = True
    scale: bool = True
    clip: float | None = 5.0
    levels: int = 10
    unit_mean: bool = True
    adversarial_weight: float = 0.0
    critic_steps: int | None = None

    @property
    def weighs(self) -> bool:
        """Whether h depends on the ratio, as all but reverse KL's does."""
        log_h = self.divergence.log_weight(torch.linspace(-3.0, 2.0, 11))
        return bool((log_h - log_h[0]).abs().max() > 1e-5)

    @property
    def needs_ratio(self) -> bool:
        return self.adversarial_weight != 0 or self.weighs

    def critic_loss(self, batch: Batch) -> Tensor:
        loss = fake_loss(batch)
        return loss + ratio_loss(batch) if self.needs_ratio else loss

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        direction, scale = self.pull(batch)
        terms = {"matching": -per_sample(direction * batch.x0)}
        if self.adversarial_weight:
            assert batch.ratio is not None
            logit = batch.ratio(batch.xt, batch.sigma, batch.label)  # this time with its graph
            terms["adversarial"] = self.adversarial_weight * adversarial(logit, batch, scale)
        return terms

    @torch.no_grad()
    def pull(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Where the samples are moved, h (D_p - D_q) / sigma_data^2 times DMD's scale, (n, *shape); and that scale,
        (n, 1, ..., 1)."""
        xt = batch.xt
        teacher_x0, fake_x0 = batch.denoise_both(xt)
        scale = dmd_scale(batch.x0, teacher_x0, batch.sigma_data) if self.normalise and self.scale else no_weights(xt)
        h = self._weight(batch, xt).reshape(scale.shape) if self.weighs else self._constant()
        return scale * h * (teacher_x0 - fake_x0) / batch.sigma_data**2, scale

    def _constant(self) -> float:
        """h where it does not depend on r: 1 for reverse KL, and once divided by its mean."""
        at_one = float(self.divergence.log_weight(torch.zeros(())).exp())
        return 1.0 if self.normalise and self.unit_mean else at_one

    def _weight(self, batch: Batch, xt: Tensor) -> Tensor:
        assert batch.ratio is not None
        log_r = batch.ratio(xt, batch.sigma, batch.label)  # (n,)
        if not self.normalise:
            return self.divergence.log_weight(log_r).exp()
        h = self.divergence.log_weight(steady_log_ratio(log_r, batch.sigma, self.clip, self.levels)).exp()
        return h / h.mean() if self.unit_mean else h


def steady_log_ratio(log_r: Tensor, sigma: Tensor, clip: float | None, levels: int) -> Tensor:
    """log r (n,), clipped to +-clip, less the log of r's mean at each of `levels` groups of like noise level."""
    log_r = log_r if clip is None else log_r.clamp(-clip, clip)
    return log_r - level_mean(log_r.detach().exp(), sigma, levels).log() if levels else log_r


def level_mean(values: Tensor, sigma: Tensor, groups: int) -> Tensor:
    """For each sample the mean of `values` (n,) over the samples of like noise level, (n,): groups of equal size in the
    order of sigma, so that none is empty, whatever the levels' distribution."""
    groups = max(1, min(groups, len(sigma) // 8))
    group = sigma.argsort().argsort() * groups // len(sigma)
    sums = torch.zeros(2, groups, dtype=values.dtype, device=values.device)
    sums.index_add_(1, group, torch.stack([values, torch.ones_like(values)]))
    return (sums[0] / sums[1])[group]
