"""Exercises of the notebook 05."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from minidistill.check._core import Case, points, report

__all__ = ["aligned_share", "weighted_denoiser"]


def weighted_denoiser(f: Callable[..., Any]) -> bool:
    """05, exercise 1: f(x, data, weights, sigma) is E[x0 | x], (n, d), where x0 is data[i], (m, d), with probability
    weights[i]; sigma (n,), one level a sample."""
    data, x = points(4, seed=1), points(6)
    equal, unequal = torch.full((4,), 0.25), torch.tensor([0.6, 0.1, 0.1, 0.2])
    one, many = torch.ones(6), torch.tensor([0.1, 0.3, 0.5, 1.0, 2.0, 5.0])
    cases: list[Case] = []
    for title, weights, sigma in (("equal weights, one level", equal, one), ("equal weights", equal, many),
                                  ("unequal weights", unequal, many)):
        square = (x[:, None] - data).double().square().sum(2)  # (n, m)
        joint = weights * (-square / (2 * sigma[:, None] ** 2)).exp()  # the Gaussians themselves, no softmax
        cases.append((title, (x, data, weights, sigma), joint / joint.sum(1, keepdim=True) @ data.double()))
    return report(1, f, cases)


def aligned_share(f: Callable[..., Any]) -> bool:
    """05, exercise 2: f(scales) is the rho that minimises the mean of (w rho - 1)^2 over w in scales, (m,)."""
    cases: list[Case] = []
    for scales in ([2.0], [1.0, 3.0], [0.5, 1.0, 4.0, 8.0]):
        w = torch.tensor(scales)
        cases.append((f"scales = {scales}", (w,), torch.linalg.lstsq(w[:, None], torch.ones(len(w), 1)).solution[0, 0]))
    return report(2, f, cases)
