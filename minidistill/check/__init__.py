"""Self-checks for the tutorials' exercises: one line of text each, and never an exception.

`check.tweedie(f)` prints "exercise 2: not attempted yet" while `f` returns `...` or None, "exercise 2: correct",
or the first mismatch, and returns whether `f` is correct. The answers are in `tutorials/solutions.py`.
"""

from minidistill.check._core import claims
from minidistill.check.divergences import chi_squared_conjugate, flipped_weight
from minidistill.check.gradients import best_cover, divergence_weight, reverse_kl_gradient
from minidistill.check.implicit import gaussian_fisher, pseudo_huber_slope
from minidistill.check.matching import dmd_gradient, mixture_denoiser
from minidistill.check.samplers import ddim_step, gaussian_flow
from minidistill.check.scores import (
    best_share,
    class_gradient,
    gauge_defect,
    langevin_share,
    mixture_score,
    one_call,
    score_gap,
    stein_trace,
    tweedie,
    uniform_time_density,
    velocity,
)
from minidistill.check.students import c_out, ema_decay, mirror, noise_through, normalised_ratio, sid_loss, sim_gradient
from minidistill.check.teachers import aligned_share, weighted_denoiser

__all__ = [
    "claims",
    "one_call", "score_gap", "mixture_score", "tweedie", "langevin_share", "stein_trace", "best_share",  # 00 to 02
    "class_gradient", "gauge_defect", "velocity", "uniform_time_density",  # 03, 04
    "weighted_denoiser", "aligned_share",  # 05
    "ddim_step", "gaussian_flow",  # 06
    "flipped_weight", "chi_squared_conjugate",  # 07
    "divergence_weight", "reverse_kl_gradient", "best_cover",  # 08
    "dmd_gradient", "mixture_denoiser",  # 09
    "pseudo_huber_slope", "gaussian_fisher",  # 10
    "normalised_ratio", "sim_gradient", "c_out", "ema_decay", "mirror", "noise_through", "sid_loss",  # 15 to 17
]
