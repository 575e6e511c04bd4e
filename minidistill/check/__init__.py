"""Self-checks for the tutorials' exercises: one line of text each, and never an exception.

`check.tweedie(f)` prints "exercise 2: not attempted yet" while `f` returns `...`, "exercise 2: correct", or the first
mismatch, with a hint where the mistake is a foreseeable one, and returns whether `f` is correct (which is what nbgrader
and otter ask for). `check.report(number, function, cases, hints=...)` does the same for an exercise of your own. What
an exercise made is used afterwards; until it is correct, its namesake in `check.ours` stands in. The answers are in
`tutorials/solutions.py`.
"""

from minidistill.check import ours
from minidistill.check._claims import claims
from minidistill.check._core import report
from minidistill.check.distilling import distillation_loop
from minidistill.check.divergences import chi_squared_conjugate, energy_loss, flipped_weight, kl_integrand
from minidistill.check.gradients import best_cover, divergence_weight, reverse_kl_gradient
from minidistill.check.implicit import gaussian_fisher, implicit_loss, pseudo_huber_slope
from minidistill.check.matching import OwnObjective, dmd_gradient, mixture_denoiser
from minidistill.check.paths import asd_stand_in, cut, forgetting_teacher, stage_at
from minidistill.check.samplers import ddim_step, gaussian_flow, heun_solver
from minidistill.check.scores import (
    add_noise,
    best_share,
    bridge_velocity,
    class_gradient,
    denoising_loss,
    euler_step,
    even_weight,
    gauge_defect,
    langevin_share,
    linear_step,
    mixture_score,
    one_call,
    score_gap,
    stein_trace,
    step_score,
    training_loop,
    tweedie,
    uniform_time_density,
    velocity,
)
from minidistill.check.students import c_out, ema_decay, mirror, noise_through, normalised_ratio, sid_loss, sim_gradient
from minidistill.check.teachers import aligned_share, unbiased_loss, weighted_denoiser
from minidistill.check.trajectories import consistency_loss, gamma_step, mean_flow_target
from minidistill.check.without_scores import drift, energy_pull, ratio_pull

__all__ = [
    "claims", "ours", "report",
    "one_call", "score_gap", "distillation_loop",  # 00
    "add_noise", "mixture_score", "tweedie", "euler_step", "langevin_share",  # 01
    "denoising_loss", "training_loop", "even_weight", "stein_trace", "best_share",  # 02, 02b
    "class_gradient", "gauge_defect", "step_score", "linear_step",  # 03, 03b
    "velocity", "uniform_time_density", "bridge_velocity",  # 04, 04b
    "weighted_denoiser", "aligned_share", "unbiased_loss",  # 05, 05b
    "heun_solver", "ddim_step", "gaussian_flow",  # 06, 06b
    "flipped_weight", "chi_squared_conjugate", "kl_integrand", "energy_loss",  # 07, 07b
    "divergence_weight", "reverse_kl_gradient", "best_cover",  # 08
    "dmd_gradient", "OwnObjective", "mixture_denoiser",  # 09
    "pseudo_huber_slope", "implicit_loss", "gaussian_fisher",  # 10
    "consistency_loss", "gamma_step", "mean_flow_target",  # 11
    "drift", "energy_pull", "ratio_pull",  # 12
    "stage_at", "asd_stand_in", "forgetting_teacher", "cut",  # 13
    "normalised_ratio", "sim_gradient", "c_out", "ema_decay", "mirror", "noise_through", "sid_loss",  # 15 to 17
]
