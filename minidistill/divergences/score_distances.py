"""Distances between scores: d(y) for a difference y of two score fields, with its gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.divergences.f_divergences import Function

__all__ = [
    "ScoreDistance", "column", "from_distance", "huber", "l2", "power", "pseudo_huber", "squared_l2", "sum_squares",
]


@dataclass(frozen=True)
class ScoreDistance:
    """A distance d between scores, as d(y) and its gradient d'(y), for y (n, *shape) the score difference.

    Score implicit matching minimises E d(s_q - s_p) (Luo 2024, table 1)."""

    name: str
    value: Function  # (n, *shape) -> (n,)
    gradient: Function  # (n, *shape) -> (n, *shape)


def squared_l2() -> ScoreDistance:
    """d = |y|^2."""
    return ScoreDistance("squared_l2", sum_squares, lambda y: 2 * y)


def l2() -> ScoreDistance:
    """d = |y|, whose gradient has length 1 wherever y is not 0."""
    return power(1.0)


def power(p: float) -> ScoreDistance:
    """d = |y|^p for p >= 1, with gradient p |y|^(p-2) y, and 0 at y = 0."""
    p = _validate.number("p", p)
    if not p >= 1:
        raise ValueError(f"p={p!r}: wanted a finite number >= 1, or d is not convex")

    def gradient(y: Tensor) -> Tensor:
        length = _length(y)
        return column(torch.where(length > 0, p * length.clamp(min=_tiny(y)) ** (p - 2), 0.0), y) * y

    return ScoreDistance("l2" if p == 1 else f"power({p:g})", lambda y: _length(y) ** p, gradient)


def huber(delta: float) -> ScoreDistance:
    """d = |y|^2 / 2 up to |y| = delta and delta (|y| - delta / 2) beyond: the gradient is never longer than delta."""
    delta = _validate.positive("delta", delta)

    def value(y: Tensor) -> Tensor:
        length = _length(y)
        return torch.where(length <= delta, length.square() / 2, delta * (length - delta / 2))

    return ScoreDistance(
        f"huber({delta:g})", value, lambda y: column((delta / _length(y).clamp(min=_tiny(y))).clamp(max=1.0), y) * y
    )


def pseudo_huber(c: float) -> ScoreDistance:
    """d = sqrt(|y|^2 + c^2) - c: quadratic below c and linear above, so |d'| < 1 however far the student is."""
    c = _validate.positive("c", c)
    return ScoreDistance(
        f"pseudo_huber({c:g})", lambda y: (sum_squares(y) + c**2).sqrt() - c,
        lambda y: y * column(torch.rsqrt(sum_squares(y) + c**2), y),
    )


def from_distance(d: Function, name: str = "custom") -> ScoreDistance:
    """The distance of your own d(y): (n, *shape) -> (n,), written with torch operations; d' by automatic
    differentiation. Raises ValueError unless it gives one number a sample, 0 at y = 0 and more elsewhere."""

    def gradient(y: Tensor) -> Tensor:
        keep = torch.is_grad_enabled() and y.requires_grad
        with torch.enable_grad():
            at = y if keep else y.detach().requires_grad_(True)
            return torch.autograd.grad(d(at).sum(), at, create_graph=keep)[0]

    probe = torch.tensor([[0.0, 0.0], [0.3, -0.4], [-3.0, 2.0]], dtype=torch.float64)
    got = d(probe)
    if got.shape != (3,):
        raise ValueError(f"d gave shape {tuple(got.shape)} for y (3, 2); wanted (3,), one number a sample")
    if abs(float(got[0])) > 1e-9 or not bool((got[1:] > 0).all()):
        raise ValueError(f"d is {got.tolist()} at y = 0 and at two other points; wanted 0 and two positive numbers")
    return ScoreDistance(name, d, gradient)


def column(values: Tensor, like: Tensor) -> Tensor:
    """(n,) -> (n, 1, ..., 1)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def sum_squares(y: Tensor) -> Tensor:
    return y.square().flatten(1).sum(1)


def _length(y: Tensor) -> Tensor:
    return y.flatten(1).norm(dim=1)


def _tiny(y: Tensor) -> float:
    return torch.finfo(y.dtype).tiny
