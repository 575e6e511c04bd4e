"""Distances between samples that need no density; all differentiable.

Here are the exact Wasserstein distances: on the line, along random or the worst directions, and by assignment. The
entropic ones are in `entropic.py`, those that average over pairs (MMD, energy, CRPS, kernel Stein) in `kernels.py`, and
all of them have their names here. Wasserstein-1 from a trained critic is `critic.wasserstein_1_critic`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minidistill import _validate
from minidistill._random import normal
from minidistill.transport._pairs import centred, distances, largest, probabilities
from minidistill.transport.entropic import sinkhorn

__all__ = [
    "max_sliced_wasserstein", "sliced_sinkhorn", "sliced_wasserstein", "wasserstein_1d", "wasserstein_2",
]


def wasserstein_1d(x: Tensor, y: Tensor, p: float = 2.0) -> Tensor:
    """W_p between samples on the line, along the first axis: x (n, ...), y (m, ...) -> (...).

    Sorted samples are the quantile functions; for n != m the two step functions are compared exactly.
    """
    if not _validate.number("p", p) >= 1:  # below 1 the sorted coupling is not the best
        raise ValueError(f"p={p!r}: wanted a finite number >= 1")
    _validate.floats("x", x)
    _validate.floats("y", y)
    if not x.ndim or not y.ndim or not len(x) or not len(y) or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; wanted (n, ...), (m, ...), not empty")
    _validate.finite("x", x)
    _validate.finite("y", y)
    x, y = _validate.precise(x, y)
    x, y = x.sort(0).values, y.sort(0).values
    n, m = len(x), len(y)
    if n == m:
        return _power_mean(x - y, p)
    # Both quantile functions are constant between consecutive multiples of 1/n and 1/m.
    cuts = torch.cat([torch.arange(1, n + 1, device=x.device) * m, torch.arange(1, m + 1, device=x.device) * n])
    cuts = cuts.unique()  # in units of 1 / (n m), sorted
    width = torch.diff(cuts, prepend=cuts.new_zeros(1)).to(x) / (n * m)
    return _power_mean(x[(cuts - 1) // m] - y[(cuts - 1) // n], p, width)


def sliced_wasserstein(
    x: Tensor, y: Tensor, n_projections: int = 128, generator: torch.Generator | None = None, p: float = 2.0
) -> Tensor:
    """(mean over random directions of W_p^p of the projections)^(1/p), a scalar (Bonneel 2015).

    x (n, *shape) and y (m, *shape). The same generator state gives the same directions.
    """
    x, y = _flat(x, y)
    directions = _directions(x, n_projections, generator)
    return _power_mean(wasserstein_1d(x @ directions, y @ directions, p), p)


def max_sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    p: float = 2.0,
    *,
    n_starts: int = 16,
    steps: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """W_p of the projections on the direction in which it is largest, a scalar (Deshpande 2019): x (n, *shape), y
    (m, *shape); at least `sliced_wasserstein` in the limit of many directions, and at most W_p.

    The direction is sought by gradient ascent on the sphere with steps that shorten, from the difference of the means
    and `n_starts` random starts, so the value is a lower bound. Its gradient holds the direction fixed.
    """
    x, y = _flat(x, y)
    _validate.whole("steps", steps)
    a, b = x.detach(), y.detach()
    shift = (a.mean(0) - b.mean(0)).unsqueeze(1)
    directions = torch.cat([_unit(shift), _directions(a, n_starts, generator)], 1)  # (d, 1 + n_starts)
    best, found = torch.full_like(directions[0], -1), directions.clone()
    for i in range(steps + 1):
        with torch.enable_grad():
            directions.requires_grad_(True)
            value = wasserstein_1d(a @ directions, b @ directions, p)
            slope = torch.autograd.grad(value.sum(), directions)[0]
        value, directions = value.detach(), directions.detach()
        found, best = torch.where(value > best, directions, found), torch.maximum(value, best)
        slope = slope - (slope * directions).sum(0) * directions
        directions = _unit(directions + (1 - i / steps) ** 2 * _unit(slope))
    direction = found[:, best.argmax()]
    return wasserstein_1d(x @ direction, y @ direction, p)


def sliced_sinkhorn(
    x: Tensor,
    y: Tensor,
    epsilon: float,
    n_projections: int = 32,
    generator: torch.Generator | None = None,
    debiased: bool = True,
    p: float = 2.0,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
) -> Tensor:
    """The mean of `sinkhorn` over random one-dimensional projections, a scalar, in the cost's units."""
    x, y = _flat(x, y)
    directions = _directions(x, n_projections, generator)
    return torch.stack([
        sinkhorn(u.unsqueeze(1), v.unsqueeze(1), epsilon, debiased, p, tolerance=tolerance,
                 max_iterations=max_iterations)
        for u, v in zip((x @ directions).T, (y @ directions).T, strict=True)
    ]).mean()


def wasserstein_2(
    x: Tensor, y: Tensor, weights_x: Tensor | None = None, weights_y: Tensor | None = None
) -> Tensor:
    """W2 between x (n, *shape) and y (m, *shape), exactly, a scalar in data units; the gradient holds the plan fixed.

    n = m without weights is an assignment problem, n^3 at worst (SciPy: a second for 2,000). Weights, scaled to sum
    to 1, or n != m make it a linear program of n m variables, for up to about 300 of each; beyond, see `sinkhorn`.
    """
    x, y = _flat(x, y)
    scale = max(largest(x), largest(y))
    apart = distances(x.detach().double() / scale, y.detach().double() / scale).cpu().numpy()
    if weights_x is None and weights_y is None and len(x) == len(y):
        from scipy.optimize import linear_sum_assignment  # here, since few calls need it and every program would wait

        i, j = (torch.as_tensor(index, device=x.device) for index in linear_sum_assignment(np.square(apart)))
        mass = None
    else:
        a, b = probabilities("weights_x", weights_x, x), probabilities("weights_y", weights_y, y)
        plan = torch.as_tensor(_optimal_plan(np.square(apart), a, b), device=x.device)
        i, j = plan.nonzero().unbind(1)
        mass = plan[i, j].to(x)
    moves = torch.linalg.vector_norm((x[i] - y[j]) / scale, dim=1)
    return _power_mean(moves, 2.0, mass) * scale


def _optimal_plan(cost: np.ndarray, a: Tensor, b: Tensor) -> np.ndarray:
    """The plan (n, m) of marginals a (n,) and b (m,) with the least <plan, cost>, by linear programming."""
    n, m = cost.shape
    from scipy import sparse
    from scipy.optimize import linprog

    sums = sparse.vstack([sparse.kron(sparse.eye(n), np.ones((1, m))), sparse.kron(np.ones((1, n)), sparse.eye(m))])
    marginals = [w.detach().double().cpu().numpy() for w in (a, b)]
    wanted = np.concatenate([w / w.sum() for w in marginals])
    solution = linprog(cost.ravel(), A_eq=sums.tocsc(), b_eq=wanted, method="highs")
    if not solution.success:
        raise RuntimeError(f"no optimal plan found: {solution.message}")
    return np.asarray(solution.x).reshape(n, m).clip(min=0)


def _flat(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = centred(*_validate.pair(x, y))
    return x, y


def _directions(x: Tensor, n_projections: int, generator: torch.Generator | None) -> Tensor:
    """Random unit vectors (d, n_projections)."""
    n_projections = _validate.whole("n_projections", n_projections)
    directions = normal((x.shape[1], n_projections), x.device, torch.get_default_dtype(), generator).to(x)
    return directions / directions.norm(dim=0)


def _unit(v: Tensor) -> Tensor:
    """Columns of length 1; those of length 0 stay."""
    v = v / largest(v)
    return v / v.norm(dim=0).clamp(min=torch.finfo(v.dtype).tiny)


def _power_mean(gap: Tensor, p: float, weights: Tensor | None = None) -> Tensor:
    """(mean of |gap|^p)^(1/p) over the first axis; the gradient where all gaps are 0 is 0."""
    size = gap.detach().abs().amax(0)  # kept out of the power, which could leave the range of numbers
    size = torch.where(size > 0, size, 1)
    powers = (gap / size).abs().pow(p)
    mean = powers.mean(0) if weights is None else torch.tensordot(weights, powers, dims=1)
    apart = mean > 0
    return size * torch.where(apart, torch.where(apart, mean, 1) ** (1 / p), 0)
