"""Divergences between distributions: the f-divergence table, and distances between scores.

Convention: r = p / q with p the teacher and q the student, D_f(p || q) = E_q f(r), f(1) = 0, in nats.
Papers that write the ratio the other way round use f°(u) = u f(1/u).

A divergence moves a generator x0 = g(z) through its weight h(r) = r^2 f''(r):
    grad_theta D_f(p_t || q_t) = - E[ h(r) (grad log p_t - grad log q_t)(x_t) . dx_t / dtheta ]
(f-distill, Xu 2025, theorem 1). So one row of the table below is one distillation objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from minidistill import _validate

LOG2 = math.log(2.0)
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FDivergence:
    """One generator f, written so that ratios of e^{+-80} stay finite in float32.

    perspective(log p, log q) is q f(p/q); at q = 1 it is f itself.
    slope(log r) is f'(r); log_weight(log r) is log h(r) = log(r^2 f''(r)).
    dual(u) is the convex conjugate f*(u) = sup_r (u r - f(r)), infinite outside its domain; None computes
    it by bisection.
    """

    name: str
    perspective: Callable[[Tensor, Tensor], Tensor]
    slope: Function
    log_weight: Function
    dual: Function | None = None

    def f(self, r: Tensor) -> Tensor:
        """f(r) for r >= 0."""
        log_r = torch.log(_ratio(r))
        return self.perspective(log_r, torch.zeros_like(log_r))

    def df(self, r: Tensor) -> Tensor:
        """f'(r)."""
        return self.slope(torch.log(_ratio(r)))

    def d2f(self, r: Tensor) -> Tensor:
        """f''(r) = h(r) / r^2."""
        log_r = torch.log(_ratio(r))
        return torch.exp(self.log_weight(log_r) - 2 * log_r)

    def weight(self, r: Tensor) -> Tensor:
        """h(r) = r^2 f''(r), the weight of the score difference in the generator's gradient."""
        return torch.exp(self.log_weight(torch.log(_ratio(r))))

    def conjugate(self, u: Tensor) -> Tensor:
        """f*(u) = sup_r (u r - f(r)); infinite where the supremum is."""
        if self.dual is None:
            return _conjugate_by_bisection(self, u)
        value = self.dual(u)
        return torch.where(torch.isnan(value), math.inf, value)

    def between(self, log_p: Tensor, log_q: Tensor, cell_volume: float | Tensor = 1.0) -> Tensor:
        """D_f(p || q), a scalar, from log-densities on a grid whose cells have that volume (or a quadrature
        rule's weights, shaped like `log_p`). Densities are taken as they are, not normalised."""
        _same_shape("log_p", log_p, "log_q", log_q)
        return (self.perspective(log_p, log_q) * cell_volume).sum()

    def categorical(self, logits_p: Tensor, logits_q: Tensor) -> Tensor:
        """D_f between softmax(logits_p) and softmax(logits_q) over the last axis: (..., k) -> (...)."""
        _same_shape("logits_p", logits_p, "logits_q", logits_q)
        return self.perspective(logits_p.log_softmax(-1), logits_q.log_softmax(-1)).sum(-1)

    def direction(self, score_p: Tensor, score_q: Tensor, log_ratio: Tensor) -> Tensor:
        """h(r) (score_p - score_q), (n, *shape): where samples (n, *shape) should move. log_ratio is (n,)."""
        _same_shape("score_p", score_p, "score_q", score_q)
        h = torch.exp(self.log_weight(log_ratio))
        return _validate.broadcast_sigma(h, score_p) * (score_p - score_q)


def _weighted(log_w: Tensor, value: Tensor) -> Tensor:
    """exp(log_w) * value, with 0 * infinity = 0, as in the limit x log x -> 0."""
    w = log_w.exp()
    empty = w == 0
    return torch.where(empty, 0.0, w * torch.where(empty, 0.0, value))


def _gap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(p / q), and 0 where both densities vanish."""
    return torch.where((log_p == -math.inf) & (log_q == -math.inf), 0.0, log_p - log_q)


def _skew(b: float) -> Callable[[Tensor, Tensor], Tensor]:
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q, as a perspective function."""

    def perspective(log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = torch.logaddexp(log_p + math.log(b), log_q + math.log(1 - b))
        return b * _weighted(log_p, log_p - log_m) + (1 - b) * _weighted(log_q, log_q - log_m)

    return perspective


def _softened(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_sum = torch.logaddexp(log_p, log_q)
    return _weighted(log_sum, log_sum - LOG2 - log_p)


def _where(u: Tensor, inside: Tensor, value: Tensor, outside: float) -> Tensor:
    return torch.where(inside, value, torch.full_like(u, outside))


#: Every f-divergence by name. Columns: q f(p/q); f'; log h; f*. `l` is log r throughout.
F: dict[str, FDivergence] = {
    row.name: row
    for row in (
        FDivergence(  # KL(q || p): f = -log r, h = 1; mode seeking, needs no ratio
            "reverse_kl",
            lambda p, q: _weighted(q, -_gap(p, q)),
            lambda l: -torch.exp(-l),
            torch.zeros_like,
            lambda u: _where(u, u < 0, -1 - torch.log(-u), math.inf),
        ),
        FDivergence(  # KL(p || q): f = r log r, h = r; covers modes, high variance
            "forward_kl",
            lambda p, q: _weighted(p, _gap(p, q)),
            lambda l: l + 1,
            lambda l: l,
            lambda u: torch.exp(u - 1),
        ),
        FDivergence(  # f = [r log r - (r+1) log((r+1)/2)] / 2, h = r / (2 (r+1)); bounded by log 2
            "jensen_shannon",
            _skew(0.5),
            lambda l: 0.5 * (logsigmoid(l) + LOG2),
            lambda l: logsigmoid(l) - LOG2,
            lambda u: _where(u, u < LOG2 / 2, -0.5 * torch.log(2 - torch.exp(2 * u)), math.inf),
        ),
        FDivergence(  # f = (r+1) log((r+1)/(2r)), h = 1 / (r+1)
            "softened_reverse_kl",
            _softened,
            lambda l: softplus(-l) - LOG2 - torch.exp(-l),
            lambda l: logsigmoid(-l),
        ),
        FDivergence(  # f = (1 - sqrt r)^2, h = sqrt(r) / 2; bounded by 2 (both masses apart)
            "squared_hellinger",
            lambda p, q: (torch.exp(p / 2) - torch.exp(q / 2)).square(),
            lambda l: -torch.expm1(-l / 2),
            lambda l: l / 2 - LOG2,
            lambda u: _where(u, u < 1, u / (1 - u), math.inf),
        ),
        FDivergence(  # KL both ways: f = (r-1) log r, h = r + 1
            "jeffreys",
            lambda p, q: _weighted(p, _gap(p, q)) - _weighted(q, _gap(p, q)),
            lambda l: l - torch.expm1(-l),
            softplus,
        ),
        FDivergence(  # f = (r-1)^2, h = 2 r^2
            "pearson",
            lambda p, q: torch.exp(p + _gap(p, q)) - 2 * p.exp() + q.exp(),
            lambda l: 2 * torch.expm1(l),
            lambda l: LOG2 + 2 * l,
            lambda u: torch.where(u > -2, u + u.square() / 4, -torch.ones_like(u)),
        ),
        FDivergence(  # f = (r-1)^2 / r, h = 2 / r
            "neyman",
            lambda p, q: torch.exp(q - _gap(p, q)) - 2 * q.exp() + p.exp(),
            lambda l: -torch.expm1(-2 * l),
            lambda l: LOG2 - l,
            lambda u: _where(u, u <= 1, 2 - 2 * torch.sqrt(1 - u), math.inf),
        ),
        FDivergence(  # f = (r-1)^2 / (r+1), h = 8 r^2 / (r+1)^3; also called triangular
            "le_cam",
            lambda p, q: (p.exp() - q.exp()) * torch.tanh(_gap(p, q) / 2),
            lambda l: 1 - 4 * torch.sigmoid(-l).square(),
            lambda l: 3 * LOG2 + 2 * logsigmoid(l) + logsigmoid(-l),
            lambda u: torch.where(u > -3, 4 - u - 4 * torch.sqrt(1 - u), -torch.ones_like(u)),
        ),
    )
}


def alpha_divergence(a: float) -> FDivergence:
    """(r^a - a r - (1-a)) / (a (a-1)), with h = r^a (Amari). a = 0 is reverse KL, 1/2 twice squared
    Hellinger, 1 forward KL, 2 half Pearson, -1 half Neyman."""
    if not math.isfinite(a):
        raise ValueError(f"a={a!r}: wanted a finite number")
    if a in (0, 1):  # the limits, up to a multiple of r - 1, which no divergence sees
        return replace(F["reverse_kl" if a == 0 else "forward_kl"], name=f"alpha({a:g})")

    def dual(u: Tensor) -> Tensor:
        w = 1 + (a - 1) * u
        value = (w.clamp(min=0) ** (a / (a - 1)) - 1) / a
        return value if a > 1 else _where(u, w >= 0, value, math.inf)

    return FDivergence(
        f"alpha({a:g})",
        lambda p, q: (torch.exp(torch.where(torch.maximum(p, q) == -math.inf, p, a * p + (1 - a) * q))
                      - a * p.exp() - (1 - a) * q.exp()) / (a * (a - 1)),
        lambda l: torch.expm1((a - 1) * l) / (a - 1),
        lambda l: a * l,
        dual,
    )


def skew_jensen_shannon(b: float) -> FDivergence:
    """b KL(p || m) + (1-b) KL(q || m), m = b p + (1-b) q: h = b (1-b) r / (b r + 1-b), for 0 < b < 1.

    b = 1/2 is Jensen-Shannon. Divided by b (1-b) it tends to forward KL as b -> 0 and to reverse KL as
    b -> 1: the family of score-of-mixture training (Jayashankar 2025)."""
    if not 0 < b < 1:
        raise ValueError(f"b={b!r}: wanted a number between 0 and 1, both excluded")

    def log_mixture(l: Tensor) -> Tensor:  # log(b r + 1 - b)
        return torch.logaddexp(l + math.log(b), torch.full_like(l, math.log(1 - b)))

    return FDivergence(
        f"skew_jensen_shannon({b:g})",
        _skew(b),
        lambda l: b * (l - log_mixture(l)),
        lambda l: math.log(b * (1 - b)) + l - log_mixture(l),
        lambda u: _where(
            u, u < -b * math.log(b), (1 - b) * (math.log(1 - b) - torch.log1p(-b * torch.exp(u / b))), math.inf
        ),
    )


def from_function(f: Function, name: str = "custom") -> FDivergence:
    """The f-divergence of any convex `f(r)` with f(1) = 0, written with torch operations; f' and f'' come from
    automatic differentiation, f* from bisection. Raises ValueError if f is not convex or f(1) is not 0."""

    def slope(l: Tensor) -> Tensor:
        return _differentiate(f, l.exp())[0]

    def log_weight(l: Tensor) -> Tensor:
        return 2 * l + torch.log(_differentiate(f, l.exp())[1])

    def perspective(p: Tensor, q: Tensor) -> Tensor:
        return _weighted(q, f(torch.exp(_gap(p, q))))

    r = torch.logspace(-3, 3, 61, dtype=torch.float64)
    curvature = _differentiate(f, r)[1]
    at_one = float(f(torch.ones((), dtype=torch.float64)))
    if abs(at_one) > 1e-9:
        raise ValueError(f"f: f(1) is {at_one:g}; wanted 0, or equal distributions would be apart")
    if not (curvature >= 0).all() or not (curvature > 0).any():
        bad = r[~(curvature >= 0)]
        where = f"f'' is negative or undefined at r = {bad[0].item():g}" if len(bad) else "f is a straight line"
        raise ValueError(f"f: {where}; wanted a convex function")
    return FDivergence(name, perspective, slope, log_weight)


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


def _conjugate_by_bisection(row: FDivergence, u: Tensor) -> Tensor:
    """sup_r (u r - f(r)): f' increases, so the maximiser solves f'(r) = u; found in log r on [-60, 60]."""
    u64 = u.double()
    low, high = torch.full_like(u64, -60.0), torch.full_like(u64, 60.0)
    beyond = u64 > row.slope(high)
    for _ in range(80):
        middle = (low + high) / 2
        above = row.slope(middle) < u64
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    r = low.exp()
    return torch.where(beyond, math.inf, u64 * r - row.f(r)).to(u)


def _ratio(r: Tensor) -> Tensor:
    if (r < 0).any():
        raise ValueError(f"r holds {r.min().item():g}; a density ratio p / q is never negative")
    return r


def _same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name_a} has shape {tuple(a.shape)} and {name_b} {tuple(b.shape)}; wanted equal shapes")


@dataclass(frozen=True)
class ScoreDistance:
    """A distance d between scores, as d(y) and its gradient d'(y), for y (n, *shape) the score difference.

    Score implicit matching minimises E d(s_q - s_p) (Luo 2024, table 1)."""

    name: str
    value: Function  # (n, *shape) -> (n,)
    gradient: Function  # (n, *shape) -> (n, *shape)


def squared_l2() -> ScoreDistance:
    """d = |y|^2."""
    return ScoreDistance("squared_l2", _sum_squares, lambda y: 2 * y)


def pseudo_huber(c: float) -> ScoreDistance:
    """d = sqrt(|y|^2 + c^2) - c: quadratic below c and linear above, so |d'| < 1 however far the student is."""
    _validate.positive("c", c)

    def gradient(y: Tensor) -> Tensor:
        return y * torch.rsqrt(_sum_squares(y) + c**2).reshape(-1, *[1] * (y.ndim - 1))

    return ScoreDistance(f"pseudo_huber({c:g})", lambda y: (_sum_squares(y) + c**2).sqrt() - c, gradient)


def _sum_squares(y: Tensor) -> Tensor:
    return y.square().flatten(1).sum(1)
