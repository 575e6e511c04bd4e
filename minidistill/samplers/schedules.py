"""Schedules: which noise levels a sampler visits. Each gives n levels, descending, and the final 0: (n+1,).

The usual ends, 0.002 and 80, are EDM's for data of standard deviation 0.5; `levels_of` has them for any model.

A schedule is a clock u(sigma), and its levels are evenly spaced in u: sigma^(1/rho) for Karras, ln sigma for
log-linear, and for an optimal one the clock in which every step of a given solver errs as much as any other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.samplers.loop import Denoiser, check_label, scale_of
from minidistill.samplers.ode import heun

__all__ = [
    "PATH_ENTRIES", "geometric_sigmas", "karras_sigmas", "levels_of", "log_linear_sigmas", "optimal_sigmas",
    "range_of",
]

PATH_ENTRIES = 2**24  # numbers of a fine path in memory at once


def karras_sigmas(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, dtype: torch.dtype | None = None
) -> Tensor:
    """n levels from sigma_max to sigma_min, evenly spaced in sigma^(1/rho), then 0: (n+1,)
    (Karras 2022, equation 5)."""
    n, sigma_min, sigma_max = _check(n, sigma_min, sigma_max)
    rho = _validate.positive("rho", rho)
    if max(abs(math.log(sigma_min)), abs(math.log(sigma_max))) > 500 * rho:  # sigma^(1/rho) leaves the range of numbers
        raise ValueError(f"rho={rho:g}: wanted a larger number for levels from {sigma_min:g} to {sigma_max:g}")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _finish((high + _ramp(n) * (low - high)) ** rho, dtype)


def range_of(
    denoiser: Denoiser, sigma_min: float | None = None, sigma_max: float | None = None
) -> tuple[float, float]:
    """The lowest and the highest level for a denoiser: those given, else 0.004 and 160 of its `sigma_data`, which are
    EDM's 0.002 and 80 for data of 0.5 (and for a denoiser that does not tell its scale)."""
    scale = scale_of(denoiser)
    return 0.004 * scale if sigma_min is None else sigma_min, 160 * scale if sigma_max is None else sigma_max


def levels_of(
    denoiser: Denoiser, n: int, sigma_min: float | None = None, sigma_max: float | None = None, rho: float = 7.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`karras_sigmas` for a denoiser, whatever its data's units: n levels over `range_of` it, then 0: (n+1,)."""
    return karras_sigmas(n, *range_of(denoiser, sigma_min, sigma_max), rho, dtype)


def log_linear_sigmas(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, dtype: torch.dtype | None = None
) -> Tensor:
    """n levels from sigma_max to sigma_min, evenly spaced in ln sigma, then 0: (n+1,) (Permenter and Yuan 2024).
    The limit of `karras_sigmas` for large rho, and of the variance-exploding process's even times (Song 2021)."""
    n, sigma_min, sigma_max = _check(n, sigma_min, sigma_max)
    high, low = math.log(sigma_max), math.log(sigma_min)
    return _finish((high + _ramp(n) * (low - high)).exp(), dtype)


def geometric_sigmas(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, dtype: torch.dtype | None = None
) -> Tensor:
    """n levels whose times decay exponentially towards an early stop, then 0: (n+1,) (Chen, Lee and Lu 2023).

    In the time t of the Ornstein-Uhlenbeck process dx = -x/2 dt + dW, where sigma^2 = e^t - 1: steps are
    proportional to min(1, t), so even for t > 1 and geometric below, where uniform steps would pay as much for the
    last stretch as for all the rest. The early stop is at t = delta = ln(1 + sigma_min^2); run the solver with
    `early_stop=True` to stop there. For sigma << 1 (sigma^2 = t) and for sigma >> 1 (sigma = e^(t/2)) this is even in
    ln sigma too, but with twice the step above as below: log-linear with the small levels visited more densely.
    """
    n, sigma_min, sigma_max = _check(n, sigma_min, sigma_max)

    def clock(sigma: float) -> float:  # the integral of dt / min(1, t)
        t = math.log1p(sigma**2)
        return t - 1 if t > 1 else math.log(t)

    high, low = clock(sigma_max), clock(sigma_min)
    u = high + _ramp(n) * (low - high)
    return _finish(torch.where(u > 0, u + 1, u.exp()).expm1().sqrt(), dtype)


@torch.no_grad()
def optimal_sigmas(
    denoiser: Denoiser,
    x: Tensor,
    n: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    *,
    order: int = 1,
    fine: int = 256,
    label: Tensor | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """n levels at which all steps of a solver of that order err alike, measured on this denoiser, then 0: (n+1,).

    A step h from sigma errs by about h^(order+1) e(sigma), e the size of d^(order+1) x / dsigma^(order+1) along the
    path: on average over the batch, by differences on a fine path of Heun's method. The sum over n steps is least
    where e^(1/(order+1)) dsigma is the same for each, so that is the clock. Left out: how errors of different levels
    add up, and errors of high order, so with few levels (below 6 or so for order 2) another schedule may be better.

    Args:
        x: (m, *shape), a batch at level sigma_max; a few hundred samples are enough.
        order: of the one-step solver that the levels are for: 1 for Euler and DDIM, 2 for Heun. DPM-Solver++(2M) errs
            in another variable and wants steps of smoothly varying size: log-linear levels serve it better.
        fine: levels of the fine path, which costs 2 * fine - 1 network calls on the batch.
        batch_size: samples whose paths are held at once, (fine, batch_size, *shape) in float64; None for as many as
            keep that below 2^24 numbers, 128 MiB (a few times that in all).
    Raises:
        ValueError: bad counts or levels, x not finite or empty, order not 1 or 2.
    """
    n, sigma_min, sigma_max = _check(n, sigma_min, sigma_max)
    _validate.samples("x", x)
    order = int(_validate.choose("order", str(order), {"1": "1", "2": "2"}))
    fine = _validate.whole("fine", fine, least=8)
    if batch_size is not None:
        _validate.whole("batch_size", batch_size)
    check_label(x, label)
    grid = log_linear_sigmas(fine, sigma_min, sigma_max, torch.float64)
    levels = grid[:-1].to(x.device)

    def wide(u: Tensor, *rest: Tensor) -> Tensor:  # rounding would be divided by small steps
        return _validate.denoised(denoiser(u.to(x.dtype), rest[0].to(x.dtype), *rest[1:]), u).double()

    squares = torch.zeros_like(levels)  # of the derivative at each level, summed over samples and dimensions
    size = batch_size or max(1, PATH_ENTRIES // (fine * x[0].numel()))
    for start in range(0, len(x), size):
        part, mine = x[start : start + size].double(), None if label is None else label[start : start + size]
        derivative = heun(wide, part, grid, label=mine, trajectory=True, early_stop=True).flatten(1)
        for _ in range(order + 1):
            (derivative,) = torch.gradient(derivative, spacing=(levels,), dim=0, edge_order=2)
        squares += derivative.square().sum(1)
    rate = (squares / x.numel()).pow(1 / (2 * order + 2)).cpu()  # e^(1/(order+1))
    log_level = levels.cpu().log()
    clock = torch.cat([rate.new_zeros(1), torch.cumsum(-(rate[1:] + rate[:-1]) / 2 * levels.cpu().diff(), 0)])
    if clock[-1] == 0:  # the paths are straight: any levels do
        return log_linear_sigmas(n, sigma_min, sigma_max, dtype)
    # Where the clock strikes k / (n - 1), ln sigma interpolated linearly between the fine levels.
    strikes = _ramp(n) * clock[-1]
    right = torch.searchsorted(clock, strikes).clamp(1, fine - 1)
    part = (strikes - clock[right - 1]) / (clock[right] - clock[right - 1])
    out = (log_level[right - 1] + part * (log_level[right] - log_level[right - 1])).exp()
    out[0] = sigma_max
    if n > 1:
        out[-1] = sigma_min
    return _finish(out, dtype)


def _check(n: int, sigma_min: float, sigma_max: float) -> tuple[int, float, float]:
    n = _validate.whole("n", n)
    low, high = _validate.positive("sigma_min", sigma_min), _validate.positive("sigma_max", sigma_max)
    if low > high:
        raise ValueError(f"sigma_min={low} is above sigma_max={high}")
    return n, low, high


def _ramp(n: int) -> Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64)


def _finish(levels: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.cat([levels, levels.new_zeros(1)]).to(dtype or torch.get_default_dtype())
