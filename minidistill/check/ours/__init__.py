"""What stands in for an exercise that is not solved yet, where later cells use what it made: same names, same results.

    if not check.one_call(one_call):
        one_call = check.ours.one_call  # the package's own, until yours is correct
"""

from minidistill.check.ours.students import (
    OwnObjective,
    asd_stand_in,
    best_cover,
    chi_squared_conjugate,
    consistency_loss,
    cut,
    divergence_weight,
    dmd_gradient,
    drift,
    energy_loss,
    energy_pull,
    flipped_weight,
    forgetting_teacher,
    gamma_step,
    gaussian_fisher,
    implicit_loss,
    kl_integrand,
    mean_flow_target,
    mixture_denoiser,
    pseudo_huber_slope,
    ratio_pull,
    reverse_kl_gradient,
    stage_at,
)
from minidistill.check.ours.teachers import (
    add_noise,
    aligned_share,
    best_share,
    bridge_velocity,
    class_gradient,
    ddim_step,
    denoising_loss,
    distillation_loop,
    euler_step,
    even_weight,
    gauge_defect,
    gaussian_flow,
    heun_solver,
    linear_step,
    mixture_score,
    one_call,
    score_gap,
    stein_trace,
    step_score,
    training_loop,
    tweedie,
    unbiased_loss,
    uniform_time_density,
    velocity,
    weighted_denoiser,
)

__all__ = [
    "OwnObjective", "add_noise", "aligned_share", "asd_stand_in", "best_cover", "best_share", "bridge_velocity",
    "chi_squared_conjugate", "class_gradient", "consistency_loss", "cut", "ddim_step", "denoising_loss",
    "distillation_loop", "divergence_weight", "dmd_gradient", "drift", "energy_loss", "energy_pull", "euler_step",
    "even_weight", "flipped_weight", "forgetting_teacher", "gamma_step", "gauge_defect", "gaussian_fisher",
    "gaussian_flow", "heun_solver", "implicit_loss", "kl_integrand", "linear_step", "mean_flow_target",
    "mixture_denoiser", "mixture_score", "one_call", "pseudo_huber_slope", "ratio_pull", "reverse_kl_gradient",
    "score_gap", "stage_at", "stein_trace", "step_score", "training_loop", "tweedie", "unbiased_loss",
    "uniform_time_density", "velocity", "weighted_denoiser",
]
