"""Exercises of the notebooks 15 to 17."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from minidistill.check._core import Case, points, report

__all__ = [
    "c_out", "ema_decay", "mirror", "noise_through", "normalised_ratio", "sid_loss", "sim_gradient",
]


def normalised_ratio(f: Callable[..., Any]) -> bool:
    """15, exercise 1: f(ratio, level) is each ratio over the mean of those at its level; both (n,)."""
    ratio = torch.tensor([0.5, 4.0, 1.0, 0.1, 2.0, 6.0])
    cases: list[Case] = [("one level", (ratio, torch.zeros(6, dtype=torch.long)), ratio / ratio.mean())]
    for title, level in (("equal groups", [0, 1, 2, 0, 1, 2]), ("groups of 3, 2 and 1", [7, 2, 7, 2, 5, 7])):
        where = torch.tensor(level)
        means = torch.stack([ratio[where == one].mean() for one in level])
        cases.append((title, (ratio, where), ratio / means))
    return report(1, f, cases)


def sim_gradient(f: Callable[..., Any]) -> bool:
    """15, exercise 2: f(y, residual, J_p, J_q) is the gradient in x0 of -2 y . (D_q - x0) at x = x0 + sigma e, with
    y = D_q - D_p and residual = D_q - x0, (n, d), and the Jacobians of both denoisers, (d, d)."""
    x0, x = points(6).requires_grad_(), points(6, seed=1)
    jacobian_p, jacobian_q = torch.tensor([[0.9, 0.2], [-0.1, 0.4]]), torch.tensor([[0.3, -0.5], [0.2, 0.7]])
    cases: list[Case] = []
    for title, j_p, j_q in (
        ("constant networks", 0 * jacobian_p, 0 * jacobian_q), ("equal Jacobians", jacobian_q, jacobian_q),
        ("different Jacobians", jacobian_p, jacobian_q),
    ):
        moved = x + x0 - x0.detach()
        fake = moved @ j_q.T + 1
        y = fake - moved @ j_p.T
        gradient = torch.autograd.grad(-2 * (y * (fake - x0)).sum(), x0)[0]
        cases.append((title, (y.detach(), (fake - x0).detach(), j_p, j_q), gradient))
    return report(2, f, cases)


def c_out(f: Callable[..., Any]) -> bool:
    """16, exercise 1: f(c_skip, sigma, sigma_data) is the standard deviation of x0 - c_skip (x0 + sigma e)."""
    return report(1, f, [
        (f"c_skip = {skip:g}, sigma = {sigma:g}", (skip, sigma, 0.5), math.hypot((1 - skip) * 0.5, skip * sigma))
        for skip, sigma in ((0.0, 2.0), (1.0, 2.0), (0.2, 1.0), (0.5, 0.5))
    ])


def ema_decay(f: Callable[..., Any]) -> bool:
    """16, exercise 2: f(halflife, batch_size) is the decay of an average of weights in one step, halflife in images."""
    return report(2, f, [
        (f"halflife = {halflife}, batch_size = {size}", (halflife, size), 0.5 ** (size / halflife))
        for halflife, size in ((64, 64), (1000, 500), (300, 256), (500_000, 512))
    ])


def mirror(f: Callable[..., Any]) -> bool:
    """16, exercise 3: f(images, coins) mirrors those images (n, c, h, w) left to right whose coin (n,) is True."""
    images = torch.arange(48.0).reshape(4, 2, 2, 3)
    cases: list[Case] = []
    for title, coins in (("none", [False] * 4), ("all", [True] * 4), ("first and last", [True, False, False, True])):
        expected = torch.stack([image.flip(-1) if coin else image for image, coin in zip(images, coins, strict=True)])
        cases.append((title, (images, torch.tensor(coins)), expected))
    return report(3, f, cases)


def noise_through(f: Callable[..., Any]) -> bool:
    """17, exercise 1: f(sigma_init, sigma_data) is the standard deviation of the noise in a new student's samples."""
    return report(1, f, [
        (f"sigma_init = {sigma:g}, sigma_data = {data:g}", (sigma, data), sigma * data**2 / (sigma**2 + data**2))
        for sigma, data in ((0.5, 0.5), (2.5, 0.5), (1.0, 0.7), (80.0, 0.5))
    ])


def sid_loss(f: Callable[..., Any]) -> bool:
    """17, exercise 2: f(teacher_x0, fake_x0, x0, alpha) is SiD's loss (n,) of images, without its normaliser."""
    p, q, x0 = torch.randn(3, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    gap, step = (p - q).flatten(1), (q - x0).flatten(1)
    return report(2, f, [
        (f"alpha = {a:g}", (p, q, x0, a), (gap * ((1 - a) * gap + step)).sum(1)) for a in (1.0, 0.5, 1.2)
    ])
