"""Samplers: from noise to data along a schedule of noise levels, in EDM coordinates.

Every solver is a plain function of (denoiser, x, sigmas). They differ only in one step from sigma to the
next level, so the loop is written once, and a solver is its step.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from tqdm.auto import tqdm

from minidistill import _validate

Denoise = Callable[[Tensor, Tensor], Tensor]  # D(x, sigma), the label already bound
Step = Callable[[Denoise, Tensor, Tensor, Tensor, "torch.Generator | None"], Tensor]


def karras_sigmas(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, dtype: torch.dtype | None = None
) -> Tensor:
    """n levels from sigma_max to sigma_min, evenly spaced in sigma^(1/rho), then 0: (n+1,)
    (Karras 2022, equation 5)."""
    _validate.whole("n", n)
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max), ("rho", rho)):
        _validate.positive(name, value)
    if sigma_min > sigma_max:
        raise ValueError(f"sigma_min={sigma_min} is above sigma_max={sigma_max}")
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (high + ramp * (low - high)) ** rho
    return torch.cat([levels, levels.new_zeros(1)]).to(dtype or torch.get_default_dtype())


def _slope(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    """dx / dsigma of the probability flow: (x - D) / sigma, the predicted noise (Karras 2022, equation 3)."""
    return (x - denoise(x, sigma)) / sigma


def _euler_step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: torch.Generator | None) -> Tensor:
    return x + (after - sigma) * _slope(denoise, x, sigma)


def _heun_step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: torch.Generator | None) -> Tensor:
    slope = _slope(denoise, x, sigma)
    guess = x + (after - sigma) * slope
    if after == 0:  # the slope is not defined at 0, and Euler's step there is exact: it lands on D
        return guess
    return x + (after - sigma) * (slope + _slope(denoise, guess, after)) / 2


def _sde_step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: torch.Generator | None) -> Tensor:
    # dx = -score d(sigma^2) + dW with variance d(sigma^2), backwards in sigma; no noise on the last step.
    spent = sigma.square() - after.square()
    drifted = x + spent * (denoise(x, sigma) - x) / sigma.square()
    return drifted + spent.sqrt() * _noise_like(x, rng) if after > 0 else drifted


def euler(denoiser: Callable[..., Tensor], x: Tensor, sigmas: Tensor, **options: object) -> Tensor:
    """Euler on the probability flow, one call a step. Options as in `sample`."""
    return _integrate(_euler_step, denoiser, x, sigmas, **options)  # type: ignore[arg-type]


def heun(denoiser: Callable[..., Tensor], x: Tensor, sigmas: Tensor, **options: object) -> Tensor:
    """Heun on the probability flow (Karras 2022, algorithm 1): second order, 2n - 1 calls for n levels."""
    return _integrate(_heun_step, denoiser, x, sigmas, **options)  # type: ignore[arg-type]


def euler_maruyama(denoiser: Callable[..., Tensor], x: Tensor, sigmas: Tensor, **options: object) -> Tensor:
    """Euler-Maruyama on the reverse-time SDE of the variance-exploding process (Song 2021), one call a step."""
    return _integrate(_sde_step, denoiser, x, sigmas, **options)  # type: ignore[arg-type]


def ddim(denoiser: Callable[..., Tensor], x: Tensor, sigmas: Tensor, eta: float = 0.0, **options: object) -> Tensor:
    """DDIM (Song 2021, equation 12) in EDM coordinates: keep D, replace the noise. eta = 0 is deterministic
    (and equal to Euler); eta = 1 draws from the posterior q(x_after | x, x0 = D), which is ancestral sampling."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta!r}: wanted a number from 0 to 1")

    def step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: torch.Generator | None) -> Tensor:
        x0 = denoise(x, sigma)
        fresh = eta * after * (1 - (after / sigma).square()).sqrt()  # std of the noise that is drawn anew
        kept = (after.square() - fresh.square()).sqrt()  # std of the predicted noise that stays
        out = x0 + kept * (x - x0) / sigma
        return out + fresh * _noise_like(x, rng) if eta > 0 and after > 0 else out

    return _integrate(step, denoiser, x, sigmas, **options)  # type: ignore[arg-type]


SOLVERS: dict[str, Callable[..., Tensor]] = {
    "euler": euler, "heun": heun, "ddim": ddim, "euler_maruyama": euler_maruyama,
}


def sample(
    denoiser: Callable[..., Tensor], x: Tensor, sigmas: Tensor, solver: str = "heun", **options: object
) -> Tensor:
    """Run a solver by name.

    Args:
        denoiser: D(x, sigma, label).
        x: (n, *shape), standing at level sigmas[0]: sigmas[0] * noise to start from pure noise.
        sigmas: (m+1,) noise levels, descending, the last one 0.
        solver: "euler", "heun", "ddim" or "euler_maruyama".
        label: (n,) classes for a conditional denoiser.
        generator: for the noise of stochastic solvers.
        trajectory: return the whole path, (m+1, n, *shape), from x to the samples.
        progress: show a tqdm bar over the levels.
    Returns:
        samples (n, *shape), in x's dtype.
    Raises:
        ValueError: unknown solver, levels that do not descend to 0, non-finite x. TypeError: x not floating.
    """
    return _validate.choose("solver", solver, SOLVERS)(denoiser, x, sigmas, **options)


@torch.no_grad()
def _integrate(
    step: Step,
    denoiser: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    *,
    label: Tensor | None = None,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
    progress: bool = False,
) -> Tensor:
    _validate.samples("x", x, least=0)
    sigmas = torch.as_tensor(sigmas).to(x)
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas.diff() < 0).all()) or sigmas[-1] != 0:
        raise ValueError(f"sigmas={sigmas.tolist()}: wanted at least one level > 0, descending, and then 0")

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(x, sigma) if label is None else denoiser(x, sigma, label)

    path = [x]
    for sigma, after in tqdm(list(pairwise(sigmas)), disable=not progress, desc="sampling"):
        x = step(denoise, x, sigma, after, generator)
        if trajectory:
            path.append(x)
    return torch.stack(path) if trajectory else x


def _noise_like(x: Tensor, rng: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)
