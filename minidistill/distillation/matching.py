"""Distribution matching: move samples along h(r) (score_p - score_q).

One rule for every f-divergence (f-distill, Xu 2025); with h = 1 it is reverse KL, that is DMD without its
regression term (Yin 2024) and, without the normaliser, Diff-Instruct (Luo 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from minidistill.distillation.batch import Batch, dmd_scale, no_weights, per_sample
from minidistill.divergences import FDivergence
from minidistill.score_matching import denoising_loss, edm_weight


def fake_loss(batch: Batch) -> Tensor:
    """The fake network's loss, (n,): denoise the student's own samples, with EDM's weights."""
    weight = edm_weight(batch.sigma, batch.sigma_data)
    return denoising_loss(batch.fake, batch.x0, batch.sigma, batch.noise, batch.label, weight)


def ratio_loss(batch: Batch) -> Tensor:
    """Logistic regression of noised real (1) against noised student samples (0), (n,): its minimiser is
    log p_sigma / q_sigma. Both get the same noise and level, which cancels some of the variance."""
    assert batch.ratio is not None
    assert batch.real is not None
    xt = batch.xt
    both = torch.cat([batch.real + (xt - batch.x0), xt])
    label = None if batch.label is None or batch.real_label is None else torch.cat([batch.real_label, batch.label])
    real, fake = batch.ratio(both, batch.sigma.repeat(2), label).chunk(2)
    return softplus(-real) + softplus(fake)


@dataclass(frozen=True)
class DistributionMatching:
    """Gradient -E[ h(r) (s_p - s_q) dx/dtheta ] of D_f(p_sigma || q_sigma), averaged over noise levels.

    normalise: divide by DMD's per-sample scale and, where h is not constant, normalise twice as f-distill does: r by
        its mean at each noise level, which is 1 for the exact ratio, and h by its batch mean. Off, the loss's gradient
        is that of sigma^2 D_f exactly.
    clip: bound on |log r|, which bounds the weights.
    levels: how many groups of like noise level, of equal size, r is averaged in.
    """

    divergence: FDivergence
    normalise: bool = True
    clip: float = 5.0
    levels: int = 10

    @property
    def needs_ratio(self) -> bool:
        """Only reverse KL's weight does not depend on the ratio."""
        probe = torch.tensor([-1.0, 1.0])
        return bool(self.divergence.log_weight(probe).diff() != 0)

    def critic_loss(self, batch: Batch) -> Tensor:
        loss = fake_loss(batch)
        return loss + ratio_loss(batch) if self.needs_ratio else loss

    def generator_loss(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            xt = batch.xt
            teacher_x0, fake_x0 = batch.denoise_both(xt)
            scale = dmd_scale(batch.x0, teacher_x0) if self.normalise else no_weights(xt)
            if self.needs_ratio:
                scale = scale * self._weight(batch, xt).reshape(scale.shape)
            direction = scale * (teacher_x0 - fake_x0)  # sigma^2 h (s_p - s_q), (n, *shape)
        return -per_sample(direction * batch.x0)

    def _weight(self, batch: Batch, xt: Tensor) -> Tensor:
        assert batch.ratio is not None
        log_r = batch.ratio(xt, batch.sigma, batch.label)  # (n,)
        if not self.normalise:
            return self.divergence.log_weight(log_r).exp()
        log_r = log_r.clamp(-self.clip, self.clip)
        h = self.divergence.log_weight(log_r - level_mean(log_r.exp(), batch.sigma, self.levels).log()).exp()
        return h / h.mean()


def level_mean(values: Tensor, sigma: Tensor, groups: int) -> Tensor:
    """For each sample the mean of `values` (n,) over the samples of like noise level, (n,): groups of equal size in the
    order of sigma, so that none is empty, whatever the levels' distribution."""
    groups = max(1, min(groups, len(sigma) // 8))
    group = sigma.argsort().argsort() * groups // len(sigma)
    sums = torch.zeros(2, groups, dtype=values.dtype, device=values.device)
    sums.index_add_(1, group, torch.stack([values, torch.ones_like(values)]))
    return (sums[0] / sums[1])[group]
