"""Distances between the empirical laws of the student's samples and of real ones, each as the particle rule that
descends it.

Of a distance D that averages over pairs of samples, or transports one set to the other, the gradient at a sample x_i is
a pull to the real ones and a push off the others (`samples.py`), V_i = -(n / 2) dD / dx_i:

    MMD, kernel phi(|x - y|^2 / h^2)      A_ij = -2 phi' / (m h^2),      B_ij = -2 phi' / ((n - 1) h^2)
    energy, |x - y|^a                     A_ij = a |x_i - y_j|^(a - 2) / m,   B_ij likewise, over n - 1
    Sinkhorn divergence, |x - y|^2        A_ij = n P_ij,    B_ij = n P'_ij,   the plans to the real ones and to itself

With classes each is a distance of joint laws: samples of different classes do not see each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.distillation.objectives.samples import Particles, in_the_plane, to_both
from minidistill.transport import rational_quadratic, sinkhorn_plan

__all__ = [
    "EnergyScore", "MeanDiscrepancy", "SinkhornDivergence", "classes", "energy_pull", "kernel_pull", "pulled",
    "sinkhorn_pull",
]


def pulled(
    weight: Callable[[Tensor], Tensor], x: Tensor, real: Tensor, label: Tensor | None = None,
    real_label: Tensor | None = None,
) -> Tensor:
    """The mean of weight(|x - y|^2) (y - x) over the real y less that over the other x, (n, d). Of a sample whose class
    has no real one, or no other of the student's, 0."""
    fields, moves = [], torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
    for squared, y in zip(to_both(x, real, label, real_label), (real, x), strict=True):
        there = squared.isfinite()
        moves = there.any(1, keepdim=True) & moves
        weights = torch.where(there, weight(squared), 0) / there.sum(1, keepdim=True).clamp(min=1)
        fields.append(weights @ y - weights.sum(1, keepdim=True) * x)
    return torch.where(moves, fields[0] - fields[1], 0)


# ------------------------------------------------- means over pairs

def kernel_pull(
    x: Tensor, real: Tensor, widths: tuple[float, ...], alpha: float = 1.0, label: Tensor | None = None,
    real_label: Tensor | None = None,
) -> Tensor:
    """V of the unbiased MMD^2 with the mean of rational quadratic kernels of several widths, in units of x, (n, d)."""
    slope = rational_quadratic(alpha).slope

    def weight(squared: Tensor) -> Tensor:
        each = [-2 * slope(squared / width**2) / width**2 for width in widths]
        return torch.stack(each).mean(0)

    return pulled(weight, x, real, label, real_label)


@dataclass(frozen=True)
class MeanDiscrepancy(Particles):
    """MMD^2 between samples, unbiased, with rational quadratic kernels (Gretton 2012; as a generator's loss Li 2015).

    widths: in standard deviations of the data, in the plane (`in_the_plane`): a kernel sees what is some widths away,
        and its tails of power 2 alpha what is farther off.
    """

    widths: tuple[float, ...] = (0.07, 0.2, 0.7)
    alpha: float = 1.0
    learning_rate: float = 3e-3

    def velocity(self, x: Tensor, real: Tensor, label: Tensor | None, real_label: Tensor | None) -> Tensor:
        widths = tuple(width * in_the_plane(x) for width in self.widths)
        return kernel_pull(x, real, widths, self.alpha, label, real_label)


def energy_pull(
    x: Tensor, real: Tensor, alpha: float = 1.0, label: Tensor | None = None, real_label: Tensor | None = None
) -> Tensor:
    """V of 2 E|x - y|^alpha - E|x - x'|^alpha, (n, d); at alpha = 1 the mean of unit vectors to the real samples less
    that to the others."""
    def weight(squared: Tensor) -> Tensor:
        return torch.where(squared > 0, alpha * squared.clamp(min=torch.finfo(x.dtype).tiny) ** (alpha / 2 - 1), 0)

    return pulled(weight, x, real, label, real_label)


@dataclass(frozen=True)
class EnergyScore(Particles):
    """2 E|x - y|^alpha - E|x - x'|^alpha: the energy score of Shao 2025 (arXiv 2505.07812) for a whole law, over all
    pairs of a batch; up to a constant the energy distance.

    alpha: below 2 the score is strictly proper: least for equal laws alone. At 2 it is 2 |E x - E y|^2 and a constant,
        which any law of the same mean has: a control, to be seen fail.
    """

    alpha: float = 1.0
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        if not 0 < _validate.number("alpha", self.alpha) <= 2:
            raise ValueError(f"alpha={self.alpha!r}: wanted a number above 0 and at most 2")

    def velocity(self, x: Tensor, real: Tensor, label: Tensor | None, real_label: Tensor | None) -> Tensor:
        return energy_pull(x, real, self.alpha, label, real_label)


# ------------------------------------------------- transport

def sinkhorn_pull(
    x: Tensor, real: Tensor, epsilon: float, label: Tensor | None = None, real_label: Tensor | None = None,
    tolerance: float = 0.03, max_iterations: int = 200,
) -> Tensor:
    """V of the debiased Sinkhorn divergence with cost |x - y|^2, (n, d): the mean of where a sample's mass goes among
    the real ones less that among the student's, by plans with both marginals.

    epsilon: in units of |x|^2. tolerance: of the plan's columns, relative to even ones; its rows are always exact, so
    that an unfinished plan still pulls as much as it pushes. Of a sample whose class has no real one, 0.
    """
    def transported(x: Tensor, y: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "sinkhorn: marginal error", RuntimeWarning)
            plan = sinkhorn_plan(x, y, epsilon, tolerance=tolerance / len(y) ** 0.5, max_iterations=max_iterations)
        return len(x) * plan @ y

    velocity = torch.zeros_like(x)
    for mine, theirs in classes(x, real, label, real_label):
        velocity[mine] = transported(x[mine], real[theirs]) - transported(x[mine], x[mine])
    return velocity


def classes(
    x: Tensor, real: Tensor, label: Tensor | None, real_label: Tensor | None
) -> Iterator[tuple[Tensor | slice, Tensor | slice]]:
    """Which samples (n,) and which real ones (m,) each class has, where it has both; all of them without classes."""
    if label is None or real_label is None:
        yield slice(None), slice(None)
        return
    for one in label.unique():
        if bool((real_label == one).any()):
            yield label == one, real_label == one


@dataclass(frozen=True)
class SinkhornDivergence(Particles):
    """The debiased entropic transport divergence of samples (Genevay 2018; two-sided drifting, arXiv 2603.12366).

    It is 0 for equal laws alone, which one-sided rows of weights do not have (`Drifting`): every real sample is to be
    reached. epsilon: of the plans, in variances of the data, in the plane.
    """

    epsilon: float = 0.02
    learning_rate: float = 3e-3

    def velocity(self, x: Tensor, real: Tensor, label: Tensor | None, real_label: Tensor | None) -> Tensor:
        return sinkhorn_pull(x, real, self.epsilon * in_the_plane(x) ** 2, label, real_label)
