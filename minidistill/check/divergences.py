"""Exercises of the notebook 07."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from minidistill.check._core import Case, report
from minidistill.divergences.f_divergences import F

__all__ = ["chi_squared_conjugate", "flipped_weight"]


def flipped_weight(f: Callable[..., Any]) -> bool:
    """07, exercise 1: f(weight, r) is the weight h of the divergence with p and q exchanged, at ratios r, (n,);
    `weight` is that of the divergence itself, a function of ratios."""
    r = torch.tensor([0.1, 0.5, 1.0, 3.0, 20.0])
    names = ("reverse_kl", "jensen_shannon", "pearson", "softened_reverse_kl")
    return report(1, f, [(name, (F[name].weight, r), F[name].flipped().weight(r)) for name in names])


def chi_squared_conjugate(f: Callable[..., Any]) -> bool:
    """07, exercise 2: f(u) is the conjugate sup over r >= 0 of u r - (r - 1)^2, u (n,)."""
    fine = torch.linspace(0, 10, 10_001, dtype=torch.float64)  # the best r, u / 2 + 1 or 0, is on it
    cases: list[Case] = []
    for title, values in (("u > 0", [0.5, 1.0, 4.0]), ("u around 0", [-1.0, 0.0, 1.0]), ("all u", [-9.0, -3.0, 2.0])):
        u = torch.tensor(values)
        cases.append((title, (u,), (u.double()[:, None] * fine - (fine - 1).square()).amax(1)))
    return report(2, f, cases)
