"""How well a student knows the way: its jumps against the exact flow map of a mixture, level by level.

The exact paths are 2,000 steps of Heun's method with the mixture's own denoiser, in float64. One set of them serves all
levels, since the points where they pass a level are samples of the noised law there.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from minidistill import metrics
from minidistill.distillation import Distilled
from minidistill.distributions import GaussianMixture
from minidistill.networks.jumps import ROUTES, TOP, angles
from minidistill.samplers import heun

__all__ = ["CALLS", "GAMMAS", "LEVELS", "exact_paths", "jump_errors", "quality", "score_errors"]

CALLS = (1, 2, 4, 8)  # of the network, for a sample
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of new noise, at four calls
#: In standard deviations of the data; angles arctan(level) are evenly spaced.
LEVELS = (*angles(8, TOP), 0.0)
STEPS, PATHS = 2000, 1000


@lru_cache(maxsize=4)  # of mixtures by identity: students of one target share them
def exact_paths(target: GaussianMixture, top: float = TOP, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(z, points): noise z ~ N(0, I), (PATHS, *shape), and where its path from `top` z passes each of LEVELS, in
    float64, (len(LEVELS), PATHS, *shape). top is in standard deviations of the data, at least TOP."""
    z = torch.randn(PATHS, *target.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turn = math.atan(TOP) / STEPS
    above = math.ceil((math.atan(top) - math.atan(TOP)) / turn)
    levels = [*(math.tan(math.atan(TOP) + i * turn) for i in range(above - 1, 0, -1)), *angles(STEPS, TOP), 0.0]
    levels = [top, *levels] if above else levels
    sigmas = target.sigma_data * torch.tensor(levels, dtype=torch.float64)
    exact = target.to(torch.float64)
    path = heun(exact, sigmas[0] * z, sigmas, trajectory=True)
    return z, path[-STEPS - 1 :: STEPS // (len(LEVELS) - 1)]


@torch.no_grad()
def jump_errors(made: Distilled, target: GaussianMixture) -> list[list[float | None]]:
    """E|J(x, from, to) - the exact point|, in standard deviations of the data: a row for each of LEVELS but the last,
    `from`; a column for each, `to`. None where a student can't be asked."""
    unit, points = target.sigma_data, exact_paths(target)[1].float()
    anywhere = ROUTES[made.ema.route]

    def error(i: int, j: int) -> float | None:
        if j <= i or not (anywhere or LEVELS[j] == 0):
            return None
        gap = made.jump(points[i], LEVELS[i] * unit, LEVELS[j] * unit) - points[j]
        return round(float(_distance(gap)) / unit, 5)

    return [[error(i, j) for j in range(len(LEVELS))] for i in range(len(LEVELS) - 1)]


@torch.no_grad()
def score_errors(made: Distilled, target: GaussianMixture) -> list[float | None]:
    """E|s - s_exact|^2 / E|s_exact|^2 of the score that the student's aim on the diagonal stands for, for each of
    LEVELS but the last. None for consistency functions, which have no diagonal."""
    unit, points = target.sigma_data, exact_paths(target)[1].float()

    def error(i: int) -> float | None:
        if not ROUTES[made.ema.route]:
            return None
        x, sigma = points[i], LEVELS[i] * unit
        denoised = made.ema(x, None, sigma, sigma, aim=True)
        exact = target(x, sigma)
        return round(float((denoised - exact).square().sum() / (exact - x).square().sum()), 6)

    return [error(i) for i in range(len(LEVELS) - 1)]


def quality(made: Distilled, target: GaussianMixture, seed: int, n: int) -> dict[str, Any]:
    """Of a student that knows a way down: what it is worth at several calls, and its jumps."""
    over_floor = partial(metrics.over_floor, target, seed=seed)
    stops = ROUTES[made.ema.route]
    draw = partial(made.sample, n, seed=1000 + seed)
    return {
        "calls_over_floor": [round(over_floor(draw(steps=calls)), 4) for calls in CALLS],
        "gammas_over_floor": [round(over_floor(draw(steps=4, gamma=gamma)), 4) for gamma in GAMMAS] if stops else None,
        "ends_error": [_ends_error(made, target, calls) for calls in CALLS],
        "jump_error": jump_errors(made, target), "score_error": score_errors(made, target),
    }


@torch.no_grad()
def _ends_error(made: Distilled, target: GaussianMixture, calls: int) -> float | None:
    """The samples' mean distance to where their noise's own path ends, in standard deviations of the data. None for
    several calls of a consistency function, which put new noise on."""
    if calls > 1 and not ROUTES[made.ema.route]:
        return None
    unit = target.sigma_data
    z, points = exact_paths(target, made.ema.sigma_init / unit)
    x = (made.ema.sigma_init * z).float()
    levels = [made.ema.sigma_init, *(unit * level for level in angles(calls, made.ema.sigma_init / unit)[1:]), 0.0]
    for here, there in pairwise(levels):
        x = made.jump(x, here, there)
    return round(float(_distance(x - points[-1])) / unit, 5)


def _distance(gap: Tensor) -> Tensor:
    return gap.flatten(1).norm(dim=1).mean()
