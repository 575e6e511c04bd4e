"""Exercises of the notebook 09."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidistill.check import ours
from minidistill.check._core import Case, points, report
from minidistill.distillation.batch import Batch
from minidistill.distributions import GaussianMixture, ring

__all__ = ["OwnObjective", "dmd_gradient", "mixture_denoiser"]


def dmd_gradient(f: Callable[..., Any]) -> bool:
    """09, exercise 1: f(x0, teacher_x0, fake_x0) is DMD's gradient in x0, (n, d): (D_q - D_p) / mean |x0 - D_p|."""
    x0, p, q = points(6), points(6, seed=1), points(6, seed=2)
    wide = torch.cat([x0, 3 * x0], 1)
    return report(1, f, [
        ("equal denoisers", (x0, p, p), torch.zeros(6, 2)),
        ("two dimensions", (x0, p, q), (q - p) / (x0 - p).abs().sum(1, keepdim=True) * 2),
        ("four dimensions", (wide, 0 * wide, wide), 4 * wide / wide.abs().sum(1, keepdim=True)),
    ], hints={
        "descent goes against the gradient, and the pull is towards the teacher: the sign is wrong":
            lambda x0, p, q: -ours.dmd_gradient(x0, p, q),
        "the mean over coordinates, not the sum": lambda x0, p, q: (q - p) / (x0 - p).abs().sum(1, keepdim=True),
        "one number for each sample: mean over dim=1 only": lambda x0, p, q: (q - p) / (x0 - p).abs().mean(),
        "the scale is missing": lambda x0, p, q: q - p,
        "the scale is how far the teacher moves the sample, |x0 - D_p|":
            lambda x0, p, q: (q - p) / (p - q).abs().mean(1, keepdim=True).clamp(min=1e-5),
    })


def OwnObjective(cls: Callable[..., Any]) -> bool:
    """09, exercise 2: cls(weight) is an objective whose generator_loss(batch), (n,), has the gradient h(r) times DMD's
    in x0; r is batch.ratio's, clipped."""
    p, q, weight = ring(3, std=0.4), GaussianMixture([[0.5, 0.2]], 0.9), lambda r: r / (1 + r)

    def batch(n: int, level: float) -> Batch:
        def log_ratio(x: Tensor, sigma: Tensor, label: Any = None) -> Tensor:
            return 3 * (p.noised(level).log_prob(x) - q.noised(level).log_prob(x))  # some beyond the clip

        return Batch(points(n).requires_grad_(), torch.full((n,), level), points(n, seed=1), p, fake=q, ratio=log_ratio)

    def tried(make: Callable[..., Any]) -> Callable[[int, float], Any]:
        """What the objective does, as a function: the gradient of its loss in x0, (n, d)."""
        def gradient(n: int, level: float) -> Any:
            objective = make(weight)
            if not hasattr(objective, "generator_loss"):
                return objective
            given = batch(n, level)
            loss = objective.generator_loss(given)
            if loss is ... or loss is None or loss.shape != (n,):
                return loss
            return torch.autograd.grad(loss.sum(), given.x0)[0]

        if hasattr(make, "generator_loss"):  # its line is told where it raises
            gradient.__wrapped__ = make.generator_loss  # type: ignore[attr-defined]
        return gradient

    def mistake(gradient: Callable[[Batch, Tensor, Tensor, Tensor], Tensor]) -> Callable[[int, float], Tensor]:
        """The gradient in x0 that a mistake has, from the batch, D_p, D_q and ln r."""
        def of(n: int, level: float) -> Tensor:
            given = batch(n, level)
            x0_p, x0_q = given.denoise_both(given.xt)
            return gradient(given, x0_p, x0_q, given.ratio(given.xt, given.sigma)).detach()  # type: ignore[misc]

        return of

    def weighted(given: Batch, x0_p: Tensor, x0_q: Tensor, h: Tensor) -> Tensor:
        return h[:, None] * ours.dmd_gradient(given.x0, x0_p, x0_q)

    def graph(given: Batch, x0_p: Tensor, x0_q: Tensor, log_r: Tensor) -> Tensor:
        scale = (given.x0 - x0_p).abs().mean(1, keepdim=True)
        pull = weight(log_r.clamp(-5, 5).exp())[:, None] * (x0_q - x0_p) / scale
        return torch.autograd.grad((pull * given.x0).sum(), given.x0)[0]

    def graph_but_scale(given: Batch, x0_p: Tensor, x0_q: Tensor, log_r: Tensor) -> Tensor:
        pull = weighted(given, x0_p, x0_q, weight(log_r.clamp(-5, 5).exp()))
        return torch.autograd.grad((pull * given.x0).sum(), given.x0)[0]

    right = tried(ours.OwnObjective)
    return report(2, tried(cls), [
        (f"gradient in x0 at sigma = {level:g}", (6, level), right(6, level)) for level in (0.7, 0.1, 3.0)
    ], hints={
        "the pull is a constant: compute it under torch.no_grad()": mistake(graph),
        "the pull is a constant: compute all of it under torch.no_grad()": mistake(graph_but_scale),
        "batch.ratio is ln r; the weight takes r": mistake(
            lambda b, p, q, l: weighted(b, p, q, weight(l.clamp(-5, 5)))),
        "clip ln r to +-5": mistake(lambda b, p, q, l: weighted(b, p, q, weight(l.exp()))),
        "the weight h(r) is missing": mistake(lambda b, p, q, l: weighted(b, p, q, torch.ones_like(l))),
        "DMD's scale is missing: use dmd_gradient": mistake(
            lambda b, p, q, l: weight(l.clamp(-5, 5).exp())[:, None] * (q - p)),
    })


def mixture_denoiser(f: Callable[..., Any]) -> bool:
    """09, exercise 3: f(teacher_x0, fake_x0, log_ratio, alpha) is the denoiser, (n, d), of alpha p + (1 - alpha) q from
    those of p and q and log p / q, (n,)."""
    p, q, x, sigma = ring(3, std=0.4), GaussianMixture([[0.5, 0.2]], 0.9), points(6), 0.7
    log_ratio = p.noised(sigma).log_prob(x) - q.noised(sigma).log_prob(x)
    cases: list[Case] = []
    for alpha in (0.5, 0.1, 0.8):
        both = GaussianMixture(torch.cat([p.means, q.means]), torch.cat([p.covs, q.covs]),
                               torch.cat([alpha * p.weights, (1 - alpha) * q.weights]))
        cases.append((f"alpha = {alpha:g}", (p(x, sigma), q(x, sigma), log_ratio, alpha), both(x, sigma)))
    return report(3, f, cases, hints={
        "the shares at x are not alpha and 1 - alpha: r tells which law x is likelier from":
            lambda p, q, l, a: a * p + (1 - a) * q,
        "rho is the probability of the teacher's law; you have them exchanged":
            lambda p, q, l, a: ours.mixture_denoiser(q, p, l, a),
        "log_ratio is ln r; exponentiate it, or use a sigmoid": lambda p, q, l, a: (
            (a * l / (a * l + 1 - a))[:, None] * (p - q) + q),
        "alpha belongs into rho": lambda p, q, l, a: ours.mixture_denoiser(p, q, l, 0.5),
    })
