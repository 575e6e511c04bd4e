"""Exercises of the notebooks 05 and 05b."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidistill.check import ours
from minidistill.check._core import Case, points, report

__all__ = ["aligned_share", "unbiased_loss", "weighted_denoiser"]


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

    def by(logits: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def denoiser(x: Tensor, data: Tensor, weights: Tensor, sigma: Tensor) -> Tensor:
            return logits((x[:, None] - data).square().sum(2), weights, sigma[:, None]).softmax(1) @ data

        return denoiser

    return report(1, f, cases, hints={
        "the weights are missing: a prior probability multiplies the likelihood":
            by(lambda square, w, s: -square / (2 * s**2)),
        "weights are factors after the softmax, so before it their logarithms are added":
            by(lambda square, w, s: w - square / (2 * s**2)),
        "the exponent is -|x - x_i|^2 / (2 sigma^2): a factor 2 is missing":
            by(lambda square, w, s: w.log() - square / s**2),
        "the exponent holds the squared distance, not the distance":
            by(lambda square, w, s: w.log() - square.sqrt() / (2 * s**2)),
        "the exponent divides by sigma squared": by(lambda square, w, s: w.log() - square / (2 * s)),
        "the weights of the data points have to add up to 1: divide by their sum":
            lambda x, y, w, s: (w * (-(x[:, None] - y).square().sum(2) / (2 * s[:, None] ** 2)).exp()) @ y,
    })


def aligned_share(f: Callable[..., Any]) -> bool:
    """05, exercise 2: f(scales) is the rho that minimises the mean of (w rho - 1)^2 over w in scales, (m,)."""
    cases: list[Case] = []
    for scales in ([2.0], [1.0, 3.0], [0.5, 1.0, 4.0, 8.0]):
        w = torch.tensor(scales)
        cases.append((f"scales = {scales}", (w,), torch.linalg.lstsq(w[:, None], torch.ones(len(w), 1)).solution[0, 0]))
    return report(2, f, cases, hints={
        "1 / w is best for one scale; the mean of the squares is least elsewhere": lambda w: (1 / w).mean(),
        "at 1 / E w the mean residual vanishes, but not the slope of the mean square": lambda w: 1 / w.mean(),
        "E w^2 is the mean of the squares, not the square of the mean": lambda w: w.mean() / w.mean() ** 2,
        "the other way up: rho is E w / E w^2": lambda w: (w**2).mean() / w.mean(),
    })


def unbiased_loss(f: Callable[..., Any]) -> bool:
    """05b, exercise 1: f(denoised, x0, sigma, log_ratio, slope) is r |D - (x0 + sigma^2 grad log r)|^2 / d, (n,), with
    log_ratio (n,) and its gradient slope (n, d)."""
    denoised, x0, slope = points(6), points(6, seed=1), points(6, seed=2)
    flat, tilted = torch.zeros(6), torch.linspace(-1.5, 2.0, 6)
    sigma = torch.tensor([0.1, 0.3, 0.5, 1.0, 2.0, 5.0])
    cases: list[Case] = [
        (title, (denoised, x0, level, log_ratio, slope), ours.unbiased_loss(denoised, x0, level, log_ratio, slope))
        for title, level, log_ratio in (
            ("ratio 1, one level", torch.ones(6), flat), ("ratio 1", sigma, flat), ("any ratio", sigma, tilted))
    ]

    def wrong(power: int, weight: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda D, x0, s, log_r, slope: weight(log_r) * (D - x0 - s[:, None] ** power * slope).square().mean(1)

    return report(1, f, cases, hints={
        "the slope is a score; sigma squared makes a step of x0 of it": wrong(0, torch.exp),
        "sigma squared, not sigma: D = x + sigma^2 score": wrong(1, torch.exp),
        "the weight is r, the exponential of log_ratio": wrong(2, lambda log_r: log_r),
        "the weight r is missing": wrong(2, torch.ones_like),
        "that weighs, but the target has to move along the slope as well":
            lambda D, x0, s, log_r, slope: log_r.exp() * (D - x0).square().mean(1),
        "the target moves along the slope, not against it":
            lambda D, x0, s, log_r, slope: ours.unbiased_loss(D, x0, s, log_r, -slope),
    })
