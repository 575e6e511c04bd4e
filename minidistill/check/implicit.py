"""Exercises of the notebook 10."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidistill.check import ours
from minidistill.check._core import points, report
from minidistill.divergences import pseudo_huber

__all__ = ["gaussian_fisher", "implicit_loss", "pseudo_huber_slope"]


def pseudo_huber_slope(f: Callable[..., Any]) -> bool:
    """10, exercise 1: f(y, c) is d'(y), (n, d), of the distance d(y) = sqrt(|y|^2 + c^2) - c, one for each row of y."""
    plane = torch.tensor([[0.0, 0.0], [0.06, -0.08], [3.0, 4.0], [-300.0, 0.0]])
    space = torch.tensor([[1.0, 2.0, -2.0], [0.0, 0.1, 0.0]])
    return report(1, f, [
        (f"{len(y)} differences in {y.shape[1]} dimensions, c = {c:g}", (y, c), pseudo_huber(c).gradient(y))
        for y, c in ((plane, 0.1), (plane, 2.0), (space, 1.0))
    ], hints={
        "|y| is the length of the whole row, not of each coordinate": lambda y, c: y / (y.square() + c**2).sqrt(),
        "the slope of |y|^2 is 2 y, and that of a square root brings 1/2: they cancel":
            lambda y, c: 2 * ours.pseudo_huber_slope(y, c),
        "the root of the sum, |y|^2 + c^2, not the sum of the roots":
            lambda y, c: y / (y.norm(dim=1, keepdim=True) + c),
        "c stands in the root as a square": lambda y, c: y / (y.square().sum(1, keepdim=True) + c).sqrt(),
    })


def implicit_loss(f: Callable[..., Any]) -> bool:
    """10, exercise 2: f(x0, teacher_x0, fake_x0, value, slope, alpha) is 2 (1 - alpha) d(y) - d'(y) . (D_q - x0), (n,),
    for the functions value = d and slope = d' of y = D_q - D_p."""
    x0, p, q = points(6), points(6, seed=1), points(6, seed=2)
    huber = pseudo_huber(0.5)

    def square(y: Tensor) -> Tensor:
        return y.square().sum(1)

    def twice(y: Tensor) -> Tensor:
        return 2 * y

    return report(2, f, [
        (title, (x0, p, q, value, slope, alpha), ours.implicit_loss(x0, p, q, value, slope, alpha))
        for title, value, slope, alpha in (
            ("SIM, squared distance", square, twice, 1.0), ("alpha = 0", square, twice, 0.0),
            ("alpha = 1.2, pseudo-Huber", huber.value, huber.gradient, 1.2),
        )
    ], hints={
        "y is D_q - D_p; you have its sign turned":
            lambda x0, p, q, d, slope, a: 2 * (1 - a) * d(p - q) - (slope(p - q) * (q - x0)).sum(1),
        "the field part is taken off": lambda x0, p, q, d, slope, a: (
            2 * (1 - a) * d(q - p) + (slope(q - p) * (q - x0)).sum(1)),
        "the field part holds D_q - x0, what the fake network gets wrong": lambda x0, p, q, d, slope, a: (
            2 * (1 - a) * d(q - p) - (slope(q - p) * (p - x0)).sum(1)),
        "the law part's weight is 2 (1 - alpha)":
            lambda x0, p, q, d, slope, a: ours.implicit_loss(x0, p, q, d, slope, a) - (1 - a) * d(q - p),
    })


def gaussian_fisher(f: Callable[..., Any]) -> bool:
    """10, exercise 3: f(mean_p, std_p, mean_q, std_q, sigma) is E (s_p - s_q)^2 over q_sigma, for two Gaussians on the
    line with noise of standard deviation sigma added to both."""
    x = torch.linspace(-60.0, 60.0, 24001, dtype=torch.float64)

    def integral(mean_p: float, std_p: float, mean_q: float, std_q: float, sigma: float) -> float:
        p, q = std_p**2 + sigma**2, std_q**2 + sigma**2
        gap = (x - mean_q) / q - (x - mean_p) / p
        law = torch.exp(-(x - mean_q).square() / (2 * q))
        return float((law * gap.square()).sum() / law.sum())

    return report(3, f, [
        (title, arguments, integral(*arguments)) for title, arguments in (
            ("equal Gaussians", (0.5, 0.8, 0.5, 0.8, 0.3)),
            ("the student shifted, without noise", (0.0, 1.0, 2.0, 1.0, 0.0)),
            ("the student too wide", (1.0, 0.5, 1.0, 1.5, 0.0)),
            ("shifted, too narrow, noised", (-1.0, 1.2, 0.5, 0.4, 0.7)),
        )
    ], hints={
        "noise widens both: the variances are std^2 + sigma^2":
            lambda mp, sp, mq, sq, s: ours.gaussian_fisher(mp, sp, mq, sq, 0.0),
        "the mean is over q, so that x - mean_q has the variance of q":
            lambda mp, sp, mq, sq, s: ours.gaussian_fisher(mq, sq, mp, sp, s),
        "how far the means are apart counts too": lambda mp, sp, mq, sq, s: ours.gaussian_fisher(0.0, sp, 0.0, sq, s),
        "a score is divided by the variance, not by the standard deviation": lambda mp, sp, mq, sq, s: (
            ours.gaussian_fisher(mp, sp**0.5, mq, sq**0.5, s**0.5)),
    })
