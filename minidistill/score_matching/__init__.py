"""Score matching: every way to learn a score, and what a field of scores is like.

    denoising.py   the denoising loss, its weight and its noise levels: what almost everybody trains with
    losses.py      the other losses whose minimiser is the score: explicit, implicit, sliced, target, LCSS, ...
    fields.py      Jacobians of a score: asymmetry, curl, the conservative penalty, the Fokker-Planck residual
"""

from minidistill.score_matching.denoising import denoising_loss, edm_weight, log_normal_sigma, log_uniform_sigma
from minidistill.score_matching.fields import (
    asymmetry,
    conservative_penalty,
    curl,
    fokker_planck_loss,
    fokker_planck_residual,
    jacobian,
    local_step,
    rademacher,
)
from minidistill.score_matching.losses import (
    dlsm_loss,
    explicit_loss,
    finite_difference_loss,
    implicit_loss,
    lcss_loss,
    local_dsm_loss,
    mixed_target_loss,
    optimal_share,
    posterior_denoiser,
    sliced_loss,
    sure_loss,
    target_loss,
    tiw_loss,
)

__all__ = [
    "asymmetry", "conservative_penalty", "curl", "denoising_loss", "dlsm_loss", "edm_weight", "explicit_loss",
    "finite_difference_loss", "fokker_planck_loss", "fokker_planck_residual", "implicit_loss", "jacobian",
    "lcss_loss", "local_dsm_loss", "local_step", "log_normal_sigma", "log_uniform_sigma", "mixed_target_loss",
    "optimal_share", "posterior_denoiser", "rademacher", "sliced_loss", "sure_loss", "target_loss", "tiw_loss",
]
