"""Exercises of the notebook 08."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidistill.check import ours
from minidistill.check._core import Case, report
from minidistill.distributions import GaussianMixture
from minidistill.divergences import F

__all__ = ["best_cover", "divergence_weight", "reverse_kl_gradient"]


def divergence_weight(f: Callable[..., Any]) -> bool:
    """08, exercise 1: f(generator, r) is h(r) = r^2 f''(r) of a convex function of tensors at the ratios r, (n,)."""
    r = torch.tensor([0.2, 0.7, 1.0, 1.5, 4.0])

    def slope(generator: Callable[..., Any], at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        return torch.autograd.grad(generator(at).sum(), at)[0]

    return report(1, f, [
        ("f = -log r", (lambda u: -u.log(), r), torch.ones(5)),
        ("f = (r - 1)^2", (F["pearson"].f, r), 2 * r**2),
        ("f = (r - 1)^4", (lambda u: (u - 1) ** 4, r), 12 * r**2 * (r - 1) ** 2),
        ("Jensen-Shannon", (F["jensen_shannon"].f, r), r / (2 * (r + 1))),
    ], hints={
        "the factor r^2 is missing": lambda f, r: ours.divergence_weight(f, r) / r**2,
        "f'' is the second derivative; that is r^2 f'": lambda f, r: r**2 * slope(f, r),
        "the factor is r^2, not r": lambda f, r: ours.divergence_weight(f, r) / r,
    })


def reverse_kl_gradient(f: Callable[..., Any]) -> bool:
    """08, exercise 2: f(score_p, mean, std, z) is the mean of (s_q - s_p)(x) dx/d(mean, std), (2,), at x = mean + std
    z, for a score that maps (n,) to (n,)."""
    z = torch.randn(50, generator=torch.Generator().manual_seed(0))
    cases: list[Case] = []
    for title, p, mean, std in (
        ("two equal Gaussians", GaussianMixture([[0.5]], 0.8), 0.5, 0.8),
        ("a shifted Gaussian", GaussianMixture([[0.0]], 1.0), 1.5, 0.7),
        ("two modes", GaussianMixture([[-2.0], [2.0]], 0.6, [0.6, 0.4]), -1.0, 1.2),
    ):
        score = lambda x, p=p: p.score(x[:, None])[:, 0]  # noqa: E731
        gap = -z / std - score(mean + std * z)
        cases.append((title, (score, mean, std, z), torch.stack([gap.mean(), (gap * z).mean()])))

    def at_z(score: Any, mean: float, std: float, z: Tensor) -> Tensor:
        gap = -z / std - score(z)
        return torch.stack([gap.mean(), (gap * z).mean()])

    return report(2, f, cases, hints={
        "KL(q || p) falls along s_p - s_q, so that its gradient has the other sign":
            lambda s, m, sd, z: -ours.reverse_kl_gradient(s, m, sd, z),
        "s_q at mean + std z is -z / std": lambda s, m, sd, z: torch.stack(
            [(-z - s(m + sd * z)).mean(), ((-z - s(m + sd * z)) * z).mean()]),
        "take the teacher's score at the samples mean + std z, not at z": at_z,
        "dx / d std is z, not 1": lambda s, m, sd, z: ours.reverse_kl_gradient(s, m, sd, z)[[0, 0]],
    })


def best_cover(f: Callable[..., Any]) -> bool:
    """08, exercise 3: f(means, stds, weights) is the mean and the standard deviation (2,) of the Gaussian q with the
    least KL(p || q) to a mixture p on the line, weights that sum to 1."""
    cases: list[Case] = []
    for title, means, stds, weights in (
        ("one Gaussian", [1.0], [0.5], [1.0]), ("two equal modes", [-2.0, 2.0], [0.6, 0.6], [0.5, 0.5]),
        ("three modes", [-1.0, 0.0, 3.0], [0.4, 1.0, 0.7], [0.5, 0.3, 0.2]),
    ):
        m, s, w = torch.tensor(means), torch.tensor(stds), torch.tensor(weights)
        p = GaussianMixture(m[:, None], s, w)
        cases.append((title, (m, s, w), [float(p.mean), p.sigma_data]))
    return report(3, f, cases, hints={
        "the standard deviation is the root of the variance":
            lambda m, s, w: ours.best_cover(m, s, w) ** torch.tensor([1, 2]),
        "the modes' own variances are missing": lambda m, s, w: ours.best_cover(m, 0 * s, w),
        "how far the modes lie apart counts too": lambda m, s, w: torch.stack([(w * m).sum(), (w * s**2).sum().sqrt()]),
    })
