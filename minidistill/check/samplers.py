"""Exercises of the notebooks 06 and 06b."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from minidistill.check import ours
from minidistill.check._core import Case, points, report
from minidistill.distributions import ring
from minidistill.teachers.closed_form import GaussianTeacher

__all__ = ["ddim_step", "gaussian_flow", "heun_solver"]


def heun_solver(f: Callable[..., Any]) -> bool:
    """06, exercise 1: f(denoiser, x, levels) walks x (n, d) down the levels (m,) by Heun's method; a step to level 0 is
    Euler's."""
    target, x = ring(3, std=0.5), points(6)
    cases: list[Case] = [
        (title, (target, x, torch.tensor(levels)), ours.heun_solver(target, x, torch.tensor(levels)))
        for title, levels in (("levels 2, 1", [2.0, 1.0]), ("levels 3, 1, 0.4", [3.0, 1.0, 0.4]),
                              ("levels 3, 1, 0", [3.0, 1.0, 0.0]))
    ]

    def walk(move: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def solver(D: Callable[..., Tensor], x: Tensor, levels: Tensor) -> Tensor:
            for s, t in pairwise(levels):
                first = (x - D(x, s)) / s
                x = x + (t - s) * move(D, x + (t - s) * first, s, t, first)
            return x

        return solver

    def after(D: Callable[..., Tensor], guess: Tensor, s: Tensor, t: Tensor, first: Tensor) -> Tensor:
        return (guess - D(guess, t)) / t

    return report(1, f, cases, hints={
        "that is Euler's method: take a second slope where the step lands": walk(lambda D, y, s, t, first: first),
        "the second slope is read at the level where the step lands, `after`, not at `sigma`":
            walk(lambda D, y, s, t, first: first if t == 0 else (first + (y - D(y, s)) / s) / 2),
        "use the mean of both slopes, not the second alone":
            walk(lambda D, y, s, t, first: first if t == 0 else after(D, y, s, t, first)),
        "use the mean of both slopes: their sum is twice as long":
            walk(lambda D, y, s, t, first: first if t == 0 else first + after(D, y, s, t, first)),
        "the second slope divides by `after`, which is 0 in the last step: Euler's step there":
            walk(lambda D, y, s, t, first: (first + after(D, y, s, t, first)) / 2),
    })


def ddim_step(f: Callable[..., Any]) -> bool:
    """06, exercise 2: f(x, x0, sigma, after, eta, z) is DDIM's step to level `after`; x0 is x denoised, z noise."""
    x, x0, z = points(6), points(6, seed=1), points(6, seed=2)
    cases: list[Case] = []
    for sigma, after, eta in ((2.0, 0.5, 0.0), (2.0, 0.5, 1.0), (3.0, 2.0, 0.6)):
        fresh = eta * after * math.sqrt(1 - (after / sigma) ** 2)
        kept = math.sqrt(after**2 - fresh**2)
        cases.append((f"eta = {eta:g}", (x, x0, sigma, after, eta, z), x0 + kept * (x - x0) / sigma + fresh * z))
    return report(2, f, cases, hints={
        "the fresh noise comes on top: what stays has variance after^2 - fresh^2, so that both add up to after^2":
            lambda x, D, s, t, eta, z: D + t * (x - D) / s + eta * t * math.sqrt(1 - (t / s) ** 2) * z,
        "eta tells what part is fresh, of after sqrt(1 - after^2 / sigma^2), not of after":
            lambda x, D, s, t, eta, z: D + t * math.sqrt(1 - eta**2) * (x - D) / s + eta * t * z,
        "the noise is drawn anew with the level `after`, not `sigma`":
            lambda x, D, s, t, eta, z: ours.ddim_step(x, D, s, t, eta, z * s / t),
    })


def gaussian_flow(f: Callable[..., Any]) -> bool:
    """06b, exercise 1: f(x, sigma, after, mean, variances, axes) is N(mean, U diag(variances) U')'s probability flow
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
    return report(1, f, cases, hints={
        "the flow moves x - mean, and adds the mean again": lambda x, s, t, m, v, u: ours.gaussian_flow(
            x, s, t, 0 * m, v, u),
        "the columns of `axes` are the principal axes: x @ axes goes into them, @ axes.T back":
            lambda x, s, t, m, v, u: ours.gaussian_flow(x, s, t, m, v, u.T),
        "the stretch is a ratio of standard deviations: a square root is missing":
            lambda x, s, t, m, v, u: m + ((x - m) @ u * (v + t**2) / (v + s**2)) @ u.T,
    })
