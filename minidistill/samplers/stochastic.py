"""Stochastic samplers: chains that draw fresh noise on the way, and Langevin dynamics at fixed levels.

Every solver is a plain function of (denoiser, x, sigmas, generator); the keyword options, the result and the errors
are those of `samplers.sample`. The step to level 0 lands on D without noise. With a `batch_size` the chunks draw
their noise one after the other, so the samples depend on it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from minidistill import _validate
from minidistill._random import noise_like
from minidistill.samplers.loop import (
    Advance,
    Denoise,
    Denoiser,
    Report,
    check_levels,
    in_chunks,
    integrate,
)
from minidistill.samplers.ode import ddim, heun_step

__all__ = [
    "Rng", "accelerated_ddpm", "ancestral", "annealed_langevin", "edm_stochastic", "euler_maruyama", "langevin",
    "predictor_corrector",
]

Rng = torch.Generator | None


def euler_maruyama(denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: Rng = None, **options: Any) -> Tensor:
    """Euler-Maruyama on the reverse-time SDE of the variance-exploding process (Song 2021): dx = -score d(sigma^2)
    + dW with variance d(sigma^2), backwards in sigma. One call a level."""
    return integrate(lambda: _sde_step, denoiser, x, sigmas, generator, **options)


def _sde_step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: Rng) -> Tensor:
    spent = sigma.square() - after.square()
    drifted = x + spent * (denoise(x, sigma) - x) / sigma.square()
    return drifted + spent.sqrt() * noise_like(x, rng) if after > 0 else drifted


def ancestral(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: Rng = None, *, variance: str = "small", **options: Any
) -> Tensor:
    """DDPM's ancestral sampling (Ho 2020, algorithm 2), one call a level.

    Draws about the posterior mean of x_after given x and x0 = D. The variance: "small" is the posterior's own,
    beta-tilde, right for data at one point and equal to `ddim(eta=1)`; "large" is beta, right for data N(0, I).
    """
    _validate.choose("variance", variance, dict.fromkeys(("small", "large")))
    if variance == "small":
        return ddim(denoiser, x, sigmas, generator, eta=1.0, **options)

    def step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: Rng) -> Tensor:
        x0 = denoise(x, sigma)
        out = x0 + (after / sigma).square() * (x - x0)
        # beta = 1 - (1 + after^2) / (1 + sigma^2) in variance-preserving coordinates, times 1 + after^2 in ours.
        beta = (sigma.square() - after.square()) * (1 + after.square()) / (1 + sigma.square())
        return out + beta.sqrt() * noise_like(x, rng) if after > 0 else out

    return integrate(lambda: step, denoiser, x, sigmas, generator, **options)


def edm_stochastic(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: Rng = None, *,
    churn: float = 30.0, s_min: float = 0.0, s_max: float = math.inf, s_noise: float = 1.0, **options: Any,
) -> Tensor:
    """EDM's stochastic sampler (Karras 2022, algorithm 2): raise the level by noise, then a step of Heun; 2n - 1 calls.

    At levels in [s_min, s_max] sigma grows by the factor 1 + min(churn / n, sqrt(2) - 1), with noise of std s_noise
    in place of 1. churn = 0 is Heun. The paper's CIFAR-10 values are churn 30, s_min 0.01, s_max 1, s_noise 1.007, the
    last against a network that removes too much noise; an exact denoiser wants 1.
    """
    churn, s_min, s_noise = (_validate.positive(name, value, strictly=False) for name, value in (
        ("churn", churn), ("s_min", s_min), ("s_noise", s_noise)))
    s_max = s_max if isinstance(s_max, float) and s_max == math.inf else _validate.number("s_max", s_max)
    if not s_max >= s_min:
        raise ValueError(f"s_max={s_max!r}: wanted a number >= s_min={s_min}")
    growth = min(churn / max(len(sigmas) - 1, 1), math.sqrt(2) - 1)

    def step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: Rng) -> Tensor:
        if growth > 0 and s_min <= sigma <= s_max:
            raised = sigma * (1 + growth)
            x = x + (raised.square() - sigma.square()).sqrt() * s_noise * noise_like(x, rng)
            sigma = raised
        return heun_step(denoise, x, sigma, after)

    return integrate(lambda: step, denoiser, x, sigmas, generator, **options)


def predictor_corrector(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: Rng = None, *,
    snr: float = 0.16, corrector_steps: int = 1, **options: Any,
) -> Tensor:
    """Predictor-corrector (Song 2021, algorithm 2): a step of Euler-Maruyama, then `corrector_steps` of Langevin at the
    new level, none at 0. n + (n - 1) corrector_steps calls for n levels.

    The Langevin step is 2 (snr |z| / |score|)^2 with root mean squares over the chunk, that of the noise z being 1:
    the norms of a sample's own z and score would tie its step size to its noise, a bias in low dimension.
    """
    snr = _validate.positive("snr", snr)
    corrector_steps = _validate.whole("corrector_steps", corrector_steps, least=0)

    def step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: Rng) -> Tensor:
        x = _sde_step(denoise, x, sigma, after, rng)
        for _ in range(corrector_steps if after > 0 else 0):
            score = (denoise(x, after) - x) / after.square()
            x = _langevin_move(x, score, 2 * snr**2 / score.square().mean(), rng)
        return x

    return integrate(lambda: step, denoiser, x, sigmas, generator, **options)


def accelerated_ddpm(denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: Rng = None, **options: Any) -> Tensor:
    """Li, Huang, Efimov, Wei, Chi and Chen 2024's accelerated DDPM: error O(1/n) in total variation, where DDPM's is
    O(1/sqrt n), for one call a level.

    Theirs is in variance-preserving coordinates; in ours the roots cancel, and it is Euler-Maruyama with half of the
    step's noise drawn before the score is read and half after. The step to 0 lands on D.
    """

    def step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: Rng) -> Tensor:
        if after == 0:
            return denoise(x, sigma)
        spent = sigma.square() - after.square()
        half = (spent / 2).sqrt()
        shaken = x + half * noise_like(x, rng)
        score = (denoise(shaken, sigma) - shaken) / sigma.square()
        return shaken + spent * score + half * noise_like(x, rng)

    return integrate(lambda: step, denoiser, x, sigmas, generator, **options)


def annealed_langevin(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: Rng = None, *,
    steps_per_level: int = 10, snr: float = 0.16, **options: Any,
) -> Tensor:
    """Annealed Langevin dynamics (Song and Ermon 2019, algorithm 1): `steps_per_level` moves at each level below
    sigmas[0], where x is taken to stand already, of step 2 (snr sigma)^2; from the last, the denoiser to 0 (Song and
    Ermon 2020). (n - 1) steps_per_level + 1 calls for n levels. It needs levels close to each other, or many moves."""
    steps_per_level, snr = _validate.whole("steps_per_level", steps_per_level), _validate.positive("snr", snr)

    def step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: Rng) -> Tensor:
        if after == 0:
            return denoise(x, sigma)
        for _ in range(steps_per_level):
            x = _langevin_move(x, (denoise(x, after) - x) / after.square(), 2 * (snr * after).square(), rng)
        return x

    return integrate(lambda: step, denoiser, x, sigmas, generator, **options)


def langevin(
    denoiser: Denoiser, x: Tensor, sigma: float, steps: int, step_size: float, generator: Rng = None, *,
    label: Tensor | None = None, trajectory: bool = False, progress: bool = False, batch_size: int | None = None,
    report: Report | None = None,
) -> Tensor:
    """Unadjusted Langevin dynamics at one noise level: x <- x + step_size score + sqrt(2 step_size) z, `steps` times.

    Its law tends to the data's at noise level `sigma`, up to a bias of O(step_size), a variance in data units squared.
    One call a step. Options and errors as in `samplers.sample`; returns (n, *shape), or (steps + 1, n, *shape).
    """
    sigma, step_size = _validate.positive("sigma", sigma), _validate.positive("step_size", step_size)
    steps = _validate.whole("steps", steps)
    at = check_levels(x, torch.tensor([sigma, 0.0], dtype=torch.float64))[0]
    size = torch.as_tensor(step_size).to(at)
    report = Report() if report is None else report

    def solve(denoise: Denoise, x: Tensor, advance: Advance) -> Tensor:
        path = [x]
        for _ in range(steps):
            x = _langevin_move(x, (denoise(x, at) - x) / at.square(), size, generator)
            if trajectory:
                path.append(x)
            advance(1)
        return torch.stack(path) if trajectory else x

    out = in_chunks(solve, denoiser, x, steps, label, progress, batch_size, report, dim=int(trajectory))
    report.levels = [float(sigma)] * (steps + 1)
    return out


def _langevin_move(x: Tensor, score: Tensor, step_size: Tensor, rng: Rng) -> Tensor:
    return x + step_size * score + (2 * step_size).sqrt() * noise_like(x, rng)
