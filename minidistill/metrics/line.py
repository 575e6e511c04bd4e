"""Mixtures on the line, where the distribution function and its inverse are known, and so is every flow."""

from __future__ import annotations

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.distributions import GaussianMixture

__all__ = ["cdf", "quantile"]


def cdf(target: GaussianMixture, x: Tensor) -> Tensor:
    """The distribution function of a mixture on the line at x (n, 1): (n,). ValueError for another mixture or x."""
    _on_the_line(target)
    _validate.samples("x", x, (1,))
    return (target.weights * torch.special.ndtr((x - target.means.T) / target.variances.T.sqrt())).sum(1)


def quantile(target: GaussianMixture, share: Tensor) -> Tensor:
    """The points x (n, 1) at which the distribution function of a mixture on the line is `share` (n,), in (0, 1): by
    bisection, to rounding. A flow on a line keeps the order of points, so that it is x -> quantile(cdf(x)). ValueError
    for another mixture, TypeError for a share that is no tensor of numbers."""
    _on_the_line(target)
    share = _validate.tensor("share", share).to(target.means)
    reach = 40 * target.variances.sqrt()
    low = (target.means - reach).min().expand(len(share), 1)
    high = (target.means + reach).max().expand(len(share), 1)
    for _ in range(80):
        middle = (low + high) / 2
        below = (cdf(target, middle) < share).unsqueeze(1)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def _on_the_line(target: GaussianMixture) -> None:
    if target.shape != (1,):
        raise ValueError(f"target has samples of shape {target.shape}; wanted a mixture on the line, (1,)")
