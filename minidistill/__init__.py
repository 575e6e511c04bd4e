"""minidistill: one-step diffusion distillation, small enough to read in an afternoon.

    distributions     exact targets: Gaussian mixtures, whose score at every noise level is known
    data/             digits, CIFAR-10, your own images
    transport/        distances between samples: Wasserstein, Sinkhorn, MMD, energy, Stein
    networks/         MLP, U-Net, EDM's preconditioning; denoisers, generators, discriminators
    processes/        DDPM, VP, VE, flow, interpolants, ...: one process in many clothes
    score_matching/   every loss whose minimiser is the score, and what a field of scores is like
    divergences/      f-divergences, how to estimate them, distances between scores, logit distillation
    training/         the one training loop, checkpoints, several processes
    samplers/         from noise to data: solvers, schedules, likelihood
    teachers/         whatever denoises: trained, closed form, guided, energy, borrowed
    metrics/          KL on a grid, coverage, Frechet distance, precision and recall; models evaluated
    distillation/     `distill`, and every objective
    bench/            ours beside a peer's, timed in one run
    check/            self-checks of the notebooks' exercises
    plotting, scale   for notebooks: figures, and how much work one does
    studies/          programs that make what is under figures/
    cli/              the command line

What stands here is loaded when it is first asked for, so that the command line can begin, and be interrupted, at once.
"""

from __future__ import annotations

from importlib import import_module, util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minidistill.distillation import OBJECTIVES, Distilled, distill
    from minidistill.distributions import GaussianMixture, grid, ring, two_moons
    from minidistill.teachers import train_denoiser

__version__ = "0.1.0"
__all__ = [
    "OBJECTIVES", "Distilled", "GaussianMixture", "distill", "grid", "ring", "train_denoiser", "two_moons",
]

_ROOMS = {
    "distillation": ("OBJECTIVES", "Distilled", "distill"),
    "distributions": ("GaussianMixture", "grid", "ring", "two_moons"),
    "teachers": ("train_denoiser",),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"minidistill.{room}"), name)
    if not name.startswith("_") and util.find_spec(f"minidistill.{name}"):
        return import_module(f"minidistill.{name}")
    raise AttributeError(f"module 'minidistill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
