"""Numbers that read as quality: exact divergences in 2-D, mode coverage, Frechet distance and precision and recall of
features, a classifier's calibration."""

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
    "GridKL", "ModeCoverage", "PrecisionRecall", "expected_calibration_error", "frechet_distance", "grid_kl",
    "kl_on_grid", "mode_coverage", "over_floor", "precision_recall", "reverse_kl_on_grid", "sliced_wasserstein",
]


class GridKL(NamedTuple):
    """KL divergences in nats between the target p and the student q, both smoothed by Gaussian noise `sigma`."""

    kl: float  # KL(p || q): large when the student misses mass
    reverse_kl: float  # KL(q || p): large when the student puts mass where the target has none
    outside: float  # the share of the student's mass off the grid, which neither number sees
    sigma: float


def grid_kl(target: GaussianMixture, samples: Tensor, sigma: float = 0.1, n_cells: int = 200) -> GridKL:
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
    """KL(p || q) in nats at smoothing `sigma`; see `grid_kl`, which also reports the mass off the grid."""
    return grid_kl(target, samples, sigma).kl


def reverse_kl_on_grid(target: GaussianMixture, samples: Tensor, sigma: float = 0.1) -> float:
    """KL(q || p) in nats at smoothing `sigma`; see `grid_kl`."""
    return grid_kl(target, samples, sigma).reverse_kl


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


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), the squared W2 between the Gaussians fitted to two sets of
    features (n, d) and (m, d) (Heusel 2017). In the features' squared units; biased upwards for few samples,
    so quote n and the features with it. Raises ValueError for fewer than 2 samples or unequal d."""
    _validate.samples("x", x, least=2)
    _validate.samples("y", y, tuple(x.shape[1:]), least=2)
    x, y = x.detach().flatten(1).double(), y.detach().flatten(1).double().to(x.device)
    cov_x, cov_y = torch.atleast_2d(x.T.cov()), torch.atleast_2d(y.T.cov())
    # tr (C_x C_y)^(1/2) from the symmetric form C_x^(1/2) C_y C_x^(1/2), whose eigenvalues are real and >= 0.
    values, vectors = torch.linalg.eigh(cov_x)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    mean_gap = (x.mean(0) - y.mean(0)).square().sum()
    return max(0.0, float(mean_gap + cov_x.trace() + cov_y.trace() - 2 * cross))


class PrecisionRecall(NamedTuple):
    """How much of the samples looks real, and how much of the real data the samples reach: both from 0 to 1."""

    precision: float  # the share of samples that lie in the reference's manifold
    recall: float  # the share of the reference that lies in the samples' manifold


def precision_recall(x: Tensor, y: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall of samples x (n, d) against a reference y (m, d), both features
    (Kynkaanniemi 2019, equations 1 and 2).

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour in
    the same set. Both numbers move with n, m and k (two sets from one distribution do not score 1), so quote them.
    Memory grows as n + m, time as (n + m)^2 d: seconds for 10,000 of each in 128 dimensions. Distances are exact to
    about 1e-6 of the features' spread. Raises ValueError unless n and m exceed k and both have d features.
    """
    _validate.whole("k", k)
    _validate.samples("x", x, least=k + 1)
    _validate.samples("y", y, tuple(x.shape[1:]), least=k + 1)
    x, y = x.detach().flatten(1).double(), y.detach().flatten(1).double().to(x.device)
    centre = y.mean(0)
    x, y = x - centre, y - centre  # squared distances come from a matrix product, most precise near the origin
    slack = 1e-12 * float(torch.maximum(x.square().sum(1).max(), y.square().sum(1).max()))  # of that product's rounding
    reach_x, reach_y = _squared_reach(x, k) + slack, _squared_reach(y, k) + slack
    inside, reached = 0, torch.zeros(len(y), dtype=torch.bool, device=x.device)
    for part, reach in zip(x.split(_CHUNK), reach_x.split(_CHUNK), strict=True):
        apart = _squared_distances(part, y)
        inside += int((apart <= reach_y).any(1).sum())
        reached |= (apart <= reach.unsqueeze(1)).any(0)
    return PrecisionRecall(inside / len(x), float(reached.double().mean()))


_CHUNK = 500  # rows of a distance matrix in memory at once


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2, (n, m)."""
    return torch.addmm(x.square().sum(1, keepdim=True) + y.square().sum(1), x, y.T, alpha=-2)


def _squared_reach(x: Tensor, k: int) -> Tensor:
    """The squared distance from each point to its k-th nearest neighbour, itself not counted, (n,)."""
    reach = []
    for start in range(0, len(x), _CHUNK):
        apart = _squared_distances(x[start : start + _CHUNK], x)
        row = torch.arange(len(apart), device=x.device)
        apart[row, start + row] = math.inf
        reach.append(apart.topk(k, largest=False).values[:, -1])
    return torch.cat(reach).clamp(min=0)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, n_bins: int = 15) -> float:
    """The mean gap between how sure a classifier is and how often it is right, from 0 to 1 (Guo 2017, equation 3).

    Samples are grouped by confidence, the largest of `probabilities` (n, k), in n_bins bins of equal width; each bin's
    |accuracy - mean confidence| counts by its share of the samples. With few samples it is biased upwards. ValueError
    unless the rows are probabilities that sum to 1 and labels (n,) are classes.
    """
    _validate.samples("probabilities", probabilities)
    _validate.labels("labels", labels, len(probabilities), probabilities.shape[1])
    _validate.whole("n_bins", n_bins)
    off = (probabilities.sum(1) - 1).abs().max().item()
    if off > 1e-3 or (probabilities < 0).any():
        raise ValueError(f"probabilities has rows that miss a sum of 1 by up to {off:.2g}, or negative entries; wanted "
                         "probabilities, such as logits.softmax(1)")
    confidence, answer = probabilities.double().max(1)
    group = (confidence * n_bins).long().clamp(max=n_bins - 1)
    gap = torch.zeros(n_bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, group, (answer == labels).double() - confidence)
    return float(gap.abs().sum() / len(labels))
