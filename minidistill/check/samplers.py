"""Exercises of the notebook 06."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from minidistill.check._core import Case, points, report
from minidistill.teachers.closed_form import GaussianTeacher

__all__ = ["ddim_step", "gaussian_flow"]


def ddim_step(f: Callable[..., Any]) -> bool:
    """06, exercise 1: f(x, x0, sigma, after, eta, z) is DDIM's step to level `after`; x0 is x denoised, z noise."""
    x, x0, z = points(6), points(6, seed=1), points(6, seed=2)
    cases: list[Case] = []
    for sigma, after, eta in ((2.0, 0.5, 0.0), (2.0, 0.5, 1.0), (3.0, 2.0, 0.6)):
        fresh = eta * after * math.sqrt(1 - (after / sigma) ** 2)
        kept = math.sqrt(after**2 - fresh**2)
        cases.append((f"eta = {eta:g}", (x, x0, sigma, after, eta, z), x0 + kept * (x - x0) / sigma + fresh * z))
    return report(1, f, cases)


def gaussian_flow(f: Callable[..., Any]) -> bool:
    """06, exercise 2: f(x, sigma, after, mean, variances, axes) is N(mean, U diag(variances) U')'s probability flow
    from level sigma to `after`, (n, d); the columns of U = axes are the principal axes."""
    x, angle = points(6), torch.tensor(0.6)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    cases: list[Case] = []
    for title, mean, variances, axes, sigma, after in (
        ("one variance", [0.0, 0.0], [1.0, 1.0], torch.eye(2), 3.0, 0.5),
        ("a mean", [1.0, -2.0], [1.0, 1.0], torch.eye(2), 3.0, 0.5),
        ("two variances, turned", [1.0, -2.0], [4.0, 0.25], turn, 3.0, 0.5),
        ("down to 0", [1.0, -2.0], [4.0, 0.25], turn, 2.0, 0.0),
    ):
        centre, spread = torch.tensor(mean), torch.tensor(variances)
        law = GaussianTeacher.from_moments(centre, (axes * spread) @ axes.T)
        cases.append((title, (x, sigma, after, centre, spread, axes), law.flow(x, sigma, after)))
    return report(2, f, cases)
