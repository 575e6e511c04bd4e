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
    "MOST_CELLS", "WHOLE", "GridKL", "ModeCoverage", "kl_both_ways", "kl_on_grid", "mode_coverage",
    "over_floor", "reverse_kl_on_grid",
]


WHOLE = 2**24  # numbers in memory at once; larger grids are visited in blocks
MOST_CELLS = 10**9


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
    The grid's cells are sigma / 2 wide, and are visited in blocks.
    Raises ValueError unless the target is two-dimensional and the samples are finite and (n, 2), and for a sigma so
    fine beside the target that the grid would have more than 10^9 cells.
    """
    _mixture(target)
    if target.shape != (2,):
        raise ValueError(f"target has samples of shape {target.shape}; a grid needs (2,)")
    _validate.samples("samples", samples, (2,))
    sigma, n_cells = _validate.positive("sigma", sigma), _validate.whole("n_cells", n_cells, least=2)
    x = samples.detach().double().to(target.means.device)
    smoothed = target.to(torch.float64).noised(sigma)
    axes = _grid_axes(smoothed, x, sigma, n_cells)
    cell = float((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))
    kl, reverse_kl, inside = 0.0, 0.0, 0.0
    for block in _blocks(axes, len(x), target.means.numel()):
        # Kernels farther off than this are 0 in float64.
        near = [(x[:, i] > axis[0] - 39 * sigma) & (x[:, i] < axis[-1] + 39 * sigma) for i, axis in enumerate(block)]
        here = x if block is axes else x[near[0] & near[1]]
        # A Gaussian kernel is a product over the two axes, so the density on the block is one matrix product.
        bumps = [torch.exp(-0.5 * ((here[:, i : i + 1] - axis) / sigma).square()) for i, axis in enumerate(block)]
        q = (bumps[0].T @ bumps[1]).flatten() / (len(x) * 2 * math.pi * sigma**2)
        log_p = smoothed.log_prob(torch.cartesian_prod(*block))
        log_q = q.clamp(min=1e-300).log()
        kl += float((log_p.exp() * (log_p - log_q)).sum() * cell)
        reverse_kl += float((q * (log_q - log_p)).sum() * cell)
        inside += float(q.sum() * cell)
    return GridKL(kl, reverse_kl, max(0.0, 1 - inside), sigma)


def _blocks(axes: list[Tensor], n: int, size: int) -> list[list[Tensor]]:
    """The grid, as a list of its axes, or pieces of it: neither its cells, with `size` numbers each, nor the kernels of
    n samples are to fill the memory."""
    longest = max(len(axis) for axis in axes)
    if size * math.prod(len(axis) for axis in axes) <= WHOLE and n * longest <= 2 * WHOLE:
        return [axes]
    side = max(16, math.isqrt(WHOLE // 4 // size))
    return [[first, second] for first in axes[0].split(side) for second in axes[1].split(side)]


def _grid_axes(smoothed: GaussianMixture, x: Tensor, sigma: float, n_cells: int) -> list[Tensor]:
    """The grid's coordinates along either axis: cells at most sigma / 2 wide, which a trapezoid rule on
    densities that smooth integrates to machine precision."""
    reach = 5 * smoothed.variances.max().sqrt()
    ends, counts = [], []
    for means, values in zip(smoothed.means.T, x.T, strict=True):
        low, high = means.min() - reach, means.max() + reach
        half = (high - low) / 2
        low = torch.maximum(low - half, torch.minimum(low, values.min() - 5 * sigma))
        high = torch.minimum(high + half, torch.maximum(high, values.max() + 5 * sigma))
        ends.append((float(low), float(high)))
        counts.append(max(n_cells, math.ceil((ends[-1][1] - ends[-1][0]) / (sigma / 2))))
    if math.prod(counts) > MOST_CELLS:
        raise ValueError(f"sigma={sigma:g}: cells half as wide would be {math.prod(counts):.2g} over the target and "
                         f"its samples; wanted a sigma that leaves {MOST_CELLS:.0e} at most")
    return [torch.linspace(*end, count, dtype=torch.float64, device=x.device)
            for end, count in zip(ends, counts, strict=True)]


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
    _mixture(target)
    _validate.samples("samples", samples, target.shape)
    x = samples.detach().to(target.means)
    rows = max(1, WHOLE // target.means.numel())  # whose offsets to all means are in memory at once
    distance, nearest = torch.cat([target.distances(part) for part in x.split(rows)]).min(1)
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
    _mixture(target)
    _validate.samples("samples", samples, target.shape)
    sets, seed = _validate.whole("sets", sets, least=2), _validate.whole("seed", seed, least=0)
    exact, floor = _exact_sets(target, len(samples), seed, sets)
    # Exact samples of the same seed are one of the sets themselves: at no distance, which says nothing.
    return _mean_distance(samples, [x for x in exact if not torch.equal(x, samples)]) / floor


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


def _mixture(target: object) -> None:
    if not isinstance(target, GaussianMixture):
        raise TypeError(f"target is {type(target).__name__}; wanted a GaussianMixture")
