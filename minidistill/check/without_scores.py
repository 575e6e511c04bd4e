"""Exercises of the notebook 12."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidistill.check import ours
from minidistill.check._core import points, report

__all__ = ["drift", "energy_pull", "ratio_pull"]

#: h(r) of three divergences, plain: what is no ratio they take too, so that the mistake can be told.
_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse KL": torch.ones_like, "forward KL": lambda r: r, "Pearson": lambda r: 2 * r**2,
}


def drift(f: Callable[..., Any]) -> bool:
    """12, exercise 1: f(x, real, width) is the mean of the real samples near each x less that of the other x near it,
    (n, d), weighted by Gaussian kernels of that width."""
    x, real = points(6), points(8, seed=1)

    def mean_near(x: Tensor, y: Tensor, width: float, alone: bool = False, power: int = 2) -> Tensor:
        distance = torch.cdist(x, y) ** power
        if alone:
            distance = distance.fill_diagonal_(torch.inf)
        return (-distance / (2 * width**power)).softmax(1) @ y

    def unnormalised(x: Tensor, real: Tensor, width: float) -> Tensor:
        pull = (-torch.cdist(x, real).square() / (2 * width**2)).exp() @ real
        push = (-torch.cdist(x, x).square() / (2 * width**2)).fill_diagonal_(-torch.inf).exp() @ x
        return pull - push

    return report(1, f, [
        (f"width {width:g}", (x, real, width), ours.drift(x, real, width)) for width in (0.7, 2.0, 10.0)
    ], hints={
        "a sample is no neighbour of its own: leave it out of the push, by an infinite distance on the diagonal":
            lambda x, real, w: mean_near(x, real, w) - mean_near(x, x, w),
        "only the pull: what pushes the samples apart is missing":
            lambda x, real, w: mean_near(x, real, w),
        "only the pull: take off the mean of the *other samples*, not x itself":
            lambda x, real, w: mean_near(x, real, w) - x,
        "the kernel is exp(-|x - y|^2 / (2 width^2)): the 2 is missing":
            lambda x, real, w: mean_near(x, real, w / 2**0.5) - mean_near(x, x, w / 2**0.5, alone=True),
        "the distances are not squared":
            lambda x, real, w: (-torch.cdist(x, real) / (2 * w**2)).softmax(1) @ real
            - (-torch.cdist(x, x).fill_diagonal_(torch.inf) / (2 * w**2)).softmax(1) @ x,
        "a mean has weights that sum to 1: divide each row by its sum (softmax does)": unnormalised,
    })


def energy_pull(f: Callable[..., Any]) -> bool:
    """12, exercise 2: f(x, real) is the mean of the unit vectors from each x to the real samples less that to the other
    x, (n, d)."""
    x, real = points(6), points(8, seed=1)

    def towards(x: Tensor, y: Tensor, unit: bool = True) -> Tensor:
        way = y - x[:, None]
        return way / way.norm(dim=2, keepdim=True).clamp(min=1e-12) if unit else way

    def mistake(unit: bool = True, others: int = 1, push: bool = True, squared: bool = False) -> Callable[..., Tensor]:
        def pull(x: Tensor, real: Tensor) -> Tensor:
            to_real, to_own = towards(x, real, unit), towards(x, x, unit)
            if squared:
                to_real, to_own = (way / (end - x[:, None]).norm(dim=2, keepdim=True).clamp(min=1e-12)
                                   for way, end in ((to_real, real), (to_own, x)))
            return to_real.mean(1) - (to_own.sum(1) / (len(x) - others) if push else 0)

        return pull

    return report(2, f, [
        ("six samples, eight real ones", (x, real), ours.energy_pull(x, real)),
        ("three and two", (x[:3], real[:2]), ours.energy_pull(x[:3], real[:2])),
    ], hints={
        "a sample has only n - 1 others: its own place does not count in the second mean": mistake(others=0),
        "unit vectors: divide each way y - x by its length": mistake(unit=False),
        "divided by the squared length: a unit vector is the way over its length": mistake(squared=True),
        "only the pull: the mean over the other samples comes off": mistake(push=False),
        "sums in place of means": lambda x, real: towards(x, real).sum(1) - towards(x, x).sum(1),
    })


def ratio_pull(f: Callable[..., Any]) -> bool:
    """12, exercise 3: f(log_ratio, x, weight) is h(r) times the gradient of log r at samples x, (n, d); log_ratio is a
    function (n, d) to (n,), `weight` is h, a function of r."""
    x = points(6) / 2

    def log_ratio(x: Tensor) -> Tensor:
        return (x[:, 0] * 1.3).sin() + x.square().sum(1) / 6 - 0.4

    def mistake(h: Callable[[Tensor, Callable[..., Tensor]], Tensor], of: Callable[[Tensor], Tensor] = lambda v: v
                ) -> Callable[..., Tensor]:
        def pull(log_ratio: Any, x: Tensor, weight: Any) -> Tensor:
            x = x.detach().requires_grad_()
            value = log_ratio(x)
            return h(value.detach(), weight)[:, None] * torch.autograd.grad(of(value).sum(), x)[0]

        return pull

    return report(3, f, [
        (name, (log_ratio, x, weight), ours.ratio_pull(log_ratio, x, weight)) for name, weight in _WEIGHTS.items()
    ], hints={
        "the weight is missing: multiply each row by h(r)": mistake(lambda v, h: torch.ones_like(v)),
        "h wants the ratio r, and you give it log r": mistake(lambda v, h: h(v)),
        "that is the gradient of r: of log r it is wanted": mistake(lambda v, h: h(v.exp()), of=torch.exp),
        "h(r) is a number for each sample: it is not to be differentiated, nor to be summed before":
            mistake(lambda v, h: h(v.exp()).mean() * torch.ones_like(v)),
    })
