"""Deterministic samplers: solvers of the probability flow dx/dsigma = (x - D(x, sigma)) / sigma.

Every solver is a plain function of (denoiser, x, sigmas, generator); the keyword options, the result and the errors
are those of `samplers.sample`. All end by landing on D, which is where Euler's step to level 0 goes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minidistill import _validate
from minidistill._random import noise_like
from minidistill.samplers.loop import Denoise, Denoiser, Step, integrate, slope

__all__ = [
    "Rng", "accelerated_ddim", "ddim", "dpm_solver_2m", "euler", "gradient_estimation", "heun", "heun_step",
]

Rng = torch.Generator | None


def euler(denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: Rng = None, **options: Any) -> Tensor:
    """Euler on the probability flow: first order, one call a level."""

    def step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: Rng) -> Tensor:
        return x + (after - sigma) * slope(denoise, x, sigma)

    return integrate(lambda: step, denoiser, x, sigmas, generator, **options)


def heun(denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: Rng = None, **options: Any) -> Tensor:
    """Heun on the probability flow (Karras 2022, algorithm 1): second order, 2n - 1 calls for n levels."""
    return integrate(lambda: heun_step, denoiser, x, sigmas, generator, **options)


def heun_step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: Rng = None) -> Tensor:
    """One step of `heun`, for all samples alike, or from (n, 1, ...) to (n, 1, ...) > 0 for each by itself."""
    first = slope(denoise, x, sigma)
    guess = x + (after - sigma) * first
    alike = not isinstance(after, Tensor) or after.ndim == 0
    if alike and after == 0:  # the slope is not defined at 0, and Euler's step there is exact: it lands on D
        return guess
    return x + (after - sigma) * (first + slope(denoise, guess, after)) / 2


def ddim(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: Rng = None, *, eta: float = 0.0, **options: Any
) -> Tensor:
    """DDIM (Song 2021, equation 12) in EDM coordinates: keep D, replace the noise. eta = 0 is deterministic
    (and equal to Euler); eta = 1 draws from the posterior q(x_after | x, x0 = D), which is ancestral sampling."""
    eta = _validate.number("eta", eta, 0, 1)

    def step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: Rng) -> Tensor:
        x0 = denoise(x, sigma)
        fresh = eta * after * (1 - (after / sigma).square()).sqrt()  # std of the noise that is drawn anew
        kept = (after.square() - fresh.square()).sqrt()  # std of the predicted noise that stays
        out = x0 + kept * (x - x0) / sigma
        return out + fresh * noise_like(x, rng) if eta > 0 and after > 0 else out

    return integrate(lambda: step, denoiser, x, sigmas, generator, **options)


def dpm_solver_2m(denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: Rng = None, **options: Any) -> Tensor:
    """DPM-Solver++(2M) (Lu 2022, algorithm 2): second order for one call a level.

    Exact where D stays constant over a step; D is extrapolated to the step's middle, in the clock -ln sigma, from its
    last two values. The first step and the one to 0 are plain.
    """

    def make_step() -> Step:
        last: list[Tensor] = []  # D and the step in -ln sigma of the step before

        def step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: Rng) -> Tensor:
            x0 = middle = denoise(x, sigma)
            h = (sigma / after).log()
            if last and after > 0:
                before, h_before = last
                middle = x0 + (x0 - before) * h / (2 * h_before)
            last[:] = x0, h
            return after / sigma * x + (1 - after / sigma) * middle

        return step

    return integrate(make_step, denoiser, x, sigmas, generator, **options)


def gradient_estimation(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: Rng = None, *, gamma: float = 2.0, **options: Any
) -> Tensor:
    """DDIM along gamma eps + (1 - gamma) eps_before, eps the predicted noise (Permenter and Yuan 2024, algorithm 2).

    eps is read as the gradient of half the squared distance to the data, and the mix as a better estimate of it.
    gamma = 1 is DDIM. The first step is plain; so is the one to 0, which the paper, ending above 0, does not have.
    """
    gamma = _validate.number("gamma", gamma)

    def make_step() -> Step:
        last: list[Tensor] = []

        def step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: Rng) -> Tensor:
            noise = slope(denoise, x, sigma)
            mixed = gamma * noise + (1 - gamma) * last[0] if last and after > 0 else noise
            last[:] = [noise]
            return x + (after - sigma) * mixed

        return step

    return integrate(make_step, denoiser, x, sigmas, generator, **options)


def accelerated_ddim(denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: Rng = None, **options: Any) -> Tensor:
    """Li, Huang, Efimov, Wei, Chi and Chen 2024's accelerated DDIM: error O(1/n^2), for 2n - 2 calls on n levels.

    A step of half the spent variance along the score, corrected by how the score changed since the level before, where
    it is read at the point X^- that the flow came from, a step back towards noise. The first step has no level before;
    the one to 0 lands on D. Theirs is in variance-preserving coordinates; in ours the roots cancel, but for `back`.
    The first-order part, Euler in sigma^2, is poorer than DDIM for few levels.
    """

    def make_step() -> Step:
        last: list[Tensor] = []  # the level before

        def step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: Rng) -> Tensor:
            x0 = denoise(x, sigma)
            if after == 0:
                return x0
            score = (x0 - x) / sigma.square()
            spent = sigma.square() - after.square()
            out = x + spent / 2 * score
            if last:
                before = last[0]
                led = before.square() - sigma.square()  # spent by the step that led here
                back = (1 + sigma.square()) / (1 + before.square())  # the paper's alpha of that step
                point = x - back * led / 2 * score
                earlier = (denoise(point, before) - point) / before.square()
                out = out + spent.square() / (4 * back * led) * (score - earlier)
            last[:] = [sigma]
            return out

        return step

    return integrate(make_step, denoiser, x, sigmas, generator, **options)
