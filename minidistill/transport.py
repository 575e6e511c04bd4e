"""Distances between samples that need no density and no score; all differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from minidistill import _validate


def wasserstein_1d(x: Tensor, y: Tensor, p: float = 2.0) -> Tensor:
    """W_p between samples on the line, along the first axis: x (n, ...), y (m, ...) -> (...).

    Sorted samples are the quantile functions; for n != m the two step functions are compared exactly.
    """
    _validate.positive("p", p)
    x, y = x.sort(0).values, y.sort(0).values
    n, m = len(x), len(y)
    if n == m:
        return (x - y).abs().pow(p).mean(0) ** (1 / p)
    # Both quantile functions are constant between consecutive multiples of 1/n and 1/m.
    cuts = torch.cat([torch.arange(1, n + 1, device=x.device) * m, torch.arange(1, m + 1, device=x.device) * n])
    cuts = cuts.unique()  # in units of 1 / (n m), sorted
    width = torch.diff(cuts, prepend=cuts.new_zeros(1)).to(x) / (n * m)
    gap = x[(cuts - 1) // m] - y[(cuts - 1) // n]
    return torch.tensordot(width, gap.abs().pow(p), dims=1) ** (1 / p)


def sliced_wasserstein(
    x: Tensor, y: Tensor, n_projections: int = 128, generator: torch.Generator | None = None, p: float = 2.0
) -> Tensor:
    """(mean over random directions of W_p^p of the projections)^(1/p), a scalar (Bonneel 2015).

    x (n, *shape) and y (m, *shape). The same generator state gives the same directions.
    """
    _validate.samples("x", x)
    _validate.samples("y", y, tuple(x.shape[1:]))
    _validate.whole("n_projections", n_projections)
    x, y = x.flatten(1), y.flatten(1)
    # Drawn where the generator lives, so that one seed means one set of directions on every device.
    home = generator.device if generator is not None else x.device
    directions = torch.randn(x.shape[1], n_projections, generator=generator, device=home).to(x)
    directions = directions / directions.norm(dim=0)
    return wasserstein_1d(x @ directions, y @ directions, p).pow(p).mean() ** (1 / p)
