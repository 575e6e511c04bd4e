"""Samplers: from noise to data along a schedule of noise levels, in EDM coordinates.

Every solver is a plain function of (denoiser, x, sigmas, generator) with keyword options.

    loop.py             the walk down the levels that all solvers share; `Report` counts network calls
    ode.py              deterministic: Euler, Heun, DDIM, DPM-Solver++, gradient estimation, ...
    conjugate_ddim.py   DDIM after a change of variables
    stochastic.py       chains with new noise: ancestral, EDM's, predictor-corrector, Langevin, ...
    adaptive.py         steps chosen from an error estimate
    schedules.py        the levels: Karras, log-linear, geometric, optimal
    solvers.py          all of them by name: `sample(..., solver="heun")`; `teleported` shortens any
    likelihood.py       log-likelihood by the probability flow
"""

from minidistill.samplers.adaptive import gotta_go_fast
from minidistill.samplers.conjugate_ddim import conjugate
from minidistill.samplers.likelihood import log_likelihood
from minidistill.samplers.loop import Report
from minidistill.samplers.ode import accelerated_ddim, ddim, dpm_solver_2m, euler, gradient_estimation, heun
from minidistill.samplers.schedules import (
    geometric_sigmas,
    karras_sigmas,
    levels_of,
    log_linear_sigmas,
    optimal_sigmas,
    range_of,
)
from minidistill.samplers.solvers import SOLVERS, Solver, sample, teleported
from minidistill.samplers.stochastic import (
    accelerated_ddpm,
    ancestral,
    annealed_langevin,
    edm_stochastic,
    euler_maruyama,
    langevin,
    predictor_corrector,
)

__all__ = [
    "SOLVERS", "Report", "Solver", "accelerated_ddim", "accelerated_ddpm", "ancestral", "annealed_langevin",
    "conjugate", "ddim", "dpm_solver_2m", "edm_stochastic", "euler", "euler_maruyama", "geometric_sigmas",
    "gotta_go_fast", "gradient_estimation", "heun", "karras_sigmas", "langevin", "levels_of", "log_likelihood",
    "log_linear_sigmas", "optimal_sigmas", "predictor_corrector", "range_of", "sample", "teleported",
]
