"""The f-divergence of any convex function that can be written with torch operations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minidistill.divergences.f_divergences import FDivergence, Function, gap, weighted

__all__ = ["from_function"]


def from_function(
    f: Function, name: str = "custom", at_zero: float | None = None, at_infinity: float | None = None
) -> FDivergence:
    """The f-divergence of any convex `f(r)` with f(1) = 0, written with torch operations; f' and f'' come from
    automatic differentiation, f* from bisection. It is computed in float64 whatever the inputs are.

    at_zero, at_infinity: the limits f(0+) and lim f(r) / r; None finds them numerically, which calls a limit infinite
    that is reached more slowly than r^(-1/5).
    Raises ValueError if f is not convex or f(1) is not 0.
    """

    def slope(l: Tensor) -> Tensor:
        return _differentiate(f, l.double().exp())[0].to(l)

    def log_weight(l: Tensor) -> Tensor:
        return (2 * l.double() + torch.log(_differentiate(f, l.double().exp())[1])).to(l)

    def cost(l: Tensor) -> Tensor:
        r = l.double().exp()
        return (r * _differentiate(f, r)[0] - f(r)).to(l)

    r = torch.logspace(-3, 3, 61, dtype=torch.float64)
    curvature = _differentiate(f, r)[1]
    at_one = float(f(torch.ones((), dtype=torch.float64)))
    if abs(at_one) > 1e-9:
        raise ValueError(f"f: f(1) is {at_one:g}; wanted 0, or equal distributions would be apart")
    if not (curvature >= 0).all() or not (curvature > 0).any():
        bad = r[~(curvature >= 0)]
        where = f"f'' is negative or undefined at r = {bad[0].item():g}" if len(bad) else \
            "f has no curvature: a straight line, or total variation (use `total_variation`)"
        raise ValueError(f"f: {where}; wanted a convex function")
    zero = _limit(lambda l: f((-l).exp())) if at_zero is None else at_zero
    infinity = _limit(lambda l: _differentiate(f, l.exp())[0]) if at_infinity is None else at_infinity

    def perspective(p: Tensor, q: Tensor) -> Tensor:
        only_p, only_q = q == -math.inf, p == -math.inf
        shared = torch.where(only_p | only_q, 0.0, gap(p, q)).double()
        value = torch.where(only_p | only_q, 0.0, q.double()).exp() * f(shared.exp())
        value = torch.where(only_p, weighted(p.double(), torch.full_like(value, infinity)), value)
        value = torch.where(only_q, weighted(q.double(), torch.full_like(value, zero)), value)
        return value.to(p)

    return FDivergence(name, perspective, slope, log_weight, cost)


def _limit(value: Function) -> float:
    """lim value(l) for l -> infinity, looked for as far out as float64 carries the function."""
    for reach in (300.0, 150.0, 75.0):
        far, near = value(torch.tensor([reach, reach / 2], dtype=torch.float64)).tolist()
        if math.isfinite(far) and math.isfinite(near):
            return far if abs(far - near) < 1e-3 * (1 + abs(near)) else math.copysign(math.inf, far)
    return math.inf


def _differentiate(f: Function, r: Tensor) -> tuple[Tensor, Tensor]:
    """f'(r) and f''(r) of an elementwise function; graphs are kept only when r itself needs them."""
    keep = torch.is_grad_enabled() and r.requires_grad
    with torch.enable_grad():
        r = r if r.requires_grad else r.detach().requires_grad_(True)
        first = torch.autograd.grad(f(r).sum(), r, create_graph=True)[0]
        if not first.requires_grad:
            return first, torch.zeros_like(r)
        second = torch.autograd.grad(first.sum(), r, create_graph=keep)[0]
    return (first, second) if keep else (first.detach(), second.detach())
