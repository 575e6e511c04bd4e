"""Samplers: from noise to data along a schedule of noise levels, in EDM coordinates.

Every solver is a plain function of (denoiser, x, sigmas, generator) with keyword options, and all of them are here by
name: the deterministic ones of `ode` and `conjugate_ddim`, the chains of `stochastic`, the adaptive one.
This file adds the choice by name and `teleported`, which shortens any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.samplers.adaptive import gotta_go_fast
from minidistill.samplers.conjugate_ddim import conjugate
from minidistill.samplers.loop import Denoiser, check_levels
from minidistill.samplers.ode import (
    accelerated_ddim,
    ddim,
    dpm_solver_2m,
    euler,
    gradient_estimation,
    heun,
)
from minidistill.samplers.stochastic import (
    accelerated_ddpm,
    ancestral,
    annealed_langevin,
    edm_stochastic,
    euler_maruyama,
    predictor_corrector,
)

__all__ = ["SOLVERS", "Solver", "sample", "teleported"]

Solver = Callable[..., Tensor]  # (denoiser, x, sigmas, generator=None, **options)

#: Every solver of (denoiser, x, sigmas) by name.
SOLVERS: dict[str, Solver] = {
    solver.__name__: solver for solver in (
        euler, heun, ddim, dpm_solver_2m, gradient_estimation, accelerated_ddim, conjugate,
        euler_maruyama, ancestral, edm_stochastic, predictor_corrector, accelerated_ddpm, annealed_langevin,
        gotta_go_fast,
    )
}


def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, solver: str = "heun", **options: Any) -> Tensor:
    """Run a solver by name.

    Args:
        denoiser: D(x, sigma, label).
        x: (n, *shape), standing at level sigmas[0]: sigmas[0] * noise to start from pure noise.
        sigmas: (m+1,) noise levels, descending, the last one 0.
        solver: one of `SOLVERS`; its own parameters (`eta`, `gamma`, ...) may stand among the options.
        generator: for the noise of stochastic solvers.
        label: (n,) classes for a conditional denoiser.
        trajectory: return the whole path, (m+1, n, *shape), from x to the samples.
        progress: show a tqdm bar.
        batch_size: samples that are walked down together, one such chunk after the other; None for all.
        early_stop: stop at the last level above 0, without the step that denoises.
        report: a `Report` to fill in: network calls per sample, levels visited.
    Returns:
        samples (n, *shape), in x's dtype.
    Raises:
        ValueError: unknown solver, levels that do not descend to 0, non-finite x, parameters out of range, a denoiser
            that returns another shape than x's.
        TypeError: x not floating, an option that the solver does not have, a denoiser that returns no tensor.
        FloatingPointError: samples that are not finite.
    """
    return _validate.choose("solver", solver, SOLVERS)(denoiser, x, sigmas, **options)


def teleported(gaussian: Any, solver: str | Solver, sigma_skip: float) -> Solver:
    """A solver that first jumps from sigmas[0] to sigma_skip along a Gaussian's flow, which costs no network calls, and
    then runs `solver` on sigma_skip and the levels below it (Wang and Vastola 2024, analytical teleportation).

    At levels well above the data's scale the score is nearly that of the Gaussian with the data's mean and
    covariance. `gaussian.flow(x, sigma, after)` is that Gaussian's flow, mu + sum_k sqrt((l_k + after^2) /
    (l_k + sigma^2)) u_k u_k'(x - mu), as of `teachers.GaussianTeacher`; one that has classes (`n_classes`) gets the
    label too. A path begins x, x at sigma_skip, ...
    ValueError: an unknown solver, sigma_skip not below sigmas[0].
    """
    sigma_skip = _validate.positive("sigma_skip", sigma_skip)
    run = _validate.choose("solver", solver, SOLVERS) if isinstance(solver, str) else solver

    def teleport(
        denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: torch.Generator | None = None, **options: Any
    ) -> Tensor:
        sigmas = check_levels(x, sigmas)
        if not sigma_skip < float(sigmas[0]):
            raise ValueError(f"sigma_skip={sigma_skip}: wanted a level below sigmas[0]={float(sigmas[0]):g}")
        start = sigmas.new_tensor([sigma_skip])
        below = torch.cat([start, sigmas[sigmas < start]])
        label = options.get("label") if getattr(gaussian, "n_classes", 0) else None
        with torch.no_grad():
            landed = gaussian.flow(x, float(sigmas[0]), sigma_skip, *(() if label is None else (label,)))
        out = run(denoiser, landed, below, generator, **options)
        if options.get("report") is not None:
            options["report"].levels.insert(0, float(sigmas[0]))
        return torch.cat([x.unsqueeze(0), out]) if options.get("trajectory") else out

    return teleport
