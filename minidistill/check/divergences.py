"""Exercises of the notebooks 07 and 07b."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidistill.check import ours
from minidistill.check._core import Case, points, report
from minidistill.divergences.f_divergences import F

__all__ = ["chi_squared_conjugate", "energy_loss", "flipped_weight", "kl_integrand"]


def flipped_weight(f: Callable[..., Any]) -> bool:
    """07, exercise 1: f(weight, r) is the weight h of the divergence with p and q exchanged, at ratios r, (n,);
    `weight` is that of the divergence itself, a function of ratios."""
    r = torch.tensor([0.1, 0.5, 1.0, 3.0, 20.0])
    names = ("reverse_kl", "jensen_shannon", "pearson", "softened_reverse_kl")
    return report(1, f, [(name, (F[name].weight, r), F[name].flipped().weight(r)) for name in names], hints={
        "a factor r is missing": lambda h, r: h(1 / r),
        "the weight is that of the exchanged divergence at r, so that h is taken at 1 / r": lambda h, r: r * h(r),
        "exchanged, h is taken at 1 / r": lambda h, r: h(r),
        "one factor r too many: u^2 f°''(u) = f''(1 / u) / u": lambda h, r: r**2 * h(1 / r),
    })


def chi_squared_conjugate(f: Callable[..., Any]) -> bool:
    """07, exercise 2: f(u) is the conjugate sup over r >= 0 of u r - (r - 1)^2, u (n,)."""
    fine = torch.linspace(0, 10, 10_001, dtype=torch.float64)  # the best r, u / 2 + 1 or 0, is on it
    cases: list[Case] = []
    for title, values in (("u > 0", [0.5, 1.0, 4.0]), ("u around 0", [-1.0, 0.0, 1.0]), ("all u", [-9.0, -3.0, 2.0])):
        u = torch.tensor(values)
        cases.append((title, (u,), (u.double()[:, None] * fine - (fine - 1).square()).amax(1)))
    return report(2, f, cases, hints={
        "below u = -2 the best r of the parabola is negative, which no ratio is: clamp it at 0": lambda u: u + u**2 / 4,
        "where r = 0 is best, the conjugate is -f(0) = -1": lambda u: (u + u**2 / 4) * (u > -2),
        "that is the best r; the conjugate is u r - f(r) there": lambda u: (1 + u / 2).clamp(min=0),
    })


def kl_integrand(f: Callable[..., Any]) -> bool:
    """07, exercise 3: f(p_x0, q_x0, sigma) is |D_p - D_q|^2 / sigma^2, (n,), for levels sigma (n,)."""
    p, q, sigma = points(6), points(6, seed=1), torch.tensor([0.1, 0.3, 0.5, 1.0, 2.0, 5.0])
    return report(3, f, [
        ("equal denoisers", (p, p, sigma), torch.zeros(6)),
        ("many levels", (p, q, sigma), ours.kl_integrand(p, q, sigma)),
        ("four dimensions", (p.repeat(1, 2), q.repeat(1, 2), sigma), 2 * ours.kl_integrand(p, q, sigma)),
    ], hints={
        "per unit of ln sigma: d sigma = sigma d ln sigma, which leaves 1 / sigma^2":
            lambda p, q, s: ours.kl_integrand(p, q, s) / s,
        "the denoisers differ by sigma^2 times the scores, so that the square carries sigma^4":
            lambda p, q, s: ours.kl_integrand(p, q, s) * s**4,
        "the squared length is a sum over coordinates, not a mean": lambda p, q, s: (p - q).square().mean(1) / s**2,
        "the length is to be squared": lambda p, q, s: (p - q).norm(dim=1) / s**2,
    })


def energy_loss(f: Callable[..., Any]) -> bool:
    """07b, exercise 1: f(first, second, y, alpha) is the energy score's estimate from two draws, all (n, d), (n,)."""
    first, second, y = points(6), points(6, seed=1), points(6, seed=2)

    def length(v: Tensor, alpha: float) -> Tensor:
        return v.norm(dim=1) ** alpha

    return report(1, f, [
        (f"alpha = {alpha:g}", (first, second, y, alpha), ours.energy_loss(first, second, y, alpha))
        for alpha in (1.0, 0.5, 2.0)
    ], hints={
        "both draws belong into the first term: take the mean of the two":
            lambda a, b, y, alpha: length(a - y, alpha) - length(a - b, alpha) / 2,
        "the first term is a mean of the two draws, not their sum":
            lambda a, b, y, alpha: length(a - y, alpha) + length(b - y, alpha) - length(a - b, alpha) / 2,
        "the second term has the factor 1/2":
            lambda a, b, y, alpha: ours.energy_loss(a, b, y, alpha) - length(a - b, alpha) / 2,
        "the second term is taken off: it pushes the draws apart":
            lambda a, b, y, alpha: ours.energy_loss(a, b, y, alpha) + length(a - b, alpha),
        "|v| is the length of the vector, over all its coordinates together": lambda a, b, y, alpha: (
            ((a - y).abs() ** alpha + (b - y).abs() ** alpha - (a - b).abs() ** alpha).sum(1) / 2),
    })
