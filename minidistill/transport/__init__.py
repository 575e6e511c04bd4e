"""Distances between samples that need no density; all differentiable.

    wasserstein.py   exact: on the line, along random or the worst directions, by assignment
    entropic.py      Sinkhorn's, debiased
    kernels.py       averages over pairs: MMD, energy distance, CRPS, kernel Stein discrepancies
    critic.py        Wasserstein-1 from a trained critic
"""

from minidistill.transport.critic import wasserstein_1_critic
from minidistill.transport.entropic import sinkhorn, sinkhorn_plan
from minidistill.transport.kernels import (
    KERNELS,
    Kernel,
    almost_fair_crps,
    crps,
    energy_distance,
    energy_score,
    kernel_stein_discrepancy,
    median_bandwidth,
    mmd,
    rational_quadratic,
    truncated_kernel_stein_discrepancy,
)
from minidistill.transport.wasserstein import (
    max_sliced_wasserstein,
    sliced_sinkhorn,
    sliced_wasserstein,
    wasserstein_1d,
    wasserstein_2,
)

__all__ = [
    "KERNELS", "Kernel", "almost_fair_crps", "crps", "energy_distance", "energy_score", "kernel_stein_discrepancy",
    "max_sliced_wasserstein", "median_bandwidth", "mmd", "rational_quadratic", "sinkhorn", "sinkhorn_plan",
    "sliced_sinkhorn", "sliced_wasserstein", "truncated_kernel_stein_discrepancy", "wasserstein_1_critic",
    "wasserstein_1d", "wasserstein_2",
]
