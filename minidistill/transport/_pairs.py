"""Sums over pairs of samples in bounded memory, and distances between them without lost digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minidistill import _validate

__all__ = [
    "ENTRIES", "SHOWS", "by_rows", "centred", "distances", "farthest", "in_units", "largest", "mean_of_rows", "medians",
    "pair_mean", "probabilities", "squared_distances",
]

ENTRIES = 2**22  # of a matrix of pairs in memory at once, unless `chunk` says how many rows
SHOWS = 1e-4  # rounding errors above this, in an exponent or in a squared distance over bandwidths, are avoided


def largest(x: Tensor) -> float:
    """The largest absolute value, and 1 if that is 0."""
    return float(x.detach().abs().max()) or 1.0


def medians(x: Tensor) -> Tensor:
    """The median of each coordinate: products of centred numbers lose fewer digits, and no outlier moves it far."""
    return x.detach().median(0).values


def farthest(*samples: Tensor) -> float:
    """The largest distance from the origin of any of the flat samples (n, d)."""
    return max(float(torch.linalg.vector_norm(each.detach(), dim=1).max()) for each in samples)


def centred(*samples: Tensor) -> list[Tensor]:
    """Flattened, and about their common median where that is far off for their spread: what all have in common cancels
    in every difference of two, and would take their digits."""
    flat = [each.flatten(1) for each in samples]
    pooled = torch.cat(flat)
    centre = medians(pooled)
    spread = float((pooled.detach() - centre).abs().median())
    return [each - centre for each in flat] if float(centre.abs().max()) > 16 * spread else flat


def in_units(h: float, *samples: Tensor) -> list[Tensor]:
    """Flattened, centred and divided by the bandwidth; cut at 1e15, where every kernel has long vanished."""
    flat = [each.flatten(1) for each in samples]
    centre = medians(torch.cat(flat))
    return [((each - centre) / h).clamp(-1e15, 1e15) for each in flat]


def probabilities(name: str, weights: Tensor | None, x: Tensor) -> Tensor:
    """Weights of the samples x scaled to sum to 1, (n,); equal ones for None. ValueError for a wrong shape or sign."""
    if weights is None:
        return x.new_full((len(x),), 1 / len(x))
    if not isinstance(weights, Tensor) or weights.shape != x.shape[:1]:
        what = tuple(weights.shape) if isinstance(weights, Tensor) else repr(weights)
        raise ValueError(f"{name} is {what}; wanted a tensor ({len(x)},), a weight a sample")
    _validate.finite(name, weights)
    if (weights < 0).any() or not (weights > 0).any():
        raise ValueError(f"{name}: wanted numbers >= 0, not all 0")
    return (weights / weights.sum()).to(x)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2, (n, m), from one matrix product; from differences where its rounding errors, about eps |x_i|^2,
    would show against 1. Those pairs are far from the origin both, for a far and a near one are far apart too."""
    squares_x, squares_y = x.square().sum(1), y.square().sum(1)
    limit = SHOWS / (2 * torch.finfo(x.dtype).eps)
    far_x, far_y = ((squares > limit).nonzero()[:, 0] for squares in (squares_x, squares_y))
    if len(far_x) == len(x) and len(far_y) == len(y):
        return distances(x, y).square()
    out = torch.addmm(squares_x.unsqueeze(1) + squares_y, x, y.T, alpha=-2).clamp(min=0)
    if len(far_x) and len(far_y):
        exact = distances(x[far_x], y[far_y]).square()
        out = out.index_put((far_x.unsqueeze(1), far_y), exact)
    return out


def distances(x: Tensor, y: Tensor, alpha: float = 1.0) -> Tensor:
    """|x_i - y_j|^alpha from differences, exact for near pairs too; the gradient at distance 0 is 0."""
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    if alpha == 1:
        return distance
    apart = distance > 0
    return torch.where(apart, torch.where(apart, distance, 1.0) ** alpha, 0.0)


def pair_mean(
    x: Tensor, y: Tensor, f: Callable[[Tensor, Tensor], Tensor], chunk: int | None, others: bool = False
) -> Tensor:
    """The mean of f over pairs; `others` leaves the diagonal out."""
    return mean_of_rows(lambda rows: f(x[rows], y), len(x), chunk, others, len(y))


def mean_of_rows(
    f: Callable[[slice], Tensor], n: int, chunk: int | None, others: bool, width: int | None = None
) -> Tensor:
    """The mean of a matrix (n, width) whose rows f gives; `others` leaves the diagonal out."""
    width = n if width is None else width

    def total(rows: slice) -> Tensor:
        block = f(rows)
        return block.sum() - block.diagonal(rows.start).sum() if others else block.sum()

    return torch.stack(by_rows(total, n, width, chunk)).sum() / (n * (width - others))


def by_rows(f: Callable[[slice], Tensor], n: int, width: int, chunk: int | None = None) -> list[Tensor]:
    """f of each block of rows, at most `chunk` rows or ENTRIES entries. Several blocks are computed again in the
    backward pass, so that one block's intermediate values are in memory at a time."""
    chunk = None if chunk is None else _validate.whole("chunk", chunk)
    rows = chunk or max(1, ENTRIES // width)
    parts = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
    if len(parts) == 1:
        return [f(parts[0])]
    return [checkpoint(f, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
