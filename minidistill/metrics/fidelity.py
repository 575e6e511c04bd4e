"""Distances between sets of features: Fréchet distance, precision and recall."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from minidistill import _validate

__all__ = ["PrecisionRecall", "frechet_distance", "precision_recall"]


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), the squared W2 between the Gaussians fitted to two sets of
    features (n, d) and (m, d) (Heusel 2017). In the features' squared units; biased upwards for few samples,
    so quote n and the features with it. Raises ValueError for fewer than 2 samples or unequal d."""
    x, y = _validate.pair(x, y, least=2)
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
    Memory grows as n + m, time as (n + m)^2 d: seconds for 10,000 of each in 128 dimensions. Raises
    ValueError unless n and m exceed k and both have d features.
    """
    k = _validate.whole("k", k)
    x, y = _validate.pair(x.detach() if isinstance(x, Tensor) else x, y, least=k + 1)
    x, y = x.flatten(1).double(), y.detach().flatten(1).double().to(x.device)
    centre = y.median(0).values
    x, y = x - centre, y - centre  # squared distances come from a matrix product, most precise near the origin
    reach_x, reach_y = _squared_reach(x, k), _squared_reach(y, k)
    inside, reached = 0, torch.zeros(len(y), dtype=torch.bool, device=x.device)
    for part, reach in zip(x.split(_CHUNK), reach_x.split(_CHUNK), strict=True):
        apart = _squared_distances(part, y)
        inside += int((apart <= reach_y).any(1).sum())
        reached |= (apart <= reach.unsqueeze(1)).any(0)
    return PrecisionRecall(inside / len(x), float(reached.double().mean()))


_CHUNK = 500  # rows of a distance matrix in memory at once


def _squared_distances(x: Tensor, y: Tensor, slack: float = -1e-12) -> Tensor:
    """|x_i - y_j|^2, (n, m), plus `slack` times |x_i|^2 + |y_j|^2. The product's rounding errors are below that share,
    which is of each pair's own size, so that one far sample loosens no other's neighbourhood."""
    sizes = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return torch.addmm((1 + slack) * sizes, x, y.T, alpha=-2)


def _squared_reach(x: Tensor, k: int) -> Tensor:
    """The squared distance from each point to its k-th nearest neighbour, itself not counted, (n,)."""
    reach = []
    for start in range(0, len(x), _CHUNK):
        apart = _squared_distances(x[start : start + _CHUNK], x, slack=1e-12)  # a ball holds its own border
        row = torch.arange(len(apart), device=x.device)
        apart[row, start + row] = math.inf
        reach.append(apart.topk(k, largest=False).values[:, -1])
    return torch.cat(reach).clamp(min=0)

