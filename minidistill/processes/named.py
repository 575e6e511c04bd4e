"""Forward processes by name: one process in many clothes.

The rest of the package speaks EDM coordinates, x = x0 + sigma e, where alpha = 1. The other clothes are made here,
each a `Process` by its alpha, its sigma and the inverse of their ratio. This is also the one place to import from:

    forward_process.py   `Process`, what follows from alpha and sigma; `prior_kl`, how far it ends from its prior
    conversions.py       x0, eps, v, score and velocity, each turned into any other
    process_models.py    models as denoisers and back; alpha-deblending
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.processes.process import Curve, Process, uniform

__all__ = [
    "PROCESSES", "cosine", "ddpm", "edm", "flow", "iadb", "interpolant", "sub_vp", "ve", "vp",
]


def edm(sigma_max: float = 1000.0, log_mean: float = -1.2, log_std: float = 1.2) -> Process:
    """The identity: alpha = 1, sigma = t; trained at ln sigma ~ N(log_mean, log_std^2) (Karras 2022, table 1)."""
    _validate.positive("sigma_max", sigma_max)
    _validate.positive("log_std", log_std)
    return Process(
        "edm", torch.ones_like, lambda t: t, lambda s: s, 0.0, sigma_max,
        quantile=lambda u: torch.exp(log_mean + log_std * torch.special.ndtri(u)).clamp(max=sigma_max),
    )


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Process:
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t on [0, 1] (Song 2021, equation 30).
    At t = 0 the noise is sigma_min already; uniform t in training is log-uniform sigma."""
    _validate.positive("sigma_min", sigma_min)
    _validate.positive("sigma_max", sigma_max)
    if sigma_max <= sigma_min:
        raise ValueError(f"sigma_max={sigma_max!r}: wanted a number above sigma_min={sigma_min!r}")
    span = math.log(sigma_max / sigma_min)
    return Process("ve", torch.ones_like, lambda t: sigma_min * torch.exp(span * t),
                   lambda s: torch.log(s / sigma_min) / span, 0.0, 1.0, quantile=uniform(1e-5, 1.0))


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Process:
    """Variance preserving, beta(t) linear in t on [0, 1] (Song 2021, equation 32): alpha = e^(-B/2), B the integral of
    beta; alpha^2 + sigma^2 = 1; f = -beta/2, g^2 = beta. Training: t uniform from 1e-5 on, as for VE and sub-VP."""
    integral, inverse = _linear_rate(beta_min, beta_max)
    return _of_variance(
        "vp", lambda t: torch.exp(-0.5 * integral(t)), lambda t: -torch.expm1(-integral(t)),
        lambda s: inverse(torch.log1p(s.square())),  # since 1 / alpha^2 = 1 + level^2
        uniform(1e-5, 1.0),
    )


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Process:
    """VP's alpha with less noise on the way: sigma = 1 - alpha^2 (Song 2021, appendix C). The drift is VP's, -beta/2;
    g^2 = beta (1 - e^(-2B)), below VP's beta, is just what `diffusion` finds from alpha and sigma."""
    integral, inverse = _linear_rate(beta_min, beta_max)
    return Process(
        "sub_vp", lambda t: torch.exp(-0.5 * integral(t)), lambda t: -torch.expm1(-integral(t)),
        lambda s: inverse(2 * torch.asinh(s / 2)),  # since level = e^(B/2) - e^(-B/2)
        0.0, 1.0, prior_std=1.0, quantile=uniform(1e-5, 1.0),
    )


def ddpm(steps: int = 1000, beta_min: float = 0.1, beta_max: float = 20.0, betas: Tensor | None = None) -> Process:
    """DDPM (Ho 2020): alpha^2 = abar_t, the product of 1 - beta_s over s <= t, at t = 0, 1, ..., steps - 1 as diffusers
    counts. In between log level is linear in t (as in k-diffusion). f and g are per step. Training: whole t, uniform.

    The usual betas, linear from beta_min / steps to beta_max / steps, become VP at its time (t + 1) / steps as steps ->
    infinity (Song 2021, appendix B). `betas`, (steps,) numbers in (0, 1), replaces them.
    """
    if betas is None:
        _validate.whole("steps", steps, least=2)
        betas = torch.linspace(beta_min / steps, beta_max / steps, steps, dtype=torch.float64)
    betas = torch.as_tensor(betas).detach().double()
    if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(f"betas={betas.tolist()[:3]}... {tuple(betas.shape)}: wanted two or more between 0 and 1")
    steps, levels = len(betas), torch.log1p(-betas).cumsum(0).neg().expm1().log() / 2  # log level; level^2 = 1/abar - 1

    def log_level(t: Tensor) -> Tensor:
        low, table = t.detach().floor().long().clamp(0, steps - 2), levels.to(t)
        return table[low] + (t - low) * (table[low + 1] - table[low])

    def time(s: Tensor) -> Tensor:
        wanted, table = s.log().contiguous(), levels.to(s)
        low = (torch.searchsorted(table, wanted, right=True) - 1).clamp(0, steps - 2)
        return low + (wanted - table[low]) / (table[low + 1] - table[low])

    return Process(
        "ddpm", lambda t: torch.sigmoid(-2 * log_level(t)).sqrt(), lambda t: torch.sigmoid(2 * log_level(t)).sqrt(),
        time, 0.0, steps - 1.0, prior_std=1.0, quantile=lambda u: (u * steps).floor().clamp(max=steps - 1),
    )


def cosine(offset: float = 0.008) -> Process:
    """alpha = cos(h) / cos(h_0) with h = pi/2 (t + offset) / (1 + offset), alpha^2 + sigma^2 = 1 (Nichol & Dhariwal
    2021, equation 17, without their cap on beta: alpha is 0 at t = 1). Training: t uniform."""
    _validate.positive("offset", offset)
    unit = 0.5 * math.pi / (1 + offset)  # radians per unit of t
    sin0, cos0 = math.sin(unit * offset), math.cos(unit * offset)
    return _of_variance(
        "cosine", lambda t: torch.sin(unit * (1 - t)) / cos0,
        # (cos^2 h_0 - cos^2 h) / cos^2 h_0, without its cancellation near t = 0
        lambda t: torch.sin(unit * t) * torch.sin(unit * (t + 2 * offset)) / cos0**2,
        lambda s: torch.atan((s.square() + sin0**2).sqrt() / cos0) / unit - offset,
    )


def flow(logit_normal: tuple[float, float] | None = None) -> Process:
    """Flow matching, rectified flow: alpha = 1 - t, sigma = t, a straight line with velocity e - x0 (Lipman 2023, Liu
    2023). Training: t uniform, or with `logit_normal` = (mean, std) logit t ~ N(mean, std^2) (Esser 2024: (0, 1))."""
    mean, std = logit_normal or (0.0, 1.0)
    _validate.positive("logit_normal's std", std)
    return Process(
        "flow", lambda t: 1 - t, lambda t: t, lambda s: 1 / (1 + 1 / s), 0.0, 1.0, prior_std=1.0,
        quantile=logit_normal and (lambda u: torch.sigmoid(mean + std * torch.special.ndtri(u))),
    )


def iadb() -> Process:
    """Iterative alpha-(de)blending, x_a = (1 - a) noise + a x0 (Heitz 2023): flow, at t = 1 - a. See `deblend`."""
    return replace(flow(), name="iadb")


def interpolant(latent: float = 2.0) -> Process:
    """The stochastic interpolant x_t = (1 - t) x0 + t x1 + gamma z with gamma^2 = latent t (1 - t) (Albergo 2023). For
    Gaussian x1 it collapses: sigma^2 = t^2 + gamma^2, and E[velocity | x_t] is the same. latent = 0 is flow, 1 a
    Brownian bridge (sigma^2 = t), 2 preserves variance. Training: t uniform."""
    _validate.positive("latent", latent, strictly=False)

    def time(s: Tensor) -> Tensor:  # level^2 = r^2 + latent r with r = t / (1 - t): the root without cancellation
        r = 2 * s / (latent / s + (latent**2 / s.square() + 4).sqrt())
        return torch.where(s > 0, 1 / (1 + 1 / r), 0)

    return _of_variance("interpolant", lambda t: 1 - t, lambda t: t * (latent + (1 - latent) * t), time)


def _of_variance(name: str, alpha: Curve, variance: Curve, time: Curve, quantile: Curve | None = None) -> Process:
    """A process on [0, 1] that ends in N(0, I), by its sigma^2."""
    return Process(name, alpha, lambda t: variance(t).sqrt(), time, 0.0, 1.0, variance, 1.0, quantile)


def _linear_rate(beta_min: float, beta_max: float) -> tuple[Curve, Curve]:
    """B(t), the integral from 0 to t of beta, linear from beta_min to beta_max on [0, 1], and its inverse."""
    _validate.positive("beta_min", beta_min, strictly=False)
    _validate.positive("beta_max", beta_max)
    slope = beta_max - beta_min
    # The root of slope/2 t^2 + beta_min t = B, in the form without cancellation near 0.
    return (lambda t: beta_min * t + 0.5 * slope * t.square(),
            lambda total: 2 * total / (beta_min + (beta_min**2 + 2 * slope * total).sqrt()))


#: The processes by name, with their usual constants.
PROCESSES: dict[str, Callable[[], Process]] = {
    make.__name__: make for make in (edm, ve, vp, sub_vp, ddpm, cosine, flow, iadb, interpolant)
}
