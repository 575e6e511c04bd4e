"""DDIM in other coordinates: a change of variables before the step and back after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidistill import _validate, processes
from minidistill.samplers.loop import Denoise, Denoiser, integrate, scale_of, slope

__all__ = ["CLOCKS", "conjugate"]

#: What t may be in `conjugate`, as a function of the level.
CLOCKS: dict[str, Callable[[Tensor], Tensor]] = {"vp": processes.vp().time, "log_sigma": torch.log}
NODES, WEIGHTS = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(24))


def conjugate(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generator: torch.Generator | None = None, *, lam: float = 0.0,
    clock: str = "vp", **options: Any,
) -> Tensor:
    """Conjugate integrator lambda-DDIM (Pandey, Rudolph and Mandt 2024, section 3, B_t = lambda I); one call a level.

    With eps the predicted noise, z = e^(lambda t) x has dz/dt = lambda z + e^(lambda t) eps dsigma/dt: the network's
    part is integrated exactly for constant eps, the linear part by Euler. lam = 0 is DDIM. lam shifts the Jacobian's
    eigenvalues, so it moves error between the two parts: a small one of the right sign cancels some of the leading
    error where eps varies, at the price of one of second order a step where it does not; a large one is unstable.

    `clock` is t, and lam's values belong to it. "vp", the paper's: the time of its variance-preserving process, in
    [0, 1] for levels up to 150, with sigma in units of twice the denoiser's `sigma_data`, since theirs was made for
    images in [-1, 1], of standard deviation 0.5. "log_sigma": ln sigma.
    ValueError: lam that is no finite number, another clock.
    """
    lam, time = _validate.number("lam", lam), _validate.choose("clock", clock, CLOCKS)
    unit = 2 * scale_of(denoiser)

    def step(denoise: Denoise, x: Tensor, sigma: Tensor, after: Tensor, rng: torch.Generator | None) -> Tensor:
        noise = slope(denoise, x, sigma)
        if after == 0:
            return x - sigma * noise
        h, extra = _conjugated(time, lam, sigma.double() / unit, after.double() / unit)
        gained = after - sigma + (unit * extra).to(x)
        return torch.exp(-lam * h).to(x) * ((1 + lam * h).to(x) * x + gained * noise)

    return integrate(lambda: step, denoiser, x, sigmas, generator, **options)


def _conjugated(time: Callable[[Tensor], Tensor], lam: float, sigma: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """The step in t, and the integral of e^(lam (t - t_sigma)) - 1 over levels from sigma to after, by Gauss-Legendre
    in ln level: exact to rounding."""
    width = (after / sigma).log() / 2
    level = sigma * (width * (NODES.to(sigma) + 1)).exp()
    grown = torch.expm1(lam * (time(level) - time(sigma)))
    return time(after) - time(sigma), width * (WEIGHTS.to(sigma) * grown * level).sum()
