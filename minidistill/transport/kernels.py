"""Distances that average over pairs of samples: MMD, energy distance and score, CRPS, kernel Stein discrepancies.

Every one is differentiable in its samples. Pairs are visited a block of rows at a time, and each block is computed
again in the backward pass, so that memory grows with n and not with n^2. Squares are not rooted: `mmd` is MMD^2,
`energy_distance` is the square of scipy's, `kernel_stein_discrepancy` is KSD^2, as losses have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.transport._pairs import (
    SHOWS,
    by_rows,
    centred,
    distances,
    farthest,
    in_units,
    largest,
    mean_of_rows,
    medians,
    pair_mean,
    squared_distances,
)

__all__ = [
    "ESTIMATORS", "KERNELS", "Function", "Kernel", "almost_fair_crps", "crps", "energy_distance", "energy_score",
    "kernel_stein_discrepancy", "median_bandwidth", "mmd", "rational_quadratic", "truncated_kernel_stein_discrepancy",
]

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kernel:
    """A radial kernel k(x, y) = value(s), s = |x - y|^2 / bandwidth^2, value(0) = 1, with its derivatives in s."""

    value: Function
    slope: Function
    curvature: Function


def rational_quadratic(alpha: float) -> Kernel:
    """(1 + s / (2 alpha))^-alpha: a mixture of Gaussian kernels of all widths, the Gaussian itself as alpha grows.
    alpha = 1/2 is the inverse multiquadric (1 + s)^(-1/2)."""
    alpha = _validate.positive("alpha", alpha)

    def power(excess: int, factor: float) -> Function:
        return lambda s: factor * (1 + s / (2 * alpha)) ** (-alpha - excess)

    return Kernel(power(0, 1.0), power(1, -0.5), power(2, (alpha + 1) / (4 * alpha)))


#: exp(-s / 2); 1 / (1 + s / 2); 1 / sqrt(1 + s), under both of its names.
KERNELS: dict[str, Kernel] = {
    "gaussian": Kernel(lambda s: torch.exp(-s / 2), lambda s: -torch.exp(-s / 2) / 2, lambda s: torch.exp(-s / 2) / 4),
    "rational_quadratic": rational_quadratic(1.0),
    "inverse_multiquadric": rational_quadratic(0.5),
    "imq": rational_quadratic(0.5),
}
ESTIMATORS = ("unbiased", "biased", "linear")


def median_bandwidth(*samples: Tensor) -> float:
    """The median distance between two of the pooled samples (n, *shape), of at most 2,000 of them, evenly spaced:
    the usual guess of a kernel's width (Gretton 2012). If more than half of the pairs coincide, the mean; else 1."""
    pooled = torch.cat([each.detach().flatten(1) for each in samples])
    pooled = pooled[:: math.ceil(len(pooled) / 2000)]
    pooled = pooled - medians(pooled)
    scale = largest(pooled)  # squares of very large or small numbers would leave float32's range
    apart = torch.pdist(pooled / scale)
    return scale * (float(apart.median()) or float(apart.mean())) or 1.0 if len(apart) else 1.0


def mmd(
    x: Tensor,
    y: Tensor,
    kernel: str | Kernel = "gaussian",
    bandwidth: float | Sequence[float] | None = None,
    estimator: str = "unbiased",
    chunk: int | None = None,
) -> Tensor:
    """Squared maximum mean discrepancy, a scalar: E k(x, x') + E k(y, y') - 2 E k(x, y) (Gretton 2012).

    Args:
        x, y: samples (n, *shape) and (m, *shape).
        kernel: a name in `KERNELS`, or a `Kernel`.
        bandwidth: in data units; several for the mean of their kernels; None for `median_bandwidth(x, y)`.
        estimator: "unbiased" (no sample is paired with itself; can be negative), "biased" (all pairs, never negative),
            "linear" (each sample is in one pair: time n, but a large variance; lemma 14).
        chunk: rows of pairs in memory at once; None for about four million pairs.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(_validate.closest("estimator", estimator, ESTIMATORS))
    x, y = _validate.pair(x, y, least=1 if estimator == "biased" else 2)
    phi, widths = _kernel(kernel).value, _bandwidths(bandwidth, x, y)
    finest = min(widths)
    x, y = in_units(finest, x, y)
    ratios = [(finest / width) ** 2 for width in widths]

    def k(s: Tensor) -> Tensor:
        return torch.stack([phi(s * ratio) for ratio in ratios]).mean(0) if len(ratios) > 1 else phi(s)

    if estimator == "linear":
        half = min(len(x), len(y)) // 2
        (x1, x2), (y1, y2) = x[: 2 * half].view(half, 2, -1).unbind(1), y[: 2 * half].view(half, 2, -1).unbind(1)
        return (_k_of(k, x1, x2) + _k_of(k, y1, y2) - _k_of(k, x1, y2) - _k_of(k, x2, y1)).mean()
    others = estimator == "unbiased"
    within = (pair_mean(each, each, lambda a, b: k(squared_distances(a, b)), chunk, others) for each in (x, y))
    return sum(within, -2 * pair_mean(x, y, lambda a, b: k(squared_distances(a, b)), chunk))


def energy_distance(
    x: Tensor, y: Tensor, alpha: float = 1.0, estimator: str = "biased", chunk: int | None = None
) -> Tensor:
    """2 E|x - y|^alpha - E|x - x'|^alpha - E|y - y'|^alpha, a scalar (Szekely and Rizzo 2013), for samples (n, *shape)
    and (m, *shape); 0 < alpha < 2. In one dimension, at alpha = 1, the square of scipy.stats.energy_distance.

    estimator: "biased" counts each sample's zero distance to itself, which makes it a distance between the two sets,
    never negative; "unbiased" leaves it out.
    """
    alpha = _exponent(alpha)
    if estimator not in ESTIMATORS[:2]:
        raise ValueError(_validate.closest("estimator", estimator, ESTIMATORS[:2]))
    others = estimator == "unbiased"
    x, y = centred(*_validate.pair(x, y, least=1 + others))
    scale = max(largest(x), largest(y))
    x, y = x / scale, y / scale

    def mean(a: Tensor, b: Tensor, others: bool = False) -> Tensor:
        return pair_mean(a, b, lambda a, b: distances(a, b, alpha), chunk, others)

    return (2 * mean(x, y) - mean(x, x, others) - mean(y, y, others)) * scale**alpha


def energy_score(samples: Tensor, observation: Tensor, alpha: float = 1.0, tau: float = 1.0) -> Tensor:
    """E|X - y|^alpha - tau/2 E|X - X'|^alpha for each observation: samples (m, n, *shape), observation (n, *shape)
    -> (n,); the lower the better, and strictly proper for 0 < alpha < 2 and tau = 1 (Gneiting and Raftery 2007).

    With m = 2 it is half of the loss of Shao 2025: |x1 - y| + |x2 - y| - tau |x1 - x2|, where tau < 1 sharpens. alpha
    = 2 is allowed, to be seen fail: it only compares means.
    """
    alpha = _validate.number("alpha", alpha)
    alpha = alpha if alpha == 2 else _exponent(alpha)
    _validate.positive("tau", tau, strictly=False)
    _validate.samples("observation", observation)
    samples, observation = _ensemble(samples, "observation", observation, least=2)
    m, n = samples.shape[:2]
    flat, y = centred(samples.flatten(0, 1), observation)
    x, y = flat.unflatten(0, (m, n)).transpose(0, 1), y.unsqueeze(1)  # (n, m, d), (n, 1, d)
    scale = max(largest(x), largest(y))

    def score(rows: slice) -> Tensor:
        a, b = x[rows] / scale, y[rows] / scale
        apart = distances(a, a, alpha).sum((1, 2)) / (m * (m - 1))
        return distances(a, b, alpha).mean((1, 2)) - tau / 2 * apart

    return torch.cat(by_rows(score, n, m * m)) * scale**alpha


def crps(ensemble: Tensor, y: Tensor) -> Tensor:
    """The continuous ranked probability score of an ensemble (m, *shape) for y (*shape), elementwise -> (*shape):
    the integral over t of (F(t) - 1[y <= t])^2, F the ensemble's distribution function. Its mean over observations
    depends on m; see `almost_fair_crps`."""
    ensemble, y = _ensemble(ensemble, "y", y)
    return (ensemble - y).abs().mean(0) - _half_spread(ensemble)


def almost_fair_crps(ensemble: Tensor, y: Tensor, alpha: float = 0.95) -> Tensor:
    """(1/m) sum |x_j - y| - (1 - e) / (2 m (m - 1)) sum |x_j - x_k|, e = (1 - alpha) / m (Lang 2024): elementwise,
    ensemble (m, *shape), y (*shape) -> (*shape).

    alpha = 1 is the fair score, whose mean does not depend on m, but which lets one member run off while all others
    agree with y; alpha = 0 is `crps`.
    """
    ensemble, y = _ensemble(ensemble, "y", y, least=2)
    alpha = _validate.number("alpha", alpha, 0, 1)
    m = len(ensemble)
    return (ensemble - y).abs().mean(0) - _half_spread(ensemble) * (m - 1 + alpha) / (m - 1)


def kernel_stein_discrepancy(
    x: Tensor,
    score: Function | Tensor,
    kernel: str | Kernel = "imq",
    bandwidth: float | None = None,
    estimator: str = "u",
    chunk: int | None = None,
) -> Tensor:
    """KSD^2, a scalar in squared score units: the mean over pairs of samples x (n, *shape) of
    u(x, x') = s(x)'s(x') k + s(x)'grad_x' k + s(x')'grad_x k + tr grad_x grad_x' k (Liu 2016, Chwialkowski 2016).

    Zero in expectation if x is drawn from the density whose score s is `score`: a function, or its values at x shaped
    like x. No normalising constant and no samples of the target are needed. It hardly sees wrong weights of modes
    far apart, as the score does not. estimator: "u" without the pairs (x, x), unbiased; "v" with them, never negative.
    """
    x, s, k, h, kind = _stein(x, score, kernel, bandwidth, estimator)

    def u(rows: slice) -> Tensor:
        return _stein_kernel(x, s, k, rows)

    return (mean_of_rows(u, len(x), chunk, estimator == "u") / h**2).to(kind)


def truncated_kernel_stein_discrepancy(
    x: Tensor,
    score: Function | Tensor,
    boundary: Tensor,
    kernel: str | Kernel = "gaussian",
    bandwidth: float | None = None,
    estimator: str = "u",
    jitter: float = 1e-3,
    chunk: int | None = None,
) -> Tensor:
    """KSD^2 for a density cut off outside a region, known by points `boundary` (m, *shape) on its edge (Liu 2023).

    The plain one does not vanish for exact samples of a truncated density. Here the test functions are 0 at the
    boundary points: mean of u(x, x') - v(x)'K^-1 v(x'), K the boundary's kernel matrix (plus jitter I) and
    v_l(x) = s_l(x) k(x, .) + d k(x, .) / d x_l at those points, summed over coordinates l.
    """
    x, boundary = _validate.pair(x, boundary, names=("x", "boundary"))
    jitter = _validate.positive("jitter", jitter, strictly=False)
    centre = medians(x.flatten(1))
    x, s, k, h, kind = _stein(x, score, kernel, bandwidth, estimator)
    edge = (boundary.flatten(1) - centre).to(x) / h
    gram = k.value(squared_distances(edge, edge)) + jitter * torch.eye(len(edge), dtype=x.dtype, device=x.device)
    try:
        root = torch.linalg.cholesky(gram)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"jitter={jitter!r}: the boundary's kernel matrix is singular; wanted more, or points "
                         "farther apart") from error

    def u(rows: slice) -> Tensor:
        return _stein_kernel(x, s, k, rows)

    def whitened(rows: slice) -> Tensor:  # (rows, d m): v' K^-1 v' is the product of two such rows
        gap = x[rows].unsqueeze(2) - edge.T  # (rows, d, m)
        squares = gap.square().sum(1, keepdim=True)
        v = s[rows].unsqueeze(2) * k.value(squares) + 2 * k.slope(squares) * gap
        return torch.linalg.solve_triangular(root, v.transpose(1, 2).reshape(len(gap), len(edge), -1), upper=False)

    others = estimator == "u"
    w = by_rows(lambda rows: whitened(rows).sum(0), len(x), x.shape[1] * len(edge), chunk)
    total = torch.stack(w).sum(0).square().sum()
    if others:
        own = by_rows(lambda rows: whitened(rows).square().sum(), len(x), x.shape[1] * len(edge), chunk)
        total = total - torch.stack(own).sum()
    correction = total / (len(x) * (len(x) - others))
    return ((mean_of_rows(u, len(x), chunk, others) - correction) / h**2).to(kind)


def _stein(
    x: Tensor, score: Function | Tensor, kernel: str | Kernel, bandwidth: float | None, estimator: str
) -> tuple[Tensor, Tensor, Kernel, float, torch.dtype]:
    """Checked arguments: x centred and its score, both flat and in units of the bandwidth; kernel; bandwidth; the
    result's dtype."""
    if estimator not in ("u", "v"):
        raise ValueError(_validate.closest("estimator", estimator, ("u", "v")))
    _validate.samples("x", x, least=2 if estimator == "u" else 1)
    s = score if isinstance(score, Tensor) else score(x)
    _validate.samples("score", s, tuple(x.shape[1:]))
    if len(s) != len(x):
        raise ValueError(f"score has {len(s)} rows; wanted {len(x)}, one a sample")
    x, s = _validate.precise(x, s.to(x.device))
    k, h = _kernel(kernel), _bandwidths(bandwidth, x)[0]
    x, s, kind = in_units(h, x)[0], s.flatten(1) * h, x.dtype
    # Products of a far sample and its score are rounded by their own size, which shows beside the trace, about d; so
    # does the square of its score, which "u" takes out of the mean.
    if torch.finfo(x.dtype).eps * farthest(s) * max(farthest(x), farthest(s) / len(x)) > SHOWS * x.shape[1]:
        x, s = x.double(), s.double()
    return x, s, k, h, kind


def _stein_kernel(x: Tensor, s: Tensor, k: Kernel, rows: slice) -> Tensor:
    """u(x_i, x_j) for i in rows and all j, in units of the bandwidth."""
    a, sa = x[rows], s[rows]
    squares = squared_distances(a, x)
    slope = k.slope(squares)
    # (s_i - s_j)'(x_i - x_j), from products that need no (n, n, d)
    along = (sa * a).sum(1, keepdim=True) + (s * x).sum(1) - sa @ x.T - a @ s.T
    return (sa @ s.T) * k.value(squares) - 2 * slope * (along + x.shape[1]) - 4 * k.curvature(squares) * squares


def _kernel(kernel: str | Kernel) -> Kernel:
    return kernel if isinstance(kernel, Kernel) else _validate.choose("kernel", kernel, KERNELS)


def _bandwidths(bandwidth: float | Sequence[float] | None, *samples: Tensor) -> list[float]:
    if bandwidth is None:
        return [median_bandwidth(*samples)]
    several: Any = bandwidth if isinstance(bandwidth, Iterable) and getattr(bandwidth, "ndim", 1) != 0 else [bandwidth]
    widths = [_validate.positive("bandwidth", width) for width in several]
    if not widths:
        raise ValueError("bandwidth is empty; wanted a number, several, or None")
    return widths


def _exponent(alpha: float) -> float:
    return _validate.number("alpha", alpha, 0, 2, between=True)


def _ensemble(x: Tensor, name: str, y: Tensor, least: int = 1) -> list[Tensor]:
    """Both in one dtype; an error unless x is (m, *shape of y) with m >= least, and both are finite."""
    first = "samples" if name == "observation" else "ensemble"
    for label, each in ((first, x), (name, y)):
        if not isinstance(each, Tensor) or not each.is_floating_point():
            raise TypeError(f"{label} is {type(each).__name__}; wanted a floating point tensor")
        _validate.finite(label, each)
    if not x.ndim or x.shape[1:] != y.shape or len(x) < least:
        raise ValueError(f"{first} has shape {tuple(x.shape)}; wanted (m, *{tuple(y.shape)}) with m >= {least}, as "
                         f"{name} has shape {tuple(y.shape)}")
    return _validate.precise(x, y)


def _half_spread(ensemble: Tensor) -> Tensor:
    """sum |x_j - x_k| / (2 m^2) from the gaps between neighbours, which do not cancel: j lie below gap j."""
    m = len(ensemble)
    j = torch.arange(1, m, dtype=ensemble.dtype, device=ensemble.device).reshape(-1, *[1] * (ensemble.ndim - 1))
    return (ensemble.sort(0).values.diff(dim=0) * (j / m) * (1 - j / m)).sum(0)


def _k_of(k: Function, x: Tensor, y: Tensor) -> Tensor:
    return k((x - y).square().sum(1))
