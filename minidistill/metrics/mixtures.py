"""Students of a mixture measured exactly: both KL divergences on a grid, mode coverage, sliced W2 over its floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.distributions import GaussianMixture
from minidistill.transport import sliced_wasserstein

__all__ = [
    "GridKL", "ModeCoverage", "kl_both_ways", "kl_on_grid", "mode_coverage", "over_floor", "reverse_kl_on_grid",
]


class GridKL(NamedTuple):
    """KL divergences in nats between the target p and the student q, both smoothed by Gaussian noise `sigma`."""

    kl: float  # KL(p || q): large when the student misses mass
    reverse_kl: float  # KL(q || p): large when the student puts mass where the target has none
    outside: float  # the share of the student's mass off the grid, which neither number sees
    sigma: float


def kl_both_ways(target: GaussianMixture, samples: Tensor, sigma: float = 0.1, n_cells: int = 200) -> GridKL:
    """Both KLs between a 2-D mixture and samples (n, 2), after adding noise of standard deviation `sigma`
    to both: q becomes the kernel density (1/n) sum N(x_i, sigma^2 I), and p stays exact.

    The grid holds the target's modes with 5 standard deviations around them, and all samples up to twice as far
    out; what is beyond is reported as `outside`. Densities under 1e-300 count as 1e-300, which bounds the KL of
    a missed mode. Finite n biases the estimate upwards by about (area of the modes / 4 pi sigma^2) / 2n.
    Raises ValueError unless the target is two-dimensional and the samples are finite and (n, 2).
    """
    if target.shape != (2,):
        raise ValueError(f"target has samples of shape {target.shape}; a grid needs (2,)")
    _validate.samples("samples", samples, (2,))
    _validate.positive("sigma", sigma)
    x = samples.detach().double().to(target.means.device)
    smoothed = target.to(torch.float64).noised(sigma)
    axes = _grid_axes(smoothed, x, sigma, n_cells)
    cell = float((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))
    # A Gaussian kernel is a product over the two axes, so the density on the whole grid is one matrix product.
    bumps = [torch.exp(-0.5 * ((x[:, i : i + 1] - axis) / sigma).square()) for i, axis in enumerate(axes)]
    q = (bumps[0].T @ bumps[1]).flatten() / (len(x) * 2 * math.pi * sigma**2)
    log_p = smoothed.log_prob(torch.cartesian_prod(*axes))
    log_q = q.clamp(min=1e-300).log()
    return GridKL(
        kl=float((log_p.exp() * (log_p - log_q)).sum() * cell),
        reverse_kl=float((q * (log_q - log_p)).sum() * cell),
        outside=max(0.0, 1 - float(q.sum() * cell)),
        sigma=sigma,
    )


def _grid_axes(smoothed: GaussianMixture, x: Tensor, sigma: float, n_cells: int) -> list[Tensor]:
    """The grid's coordinates along either axis: cells at most sigma / 2 wide, which a trapezoid rule on
    densities that smooth integrates to machine precision."""
    reach = 5 * smoothed.covs.diagonal(dim1=1, dim2=2).max().sqrt()
    axes = []
    for means, values in zip(smoothed.means.T, x.T, strict=True):
        low, high = means.min() - reach, means.max() + reach
        half = (high - low) / 2
        low = torch.maximum(low - half, torch.minimum(low, values.min() - 5 * sigma))
        high = torch.minimum(high + half, torch.maximum(high, values.max() + 5 * sigma))
        count = max(n_cells, math.ceil(float(high - low) / (sigma / 2)))
        axes.append(torch.linspace(float(low), float(high), count, dtype=torch.float64, device=x.device))
    return axes


def kl_on_grid(target: GaussianMixture, samples: Tensor, sigma: float = 0.1) -> float:
    """KL(p || q) in nats at smoothing `sigma`; see `kl_both_ways`, which also reports the mass off the grid."""
    return kl_both_ways(target, samples, sigma).kl


def reverse_kl_on_grid(target: GaussianMixture, samples: Tensor, sigma: float = 0.1) -> float:
    """KL(q || p) in nats at smoothing `sigma`; see `kl_both_ways`."""
    return kl_both_ways(target, samples, sigma).reverse_kl


class ModeCoverage(NamedTuple):
    """Where the samples of a mixture's student went."""

    covered: int  # modes with at least a quarter of their weight
    total: int
    shares: Tensor  # (k,) the fraction of samples nearest to each mode
    worst: float  # the largest relative error of a share, max |share / weight - 1|
    high_quality: float  # the fraction of samples within 3 standard deviations of some mode


def mode_coverage(target: GaussianMixture, samples: Tensor) -> ModeCoverage:
    """Assign each sample (n, d) to the component nearest in standard deviations, and compare with the weights."""
    _validate.samples("samples", samples, target.shape)
    x = samples.detach().to(target.means)
    white = torch.linalg.cholesky(target.covs).inverse()  # (k, d, d), to units of standard deviations
    offset = torch.einsum("kij,nkj->nki", white, x.unsqueeze(1) - target.means)
    distance, nearest = offset.norm(dim=2).min(1)
    shares = torch.bincount(nearest, minlength=target.n_components).to(x) / len(x)
    ratio = shares / target.weights
    return ModeCoverage(
        covered=int((ratio >= 0.25).sum()),
        total=target.n_components,
        shares=shares,
        worst=float((ratio - 1).abs().max()),
        high_quality=float((distance <= 3).double().mean()),
    )


def over_floor(target: GaussianMixture, samples: Tensor, seed: int = 0, sets: int = 6) -> float:
    """The sliced W2 of samples (n, d) to exact ones over that between exact sets: 1 for a perfect student. The same n
    and directions for both; both are means, over `sets` fresh sets and over all pairs of them, since single floors vary
    by half. ValueError for samples of another shape than the target's, or fewer than 2 sets."""
    _validate.samples("samples", samples, target.shape)
    _validate.whole("sets", sets, least=2)
    exact, floor = _exact_sets(target, len(samples), seed, sets)
    return _mean_distance(samples, exact) / floor


@lru_cache(maxsize=4)  # of mixtures by identity: students of one target share them
def _exact_sets(target: GaussianMixture, n: int, seed: int, sets: int) -> tuple[list[Tensor], float]:
    """Exact sets of n samples, and the mean distance over all pairs of them."""
    rng = torch.Generator(target.means.device).manual_seed(seed)
    exact = [target.sample(n, rng) for _ in range(sets)]
    total = sum(i * _mean_distance(x, exact[:i]) for i, x in enumerate(exact) if i)
    return exact, total / (sets * (sets - 1) / 2)


def _mean_distance(x: Tensor, others: Sequence[Tensor]) -> float:
    distances = [sliced_wasserstein(x, y, generator=torch.Generator().manual_seed(0)) for y in others]
    return float(sum(distances)) / len(distances)

