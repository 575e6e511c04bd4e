"""Exercises of the notebook 09."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from minidistill.check._core import Case, points, report
from minidistill.distributions import GaussianMixture, ring

__all__ = ["dmd_gradient", "mixture_denoiser"]


def dmd_gradient(f: Callable[..., Any]) -> bool:
    """09, exercise 1: f(x0, teacher_x0, fake_x0) is DMD's gradient in x0, (n, d): (D_q - D_p) / mean |x0 - D_p|."""
    x0, p, q = points(6), points(6, seed=1), points(6, seed=2)
    wide = torch.cat([x0, 3 * x0], 1)
    return report(1, f, [
        ("equal denoisers", (x0, p, p), torch.zeros(6, 2)),
        ("two dimensions", (x0, p, q), (q - p) / (x0 - p).abs().sum(1, keepdim=True) * 2),
        ("four dimensions", (wide, 0 * wide, wide), 4 * wide / wide.abs().sum(1, keepdim=True)),
    ])


def mixture_denoiser(f: Callable[..., Any]) -> bool:
    """09, exercise 2: f(teacher_x0, fake_x0, log_ratio, alpha) is the denoiser, (n, d), of alpha p + (1 - alpha) q from
    those of p and q and log p / q, (n,)."""
    p, q, x, sigma = ring(3, std=0.4), GaussianMixture([[0.5, 0.2]], 0.9), points(6), 0.7
    log_ratio = p.noised(sigma).log_prob(x) - q.noised(sigma).log_prob(x)
    cases: list[Case] = []
    for alpha in (0.5, 0.1, 0.8):
        both = GaussianMixture(torch.cat([p.means, q.means]), torch.cat([p.covs, q.covs]),
                               torch.cat([alpha * p.weights, (1 - alpha) * q.weights]))
        cases.append((f"alpha = {alpha:g}", (p(x, sigma), q(x, sigma), log_ratio, alpha), both(x, sigma)))
    return report(2, f, cases)
