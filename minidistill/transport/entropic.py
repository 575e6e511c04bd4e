"""Entropic optimal transport between samples (Sinkhorn), stable in float32, in bounded memory.

With C_ij = |x_i - y_j|^p and weights a, b, the plan is P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon) for the two
potentials that give it the marginals a and b. Each Sinkhorn iteration corrects one, then the other, in the logarithmic
domain. The trick that makes it fast: the exponentials are computed once, around potentials f and g that are
near enough, and the iterations then are matrix-vector products for the factors u and v, f + epsilon log u being the
potential; before u or v leave a safe range, they are absorbed into f and g (Schmitzer 2019). Matrices too large to keep
are computed afresh by blocks of rows in each iteration, absorbing each time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from minidistill import _validate
from minidistill.transport._pairs import ENTRIES, SHOWS, distances, farthest, largest, probabilities

__all__ = ["KEPT", "RANGES", "sinkhorn", "sinkhorn_plan"]

KEPT = 2**25  # entries of the largest matrix that is kept over the iterations
#: (smallest exponent computed, largest |log u| before absorbing): what is left out weighs exp(first + 2 second).
RANGES = {torch.float32: (-60.0, 10.0), torch.float64: (-600.0, 100.0)}


def sinkhorn(
    x: Tensor,
    y: Tensor,
    epsilon: float,
    debiased: bool = True,
    p: float = 2.0,
    *,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    chunk: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Entropic transport cost from x (n, *shape) to y (m, *shape), a scalar: OT(x, y) = min over plans P of
    <P, |x_i - y_j|^p> + epsilon KL(P | a b'), by default debiased: OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 (Feydy 2019).

    The debiased one is never negative, and 0 for x = y. As epsilon -> 0 both tend to W_p^p; as it grows the
    debiased one tends to an MMD (p = 1: half of the energy distance). Gradients, in x, y and the weights, are exact
    at convergence and cost one pass: the plan is held fixed (envelope theorem), so there are no second derivatives.

    Args:
        x, y: in float32 or float64, and computed in float64 where single precision would show beside epsilon: costs are
            rounded by their own size, so one far sample is enough for that.
        epsilon: in units of the cost, |x|^p. Iterations grow as cost / epsilon. A warning tells if even float64 does
            not resolve it beside the largest cost, and it was raised.
        weights_x, weights_y: (n,) and (m,), not negative; scaled to sum to 1; None for equal ones.
        tolerance: stop when the Euclidean norm of the error of the plan's second marginal is below; looked at
            every 10 iterations. A warning tells if `max_iterations` came first.
        chunk: rows of the n x m matrix in memory at once. None keeps the matrix up to 33 million entries, and else
            takes four million at a time, computed again each iteration.
    """
    problem = _prepare(x, y, epsilon, p, weights_x, weights_y, chunk)
    stop = (tolerance, max_iterations, progress)
    value = _transport(problem, stop)
    if debiased:
        for z, weights in ((problem.x, problem.a), (problem.y, problem.b)):
            value = value - _transport(_Problem(z, z, weights, weights, problem.epsilon, problem.p, chunk), stop) / 2
    root = problem.scale ** (problem.p / 2)  # twice, as its square may leave the range of numbers
    return (value + problem.moved).to(problem.kind) * root * root


def sinkhorn_plan(
    x: Tensor,
    y: Tensor,
    epsilon: float,
    p: float = 2.0,
    *,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    progress: bool = False,
) -> Tensor:
    """The entropic plan itself, (n, m), without gradient: rows sum to 1/n (or weights_x), columns to 1/m up to the
    tolerance. Arguments as for `sinkhorn`."""
    problem = _prepare(x, y, epsilon, p, weights_x, weights_y, None).detached()
    f, g = _potentials(problem, tolerance, max_iterations, progress)
    plan = [block.mul_(problem.b).mul_(problem.a[rows, None]) for rows, block in problem.kernel(f, g)]
    return torch.cat(plan).to(problem.kind)


@dataclass(frozen=True)
class _Problem:
    """Samples (n, d) and (m, d) in units of `scale`, weights that sum to 1, and epsilon in units of scale^p."""

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    epsilon: float
    p: float
    chunk: int | None
    kind: torch.dtype = torch.float64  # of the samples as they were given, at least float32
    scale: float = 1.0
    moved: Tensor | float = 0.0  # the cost of the shift between the means, where it was taken out

    def detached(self) -> _Problem:
        x, y, a, b = (each.detach() for each in (self.x, self.y, self.a, self.b))
        return replace(self, x=x, y=y, a=a, b=b)

    @property
    def kept(self) -> bool:
        return self.chunk is None and len(self.x) * len(self.y) <= KEPT

    def blocks(self) -> Iterator[slice]:
        """Rows to hold at once: all, if the matrix is kept."""
        n = len(self.x)
        rows = n if self.kept else self.chunk or max(1, ENTRIES // len(self.y))
        for start in range(0, n, rows):
            yield slice(start, min(start + rows, n))

    def exponent(self, rows: slice, f: Tensor, g: Tensor) -> Tensor:
        """(f_i + g_j - C_ij) / epsilon for i in rows."""
        x, f = self.x[rows], f[rows]
        if self.p == 2:  # |x - y|^2 = |x|^2 + |y|^2 - 2 x'y, in one matrix product
            f, g = f - x.square().sum(1), g - self.y.square().sum(1)
            out = torch.addmm(g / self.epsilon, x, self.y.T, alpha=2 / self.epsilon)
        else:
            out = distances(x, self.y, self.p).sub_(g).div_(-self.epsilon)
        return out.add_((f / self.epsilon).unsqueeze(1))

    def kernel(self, f: Tensor, g: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """exp((f_i + g_j - C_ij) / epsilon), a block of rows at a time."""
        for rows in self.blocks():
            yield rows, self.exponent(rows, f, g).clamp_(min=RANGES[f.dtype][0]).exp_()


def _prepare(
    x: Tensor, y: Tensor, epsilon: float, p: float, weights_x: Tensor | None, weights_y: Tensor | None,
    chunk: int | None,
) -> _Problem:
    """Checks, and takes out what the plan does not depend on: the unit of length, what all samples have in common, and
    for p = 2 the means, since |x - y|^2 splits into a shift of the means, a transport of the centred samples, and terms
    of one sample each."""
    x, y = _validate.pair(x, y)
    kind, epsilon = x.dtype, _validate.positive("epsilon", epsilon)
    p = _validate.number("p", p, 1, 64)
    chunk = None if chunk is None else _validate.whole("chunk", chunk)
    a, b = probabilities("weights_x", weights_x, x), probabilities("weights_y", weights_y, y)
    x, y = x.flatten(1), y.flatten(1)
    centre = (x.detach().mean(0) + y.detach().mean(0)) / 2
    # No cost is larger. Rounding errors of a cost are that times eps; and where epsilon is far above it, the potentials
    # are small differences of large numbers.
    longest = p * math.log(max(farthest(x - centre) + farthest(y - centre), 1e-300))
    ratio = longest - math.log(epsilon)  # logarithms: the powers may leave the range of numbers
    if ratio > math.log(SHOWS / torch.finfo(kind).eps) or ratio < math.log(0.1):
        x, y, centre, a, b = (each.double() for each in (x, y, centre, a, b))
        a, b = a / a.sum(), b / b.sum()
    x, y = x - centre, y - centre
    scale = max(largest(x), largest(y))
    if p * abs(math.log(scale)) > 600:
        raise ValueError(f"p={p:g}: the costs of samples of size {scale:.2g} leave the range of numbers; wanted less")
    x, y = x / scale, y / scale
    moved: Tensor | float = 0.0
    if p == 2:
        mean_x, mean_y = a @ x, b @ y
        moved = (mean_x - mean_y).square().sum()
        x, y = x - mean_x, y - mean_y
    return _Problem(x, y, a, b, _resolved(epsilon, scale, x, y, p), p, chunk, kind, scale, moved)


def _resolved(epsilon: float, scale: float, x: Tensor, y: Tensor, p: float) -> float:
    """epsilon in units of scale^p, held where it makes a difference that can be computed: above the rounding error of
    the largest cost, with a warning, and not far above that cost."""
    longest = (2 * max(largest(x), largest(y)) * math.sqrt(x.shape[1])) ** p
    wanted = math.exp(min(math.log(epsilon) - p * math.log(scale), 700.0))
    least = torch.finfo(x.dtype).eps * longest
    if wanted < least:
        warnings.warn(f"sinkhorn: epsilon={epsilon:g} is below what {x.dtype} resolves beside costs of "
                      f"{longest * scale**p:.2g}; {least * scale**p:.2g} was taken", RuntimeWarning, stacklevel=4)
    return min(max(wanted, least), 1e8 * longest)


def _transport(problem: _Problem, stop: tuple[float, int, bool]) -> Tensor:
    """OT as its dual <a, f> + <b, g>, since the plan's mass is 1; its gradient holds the potentials fixed."""
    detached = problem.detached()
    with torch.no_grad():
        f, g = (_self_potentials if problem.x is problem.y else _potentials)(detached, *stop)
    value = problem.a @ f + problem.b @ g
    return value + _PlanGradient.apply(problem.x, problem.y, detached, f, g)


def _potentials(problem: _Problem, tolerance: float, max_iterations: int, progress: bool) -> tuple[Tensor, Tensor]:
    """f (n,) and g (m,). Rows are always exact: an iteration sets u, sums the columns, and then sets v."""
    _stopping(tolerance, max_iterations)
    a, b, eps = problem.a, problem.b, problem.epsilon
    f, g = _start(problem)
    u, v = torch.ones_like(a), torch.ones_like(b)
    kernel: list[tuple[slice, Tensor]] = []
    for i in tqdm(range(max_iterations), desc="sinkhorn", disable=not progress, leave=False):
        if not kernel or _far(u, v):
            f, g = f + eps * u.log(), g + eps * v.log()
            u, v, kernel = torch.ones_like(a), torch.ones_like(b), []  # the old matrix is freed first
            kernel = list(problem.kernel(f, g)) if problem.kept else []
        columns, weighted = torch.zeros_like(b), b * v
        for rows, block in kernel or problem.kernel(f, g):
            u[rows] = 1 / (block @ weighted)
            columns += (a[rows] * u[rows]) @ block
        error = torch.linalg.vector_norm(b * (v * columns - 1)) if i % 10 == 0 or i == max_iterations - 1 else None
        if error is not None and error <= tolerance:
            break
        if i < max_iterations - 1:
            v = 1 / columns
    else:
        _not_converged(float(error), tolerance, max_iterations)  # type: ignore[arg-type]
    return f + eps * u.log(), g + eps * v.log()


def _self_potentials(problem: _Problem, tolerance: float, max_iterations: int, progress: bool) -> tuple[Tensor, Tensor]:
    """For y = x both potentials are one, which the average of the old and the corrected one reaches in few steps
    (Feydy 2019). Returned are the corrected and the old: rows are exact again."""
    _stopping(tolerance, max_iterations)
    a, eps = problem.a, problem.epsilon
    f, u = torch.zeros_like(a), torch.ones_like(a)  # 0 is a start: C_ii = 0 leaves a 1 in each row
    kernel: list[tuple[slice, Tensor]] = []
    for i in tqdm(range(max_iterations), desc="sinkhorn, debiasing", disable=not progress, leave=False):
        if not kernel or _far(u, u):
            f = f + eps * u.log()
            u, kernel = torch.ones_like(a), []
            kernel = list(problem.kernel(f, f)) if problem.kept else []
        rows = torch.cat([block @ (a * u) for _, block in kernel or problem.kernel(f, f)])
        error = torch.linalg.vector_norm(a * (u * rows - 1)) if i % 10 == 0 or i == max_iterations - 1 else None
        if error is not None and error <= tolerance:
            break
        if i < max_iterations - 1:
            u = (u / rows).sqrt()
    else:
        _not_converged(float(error), tolerance, max_iterations)  # type: ignore[arg-type]
    return f - eps * rows.log(), f + eps * u.log()


def _start(problem: _Problem) -> tuple[Tensor, Tensor]:
    """f_i = min_j C_ij and g_j = min_i C_ij - f_i: exponents of at most 0, and a 0 in each row and column, so that
    no sum of the first iteration vanishes. Later ones change each factor by 1 / min(a, b) at most."""
    f, g = torch.zeros_like(problem.a), torch.full_like(problem.b, math.inf)
    zero = torch.zeros_like(g)
    for rows in problem.blocks():
        exponent = problem.exponent(rows, f, zero)
        nearest = exponent.amax(1, keepdim=True)
        f[rows] = -problem.epsilon * nearest.squeeze(1)
        g = torch.minimum(g, -problem.epsilon * exponent.sub_(nearest).amax(0))
    return f, g


def _far(u: Tensor, v: Tensor) -> bool:
    low, high = torch.aminmax(torch.cat([u, v]).log())
    return bool(torch.maximum(-low, high) > RANGES[u.dtype][1])


def _stopping(tolerance: float, max_iterations: int) -> None:
    _validate.positive("tolerance", tolerance)
    _validate.whole("max_iterations", max_iterations)


def _not_converged(error: float, tolerance: float, max_iterations: int) -> None:
    warnings.warn(f"sinkhorn: marginal error {error:.1e} above tolerance={tolerance:g} after max_iterations="
                  f"{max_iterations}; allow more, or a larger epsilon", RuntimeWarning, stacklevel=4)


class _PlanGradient(torch.autograd.Function):
    """Zero, with the gradient sum_ij P_ij dC_ij in x and y: what envelope theorem leaves of the transport cost's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, problem: _Problem, f: Tensor, g: Tensor) -> Tensor:
        ctx.problem = problem
        ctx.save_for_backward(f, g)
        return x.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        problem = ctx.problem
        x, y, p = problem.x, problem.y, problem.p
        d_x, d_y = torch.zeros_like(x), torch.zeros_like(y)
        for rows, block in problem.kernel(*ctx.saved_tensors):
            plan = block.mul_(problem.b).mul_(problem.a[rows, None])
            if p != 2:  # dC/dx = p |x - y|^(p-2) (x - y)
                apart = distances(x[rows], y)
                plan = torch.where(apart > 0, plan * p / 2 * apart ** (p - 2), 0.0)
            d_x[rows] = 2 * (plan.sum(1, keepdim=True) * x[rows] - plan @ y)
            d_y += 2 * (plan.sum(0).unsqueeze(1) * y - plan.T @ x[rows])
        return gradient * d_x, gradient * d_y, None, None, None
