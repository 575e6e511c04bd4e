"""Uni-Instruct: an f-divergence of the clean laws, expanded over the noise levels, and its two-term gradient.

Along the diffusion every f-divergence decays at a rate that is a score divergence with the weight h(r) = r^2 f''(r)
(Wang 2025; de Bruijn's identity for KL), in EDM coordinates

    D_f(p_0 || q_0) - D_f(p_T || q_T) = integral_0^T sigma J(sigma) dsigma,    J = E_{q_sigma}[ h(r) |s_p - s_q|^2 ].

The student enters J three times: in the law of x, in r, and in s_q. With u = s_p - s_q, d log r = -d log q and
integral d(q) phi = E[ grad phi . dx ], the first two join into one landscape, and with SIM's theorem for the third

    dJ = E[ grad( (h - r h') |u|^2 ) . dx ] + 2 d E[ h u . (D_q(x_t) - x0) ] / sigma^2,

where on the right networks and ratio are frozen functions of x_t: one term of Diff-Instruct's kind, which moves the law
over a frozen landscape, and one of SIM's. Forward KL (h = r) has only the second. The paper's theorem groups the same
gradient in another way; this form was derived here, and the tests hold it against finite differences of J.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from minidistill._autodiff import derivative
from minidistill.distillation.batch import Batch, dmd_scale, no_weights, per_sample
from minidistill.distillation.objective import Terms
from minidistill.distillation.objectives.matching import fake_loss, ratio_loss, steady_log_ratio
from minidistill.divergences import FDivergence

__all__ = ["UniInstruct"]


@dataclass(frozen=True)
class UniInstruct(Terms):
    """The gradient of J(sigma) for one f-divergence; the two terms are "law" and "score".

    normalise: DMD's per-sample scale and f-distill's stabilisers of the ratio (see `DistributionMatching`). Off, the
        loss's gradient is that of sigma^4 J exactly, so the expansion weighs levels drawn log-uniformly by 1 / sigma^2.
    """

    divergence: FDivergence
    normalise: bool = True
    clip: float = 5.0
    levels: int = 10
    needs_ratio = True

    def critic_loss(self, batch: Batch) -> Tensor:
        return fake_loss(batch) + ratio_loss(batch)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.ratio is not None
        xt = batch.xt
        teacher_x0, fake_x0 = batch.denoise_both(xt)
        y = (teacher_x0 - fake_x0) / batch.sigma_data  # sigma^2 u
        log_r = batch.ratio(xt, batch.sigma, batch.label)
        scale = no_weights(y).flatten()
        if self.normalise:
            log_r = steady_log_ratio(log_r, batch.sigma, self.clip, self.levels)
            scale = dmd_scale(batch.x0, teacher_x0, batch.sigma_data).flatten()
        log_h = self.divergence.log_weight(log_r)
        # r h' / h, the slope of log h in log r
        slope = derivative(self.divergence.log_weight, log_r)
        h = log_h.exp()
        if self.normalise:
            scale = scale / h.detach().mean()
        return {
            "law": scale * h * (1 - slope) * per_sample(y.square()),
            "score": 2 * scale * h * per_sample(y * (fake_x0 - batch.x0) / batch.sigma_data),
        }
