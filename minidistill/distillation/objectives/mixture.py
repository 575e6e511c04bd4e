"""Score-of-mixture distillation: the whole line of skew Jensen-Shannon divergences at once.

m = alpha p + (1 - alpha) q has the score rho s_p + (1 - rho) s_q, rho = alpha r / (alpha r + 1 - alpha), so one
number a sample, the ratio r = p / q, turns the teacher's and the fake's denoisers into the mixture's:
D_alpha = rho D_p + (1 - rho) D_q. What would be a third network is a logit, and it can be learned by denoising.
Without a teacher one network that is told alpha learns all of D_alpha, of which D_1 = D_p and D_0 = D_q, from data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from minidistill import _validate
from minidistill.distillation.batch import Batch, column, dmd_scale, no_weights, per_sample
from minidistill.distillation.objective import Terms
from minidistill.distillation.prepare import own_denoiser
from minidistill.distillation.settings import Settings
from minidistill.score_matching import edm_weight

__all__ = ["LEAST", "ScoreOfMixture", "ScoreOfMixtureTraining"]

LEAST = 1e-3  # alpha keeps away from 0 and 1, where D_alpha says nothing about the ratio


@dataclass(frozen=True)
class ScoreOfMixture(Terms):
    """SMD (Jayashankar 2025): descend [alpha KL(p || m) + (1 - alpha) KL(q || m)] / (alpha (1 - alpha)), whose weight
    is h = r / (alpha r + 1 - alpha) = rho / alpha: forward KL as alpha -> 0, reverse KL as alpha -> 1.

    alpha: a number between 0 and 1, or None to draw one for every sample, evenly.
    normalise: DMD's per-sample scale; off, the gradient is that of (sigma / sigma_data)^2 times the divergence exactly.
    clip: bound on |log r| in the generator's weight.

    The paper learns its networks by mixture denoising alone; here the fake network keeps its own loss (alpha = 0),
    and the mixture's loss, at alpha, teaches the ratio only. The normaliser of the paper's version from scratch, by
    |D_alpha - D_0|, takes h out altogether, and is not offered.
    """

    alpha: float | None = None
    normalise: bool = True
    clip: float = 5.0
    needs_ratio = True

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 < self.alpha < 1:
            raise ValueError(f"alpha={self.alpha!r}: wanted a number between 0 and 1, both excluded, or None")

    @property
    def needs_uniform(self) -> bool:
        return self.alpha is None

    def critic_loss(self, batch: Batch) -> Tensor:
        """Denoise the student's samples by D_q, and a mixture of alpha real and 1 - alpha student samples by D_alpha,
        (n,): the second is least at the mixture's denoiser, which for exact D_q is that of the exact log ratio."""
        assert batch.ratio is not None
        xt, x0, sigma, label = batch.real_and_fake()
        weight, alpha = edm_weight(batch.sigma, batch.sigma_data), self._alpha(batch)
        fake_x0 = batch.fake(xt.chunk(2)[1], batch.sigma, batch.label)
        with torch.no_grad():
            teacher_x0 = batch.teacher(xt, sigma, label)
            on_real = batch.fake(xt.chunk(2)[0], batch.sigma, None if label is None else label.chunk(2)[0])
        rho = torch.sigmoid(batch.ratio(xt, sigma, label) + alpha.logit().repeat(2))
        mixed = torch.lerp(torch.cat([on_real, fake_x0.detach()]), teacher_x0, _validate.broadcast_sigma(rho, xt))
        real, fake = (mixed - x0).square().flatten(1).mean(1).chunk(2)
        own = (fake_x0 - batch.x0).square().flatten(1).mean(1)
        return weight * (own + alpha * real + (1 - alpha) * fake)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.ratio is not None
        with torch.no_grad():
            xt, alpha = batch.xt, self._alpha(batch)
            teacher_x0, fake_x0 = batch.denoise_both(xt)
            scale = dmd_scale(batch.x0, teacher_x0, batch.sigma_data) if self.normalise else no_weights(xt)
            log_r = batch.ratio(xt, batch.sigma, batch.label)
            log_r = log_r.clamp(-self.clip, self.clip) if self.normalise else log_r
            h = (logsigmoid(log_r + alpha.logit()) - alpha.log()).exp()  # rho / alpha
            direction = scale * h.reshape(scale.shape) * (teacher_x0 - fake_x0) / batch.sigma_data**2
        return {"mixture": -per_sample(direction * batch.x0)}

    def _alpha(self, batch: Batch) -> Tensor:
        """(n,): fixed, or drawn; 1/2 for a batch without draws."""
        if self.alpha is None and batch.uniform is not None:
            return batch.uniform.clamp(LEAST, 1 - LEAST)
        return torch.full_like(batch.sigma, 0.5 if self.alpha is None else self.alpha)


@dataclass(frozen=True)
class ScoreOfMixtureTraining(Terms):
    """SMT (Jayashankar 2025): the same from data alone, without a teacher. One denoiser D(x, sigma, alpha) learns

        alpha W |D(y_real) - x_real|^2 + (1 - alpha) W |D(y_fake) - x_fake|^2,

    whose minimiser is the mixture's, and as h (s_p - s_q) = (s_m - s_q) / alpha the student goes along
    (D_alpha - D_0) / alpha.

    least: of the student's alpha, drawn evenly from there to 1: a difference of two outputs over alpha is the noisier
        the smaller that is. The network's alpha is drawn from 0 to 1 and as often as not is one of the two ends, which
        the student always asks for.
    normalise: DMD's per-sample scale with D_1 for the teacher; off, the gradient is that of (sigma / sigma_data)^2
        times the divergence exactly.
    """

    least: float = 0.1
    normalise: bool = True
    needs_real = True
    needs_fake = False
    needs_uniform = True

    def __post_init__(self) -> None:
        if not 0 < _validate.number("least", self.least) <= 1:
            raise ValueError(f"least={self.least!r}: wanted a number above 0 and at most 1")

    def before_training(self, run: Any, settings: Settings) -> None:
        run.own = own_denoiser(run, settings, told=True)

    def critic_loss(self, batch: Batch) -> Tensor:
        assert batch.uniform is not None
        xt, x0, sigma, label = batch.real_and_fake()
        alpha = (2 * batch.uniform - 0.5).clamp(0, 1)
        made = mixtures_denoiser(batch.own, xt, sigma, alpha.repeat(2), label, batch.sigma_data)
        real, fake = (made - x0).square().flatten(1).mean(1).chunk(2)
        return edm_weight(batch.sigma, batch.sigma_data) * (alpha * real + (1 - alpha) * fake)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.uniform is not None
        alpha = self.least + (1 - self.least) * batch.uniform
        with torch.no_grad():
            xt, ends = batch.xt, (alpha, torch.zeros_like(alpha), torch.ones_like(alpha))
            mixed, fake_x0, real_x0 = (
                mixtures_denoiser(batch.own, xt, batch.sigma, a, batch.label, batch.sigma_data) for a in ends)
            scale = dmd_scale(batch.x0, real_x0, batch.sigma_data) if self.normalise else no_weights(xt)
            direction = scale * (mixed - fake_x0) / column(alpha, xt) / batch.sigma_data**2
        return {"mixture": -per_sample(direction * batch.x0)}


def mixtures_denoiser(
    own: Any, x: Tensor, sigma: Tensor, alpha: Tensor, label: Tensor | None, sigma_data: float
) -> Tensor:
    """D(x, sigma, alpha), alpha (n,), of a network that was made to be told where a jump goes: alpha is the angle."""
    return own(x, sigma, label, sigma_data * alpha.tan())
