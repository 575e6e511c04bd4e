"""Exercises of the notebooks 00 to 04."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from minidistill.check._core import Case, points, report
from minidistill.distributions import GaussianMixture, ring

__all__ = [
    "best_share", "class_gradient", "gauge_defect", "langevin_share", "mixture_score", "one_call", "score_gap",
    "stein_trace", "tweedie", "uniform_time_density", "velocity",
]


def one_call(f: Callable[..., Any]) -> bool:
    """00, exercise 1: f(denoiser, z, sigma) is one Euler step of the probability flow from sigma * z down to 0."""
    target, z = ring(8), points(6)
    return report(1, f, [(f"sigma = {sigma:g}", (target, z, sigma), target(sigma * z, sigma)) for sigma in (1.0, 3.0)])


def score_gap(f: Callable[..., Any]) -> bool:
    """00, exercise 2: f(teacher_x0, fake_x0, sigma) is s_p - s_q from the two denoised points, sigma (n,)."""
    p, q, sigma = points(6), points(6, seed=1), torch.tensor([0.1, 0.3, 0.5, 1.0, 2.0, 5.0])
    equal = torch.full((6,), 2.0)
    return report(2, f, [
        ("equal denoisers", (p, p, sigma), torch.zeros(6, 2)),
        ("one noise level", (p, q, equal), (p - q) / 4),
        ("many noise levels", (p, q, sigma), (p - q) / sigma.square().unsqueeze(1)),
    ])


def mixture_score(f: Callable[..., Any]) -> bool:
    """01, exercise 1: f(x, means, stds, weights) is the score of sum_k w_k N(mu_k, s_k^2 I)."""
    means, weights, x = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 2.0]]), torch.tensor([0.5, 0.3, 0.2]), points(6)
    cases: list[Case] = []
    for title, stds in (("equal stds", torch.full((3,), 0.7)), ("different stds", torch.tensor([0.4, 0.8, 1.5]))):
        cases.append((title, (x, means, stds, weights), GaussianMixture(means, stds, weights).score(x)))
    return report(1, f, cases)


def tweedie(f: Callable[..., Any]) -> bool:
    """01, exercise 2: f(score, x, sigma) is E[x0 | x], where score is that of the noised law."""
    target, x = ring(3, std=0.5), points(6)
    return report(2, f, [
        (f"sigma = {sigma:g}", (target.noised(sigma).score, x, sigma), target(x, sigma)) for sigma in (1.0, 0.5, 2.0)
    ])


def langevin_share(f: Callable[..., Any]) -> bool:
    """01, exercise 3: f(start, weight) is the left mode's share after plain Langevin between far modes."""
    return report(3, f, [
        (f"start = {start:g}, weight = {weight:g}", (start, weight), start)
        for start, weight in ((0.5, 0.8), (0.3, 0.8), (0.9, 0.1))
    ])


def stein_trace(f: Callable[..., Any]) -> bool:
    """02, exercise 1: f(field, x, noise, radius) is Stein's estimate (n,) of the field's divergence at x, (n, d)."""
    x, noise, matrix = points(6), points(6, seed=1) / 2, torch.tensor([[0.9, 0.2], [-0.5, 0.4]])
    cases: list[Case] = []
    for title, shift in (("linear field", 0), ("shifted linear field", 3)):
        field = lambda u, shift=shift: u @ matrix.T + shift  # noqa: E731
        cases.append((title, (field, x, noise, 0.1), torch.einsum("ni,ij,nj->n", noise, matrix, noise)))
    rise = (noise * ((x + 0.2 * noise).sin() - x.sin())).sum(1)
    return report(1, f, [*cases, ("sine, radius = 0.2", (torch.sin, x, noise, 0.2), rise / 0.2)])


def best_share(f: Callable[..., Any]) -> bool:
    """02, exercise 2: f(target, denoising, covariance) is the share of the first in the mix of least variance."""
    return report(2, f, [
        (f"variances {a:g} and {b:g}, covariance {c:g}", (a, b, c), (b - c) / (a + b - 2 * c))
        for a, b, c in ((2.0, 2.0, 0.0), (1.0, 3.0, 0.0), (24.0, 99.0, -1.0), (5.0, 0.5, -0.25))
    ])


def class_gradient(f: Callable[..., Any]) -> bool:
    """03, exercise 1: f(W, probabilities, label) is the gradient (n, d) of log softmax(W x + b)[label] in x."""
    W, x, label = torch.tensor([[1.0, 0.5], [-0.4, 2.0], [0.3, -1.0]]), points(6), torch.tensor([0, 1, 2, 2, 1, 0])
    cases: list[Case] = []
    for title, logits in (("equal probabilities", torch.zeros(6, 3)), ("sure of the label", 40 * torch.eye(3)[label]),
                          ("in between", x @ W.T)):
        c = logits.softmax(1)
        cases.append((title, (W, c, label), W[label] - c @ W))
    return report(1, f, cases)


def gauge_defect(f: Callable[..., Any]) -> bool:
    """03, exercise 2: f(jacobian, r, score) is div r + r . score, (n,), of a field r (n, d) with Jacobian (n, d, d)."""
    x, turn = points(6), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    cases: list[Case] = []
    for title, A, score in (
        ("a rotation of N(0, I)", turn, -x), ("the score of N(0, I) itself", -torch.eye(2), -x),
        ("a shear", torch.tensor([[0.5, 2.0], [0.3, -0.2]]), points(6, seed=1)),
    ):
        r = x @ A.T
        cases.append((title, (A.expand(6, 2, 2), r, score), A.trace() + (r * score).sum(1)))
    return report(2, f, cases)


def velocity(f: Callable[..., Any]) -> bool:
    """04, exercise 1: f(x, x0, alpha, sigma, d_alpha, d_sigma) is E[dx_t / dt | x] for x0 = E[x0 | x], both (n, d)."""
    x0, e = points(6), points(6, seed=1)
    return report(1, f, [
        (title, (alpha * x0 + sigma * e, x0, alpha, sigma, d_alpha, d_sigma), d_alpha * x0 + d_sigma * e)
        for title, alpha, sigma, d_alpha, d_sigma in (
            ("EDM", 1.0, 3.0, 0.0, 1.0), ("flow at t = 0.4", 0.6, 0.4, -1.0, 1.0),
            ("a quarter circle", 0.6, 0.8, -0.8, 0.6),
        )
    ])


def uniform_time_density(f: Callable[..., Any]) -> bool:
    """04, exercise 2: f(level) is the density of ln level at level = t / (1 - t) for t uniform on [0, 1]."""
    return report(2, f, [(f"level = {s:g}", (s,), s / (1 + s) ** 2) for s in (1.0, 0.1, 0.5, 4.0)])
