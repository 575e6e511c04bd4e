"""Exercises of the notebook 10."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from minidistill.check._core import report
from minidistill.divergences import pseudo_huber

__all__ = ["gaussian_fisher", "pseudo_huber_slope"]


def pseudo_huber_slope(f: Callable[..., Any]) -> bool:
    """10, exercise 1: f(y, c) is d'(y), (n, d), of the distance d(y) = sqrt(|y|^2 + c^2) - c, one for each row of y."""
    plane = torch.tensor([[0.0, 0.0], [0.06, -0.08], [3.0, 4.0], [-300.0, 0.0]])
    space = torch.tensor([[1.0, 2.0, -2.0], [0.0, 0.1, 0.0]])
    return report(1, f, [
        (f"{len(y)} differences in {y.shape[1]} dimensions, c = {c:g}", (y, c), pseudo_huber(c).gradient(y))
        for y, c in ((plane, 0.1), (plane, 2.0), (space, 1.0))
    ])


def gaussian_fisher(f: Callable[..., Any]) -> bool:
    """10, exercise 2: f(mean_p, std_p, mean_q, std_q, sigma) is E (s_p - s_q)^2 over q_sigma, for two Gaussians on the
    line with noise of standard deviation sigma added to both."""
    x = torch.linspace(-60.0, 60.0, 24001, dtype=torch.float64)

    def integral(mean_p: float, std_p: float, mean_q: float, std_q: float, sigma: float) -> float:
        p, q = std_p**2 + sigma**2, std_q**2 + sigma**2
        gap = (x - mean_q) / q - (x - mean_p) / p
        law = torch.exp(-(x - mean_q).square() / (2 * q))
        return float((law * gap.square()).sum() / law.sum())

    return report(2, f, [
        (title, arguments, integral(*arguments)) for title, arguments in (
            ("equal Gaussians", (0.5, 0.8, 0.5, 0.8, 0.3)),
            ("the student shifted, without noise", (0.0, 1.0, 2.0, 1.0, 0.0)),
            ("the student too wide", (1.0, 0.5, 1.0, 1.5, 0.0)),
            ("shifted, too narrow, noised", (-1.0, 1.2, 0.5, 0.4, 0.7)),
        )
    ])
