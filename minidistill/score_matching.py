"""Score matching losses, per sample: each has the score (or the denoiser) as its minimiser."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minidistill import _validate


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2: every noise level's loss starts at about 1
    (Karras 2022, table 1)."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


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
    xt = x0 + _validate.broadcast_sigma(sigma, x0) * noise
    return weight * (denoiser(xt, sigma, label) - x0).square().flatten(1).mean(1)


def log_normal_sigma(n: int, mean: float, std: float, rng: torch.Generator, device: torch.device | str) -> Tensor:
    """ln sigma ~ N(mean, std^2), (n,): EDM's training distribution of noise levels."""
    return torch.exp(mean + std * torch.randn(n, generator=rng, device=device))


def log_uniform_sigma(n: int, low: float, high: float, rng: torch.Generator, device: torch.device | str) -> Tensor:
    """ln sigma uniform on [ln low, ln high], (n,)."""
    return low * (high / low) ** torch.rand(n, generator=rng, device=device)
