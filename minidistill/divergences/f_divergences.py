"""The f-divergences: one table, two families, and any convex function of yours.

Convention: r = p / q with p the teacher and q the student, D_f(p || q) = E_q f(r), f(1) = 0, in nats.
Papers that write the ratio the other way round use f°(u) = u f(1/u).

A divergence moves a generator x0 = g(z) through its weight h(r) = r^2 f''(r):
    grad_theta D_f(p_t || q_t) = - E[ h(r) (grad log p_t - grad log q_t)(x_t) . dx_t / dtheta ]
(f-distill, Xu 2025, theorem 1). So one row of the table below is one distillation objective.

A divergence is also the best score of a critic T (Nguyen 2010): D_f = sup_T E_p T - E_q f*(T), reached by T = f'(r).
Writing T = f'(e^v) keeps any network v(x) inside the domain of f*; then v gains `slope(v)` on samples of p and pays
`cost(v)` = f*(f'(e^v)) on samples of q. Exchanging p and q exchanges the two columns, with v and both signs
turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from minidistill import _validate

__all__ = [
    "F", "LOG2", "FDivergence", "Function", "alpha_divergence", "gap", "skew_jensen_shannon", "total_variation",
    "weighted",
]

LOG2 = math.log(2.0)
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FDivergence:
    """One generator f, written so that ratios of e^{+-80} stay finite in float32.

    perspective(log p, log q) is q f(p/q); at q = 1 it is f itself.
    slope(log r) is f'(r); log_weight(log r) is log h(r) = log(r^2 f''(r)); cost(log r) is f*(f'(r)) = r f'(r) - f(r).
    dual(u) is the convex conjugate f*(u) = sup_r (u r - f(r)), infinite outside its domain; None computes
    it by bisection.
    """

    name: str
    perspective: Callable[[Tensor, Tensor], Tensor]
    slope: Function
    log_weight: Function
    cost: Function
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

    @property
    def at_zero(self) -> float:
        """f(0+): what a unit of mass costs that only q holds."""
        empty, full = _ends()
        return float(self.perspective(empty, full))

    @property
    def at_infinity(self) -> float:
        """lim f(r) / r for r -> infinity, which is f°(0): what a unit of mass costs that only p holds."""
        empty, full = _ends()
        return float(self.perspective(full, empty))

    @property
    def bound(self) -> float:
        """The largest value that D_f takes, that of disjoint p and q; infinite for an unbounded divergence."""
        return self.at_zero + self.at_infinity

    def flipped(self) -> FDivergence:
        """f°(u) = u f(1/u), the divergence with p and q exchanged; its weight is h°(u) = u h(1/u)."""
        return FDivergence(
            f"flipped({self.name})",
            lambda p, q: self.perspective(q, p),
            lambda l: -self.cost(-l),
            lambda l: l + self.log_weight(-l),
            lambda l: -self.slope(-l),
        )

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


def _ends() -> tuple[Tensor, Tensor]:
    return torch.tensor(-math.inf, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)


def weighted(log_w: Tensor, value: Tensor) -> Tensor:
    """exp(log_w) * value, with 0 * infinity = 0, as in the limit x log x -> 0."""
    w = log_w.exp()
    empty = w == 0
    return torch.where(empty, 0.0, w * torch.where(empty, 0.0, value))


def gap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(p / q), and 0 where both densities vanish."""
    return torch.where((log_p == -math.inf) & (log_q == -math.inf), 0.0, log_p - log_q)


def _not_both_empty(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both, and where both are -inf: there with 0 in their place, since logaddexp has no gradient at (-inf, -inf)."""
    empty = (log_p == -math.inf) & (log_q == -math.inf)
    return torch.where(empty, 0.0, log_p), torch.where(empty, 0.0, log_q), empty


def _skew(b: float) -> Callable[[Tensor, Tensor], Tensor]:
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q, as a perspective function."""

    def perspective(log_p: Tensor, log_q: Tensor) -> Tensor:
        log_p, log_q, empty = _not_both_empty(log_p, log_q)
        log_m = torch.logaddexp(log_p + math.log(b), log_q + math.log(1 - b))
        value = b * weighted(log_p, log_p - log_m) + (1 - b) * weighted(log_q, log_q - log_m)
        return torch.where(empty, 0.0, value)

    return perspective


def _softened(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_p, log_q, empty = _not_both_empty(log_p, log_q)
    log_sum = torch.logaddexp(log_p, log_q)
    return torch.where(empty, 0.0, weighted(log_sum, log_sum - LOG2 - log_p))


def _where(u: Tensor, inside: Tensor, value: Tensor, outside: float) -> Tensor:
    return torch.where(inside, value, torch.full_like(u, outside))


#: Every f-divergence by name. Columns: q f(p/q); f'; log h; f*(f'); f*. `l` is log r throughout.
F: dict[str, FDivergence] = {
    row.name: row
    for row in (
        FDivergence(  # KL(q || p): f = -log r, h = 1; mode seeking, needs no ratio
            "reverse_kl",
            lambda p, q: weighted(q, -gap(p, q)),
            lambda l: -torch.exp(-l),
            torch.zeros_like,
            lambda l: l - 1,
            lambda u: _where(u, u < 0, -1 - torch.log(-u), math.inf),
        ),
        FDivergence(  # KL(p || q): f = r log r, h = r; covers modes, high variance
            "forward_kl",
            lambda p, q: weighted(p, gap(p, q)),
            lambda l: l + 1,
            lambda l: l,
            torch.exp,
            lambda u: torch.exp(u - 1),
        ),
        FDivergence(  # f = [r log r - (r+1) log((r+1)/2)] / 2, h = r / (2 (r+1)); bounded by log 2
            "jensen_shannon",
            _skew(0.5),
            lambda l: 0.5 * (logsigmoid(l) + LOG2),
            lambda l: logsigmoid(l) - LOG2,
            lambda l: 0.5 * (softplus(l) - LOG2),
            lambda u: _where(u, u < LOG2 / 2, -0.5 * torch.log(2 - torch.exp(2 * u)), math.inf),
        ),
        FDivergence(  # f = (r+1) log((r+1)/(2r)), h = 1 / (r+1)
            "softened_reverse_kl",
            _softened,
            lambda l: softplus(-l) - LOG2 - torch.exp(-l),
            lambda l: logsigmoid(-l),
            lambda l: LOG2 - 1 - softplus(-l),
        ),
        FDivergence(  # f = (1 - sqrt r)^2, h = sqrt(r) / 2; bounded by 2 (both masses apart)
            "squared_hellinger",
            lambda p, q: (torch.exp(p / 2) - torch.exp(q / 2)).square(),
            lambda l: -torch.expm1(-l / 2),
            lambda l: l / 2 - LOG2,
            lambda l: torch.expm1(l / 2),
            lambda u: _where(u, u < 1, u / (1 - u), math.inf),
        ),
        FDivergence(  # KL both ways: f = (r-1) log r, h = r + 1
            "jeffreys",
            lambda p, q: weighted(p, gap(p, q)) - weighted(q, gap(p, q)),
            lambda l: l - torch.expm1(-l),
            softplus,
            lambda l: l + torch.expm1(l),
        ),
        FDivergence(  # f = (r-1)^2, h = 2 r^2
            "pearson",
            lambda p, q: (p.exp() - q.exp()) * torch.expm1(gap(p, q)),
            lambda l: 2 * torch.expm1(l),
            lambda l: LOG2 + 2 * l,
            lambda l: torch.expm1(2 * l),
            lambda u: torch.where(u > -2, u + u.square() / 4, -torch.ones_like(u)),
        ),
        FDivergence(  # f = (r-1)^2 / r, h = 2 / r
            "neyman",
            lambda p, q: (q.exp() - p.exp()) * torch.expm1(-gap(p, q)),
            lambda l: -torch.expm1(-2 * l),
            lambda l: LOG2 - l,
            lambda l: -2 * torch.expm1(-l),
            lambda u: _where(u, u <= 1, 2 - 2 * torch.sqrt(1 - u), math.inf),
        ),
        FDivergence(  # f = (r-1)^2 / (r+1), h = 8 r^2 / (r+1)^3; also called triangular
            "le_cam",
            lambda p, q: (p.exp() - q.exp()) * torch.tanh(gap(p, q) / 2),
            lambda l: 1 - 4 * torch.sigmoid(-l).square(),
            lambda l: 3 * LOG2 + 2 * logsigmoid(l) + logsigmoid(-l),
            lambda l: 4 * torch.sigmoid(l).square() - 1,
            lambda u: torch.where(u > -3, 4 - u - 4 * torch.sqrt(1 - u), -torch.ones_like(u)),
        ),
    )
}

#: f = |r - 1| / 2, the largest difference of probabilities. It has no curvature but at r = 1, so h = 0 and no sample
#: moves: it measures and does not train, which is why it is not in `F`.
total_variation = FDivergence(
    "total_variation",
    lambda p, q: 0.5 * (p.exp() - q.exp()).abs(),
    lambda l: 0.5 * torch.sign(l),
    lambda l: torch.full_like(l, -math.inf),
    lambda l: 0.5 * torch.sign(l),
    lambda u: _where(u, u <= 0.5, u.clamp(min=-0.5), math.inf),
)


def alpha_divergence(a: float) -> FDivergence:
    """(r^a - a r - (1-a)) / (a (a-1)), with h = r^a (Amari). a = 0 is reverse KL, 1/2 twice squared
    Hellinger, 1 forward KL, 2 half Pearson, -1 half Neyman."""
    a = _validate.number("a", a)
    if a in (0, 1):  # the limits, up to a multiple of r - 1, which no divergence sees
        return replace(F["reverse_kl" if a == 0 else "forward_kl"], name=f"alpha({a:g})")

    def perspective(log_p: Tensor, log_q: Tensor) -> Tensor:
        p, q = log_p.exp(), log_q.exp()
        # Next to a = 1 and a = 0 the power r^a differs little from r and from 1, and dividing by a - 1 or a would
        # magnify the rounding of that difference.
        if abs(a - 1) < 0.1:
            l = torch.where(p == 0, 0.0, gap(log_p, log_q))
            return (p * torch.expm1((a - 1) * l) / (a - 1) - (p - q)) / a
        if abs(a) < 0.1:
            l = torch.where(q == 0, 0.0, gap(log_p, log_q))
            return (q * torch.expm1(a * l) / a - (p - q)) / (a - 1)
        power = torch.where(torch.maximum(log_p, log_q) == -math.inf, log_p, a * log_p + (1 - a) * log_q)
        return (power.exp() - a * p - (1 - a) * q) / (a * (a - 1))

    def dual(u: Tensor) -> Tensor:
        w = (a - 1) * u
        value = torch.expm1(a / (a - 1) * torch.log1p(w.clamp(min=-1))) / a
        return value if a > 1 else _where(u, w >= -1, value, math.inf)

    return FDivergence(
        f"alpha({a:g})",
        perspective,
        lambda l: torch.expm1((a - 1) * l) / (a - 1),
        lambda l: a * l,
        lambda l: torch.expm1(a * l) / a,
        dual,
    )


def skew_jensen_shannon(b: float) -> FDivergence:
    """b KL(p || m) + (1-b) KL(q || m), m = b p + (1-b) q: h = b (1-b) r / (b r + 1-b), for 0 < b < 1.

    b = 1/2 is Jensen-Shannon. Divided by b (1-b) it tends to forward KL as b -> 0 and to reverse KL as
    b -> 1: the family of score-of-mixture training (Jayashankar 2025)."""
    b = _validate.number("b", b, 0, 1, between=True)

    def log_mixture(l: Tensor) -> Tensor:  # log(b r + 1 - b)
        return torch.logaddexp(l + math.log(b), torch.full_like(l, math.log(1 - b)))

    return FDivergence(
        f"skew_jensen_shannon({b:g})",
        _skew(b),
        lambda l: b * (l - log_mixture(l)),
        lambda l: math.log(b * (1 - b)) + l - log_mixture(l),
        lambda l: (1 - b) * log_mixture(l),
        lambda u: _where(
            u, u < -b * math.log(b), (1 - b) * (math.log(1 - b) - torch.log1p(-b * torch.exp(u / b))), math.inf
        ),
    )


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
    if _validate.any_of(r < 0):
        raise ValueError(f"r holds {r.min().item():g}; a density ratio p / q is never negative")
    return r


def _same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name_a} has shape {tuple(a.shape)} and {name_b} {tuple(b.shape)}; wanted equal shapes")
