"""The denoising loss: what teachers, fake networks and almost everybody train with; its weight and its noise levels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.score_matching.fields import call, check_samples, per_sample

__all__ = ["denoising_loss", "edm_weight", "log_normal_sigma", "log_uniform_sigma"]


def denoising_loss(
    denoiser: Callable[..., Tensor],
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    label: Tensor | None = None,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """weight |D(x0 + sigma e) - x0|^2 / dim, (n,) (Vincent 2011, in denoiser form).

    x0 and noise are (n, *shape), sigma and weight (n,). Its minimiser is E[x0 | x]; with weight
    1 / sigma^4 it is denoising score matching of the score (D - x) / sigma^2, times 2 / dim.
    """
    check_samples("x0", x0)
    _validate.like("noise", noise, "x0", x0)
    xt = x0 + _validate.broadcast_sigma(sigma, x0) * noise
    return per_sample((call(denoiser, xt, sigma, label) - x0).square(), weight)


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2: every noise level's loss starts at about 1
    (Karras 2022, table 1). sigma: (n,), > 0."""
    sigma_data = _validate.positive("sigma_data", sigma_data)
    sigma = _validate.tensor("sigma", sigma)
    if sigma.device.type == "cpu" and _validate.any_of(~((sigma > 0) & sigma.isfinite())):
        raise ValueError("sigma holds a number that is no noise level; wanted finite numbers > 0")
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


def log_normal_sigma(n: int, mean: float, std: float, rng: torch.Generator, device: torch.device | str) -> Tensor:
    """ln sigma ~ N(mean, std^2), (n,): EDM's training distribution of noise levels."""
    n, mean, std = _validate.whole("n", n, least=0), _validate.number("mean", mean), _validate.positive("std", std)
    _validate.generator("rng", rng)
    return torch.exp(mean + std * torch.randn(n, generator=rng, device=device))


def log_uniform_sigma(n: int, low: float, high: float, rng: torch.Generator, device: torch.device | str) -> Tensor:
    """ln sigma uniform on [ln low, ln high], (n,), 0 < low <= high."""
    n, low, high = _validate.whole("n", n, least=0), _validate.positive("low", low), _validate.positive("high", high)
    _validate.generator("rng", rng)
    if low > high:
        raise ValueError(f"low={low:g} is above high={high:g}")
    return low * (high / low) ** torch.rand(n, generator=rng, device=device)
