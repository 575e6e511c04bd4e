"""Samples alone: the student's samples are pulled to real ones and pushed off each other, and the student follows.

No network but the student is trained. There is one particle rule,

    V(x_i) = sum_j A_ij (y_j - x_i) - sum_j B_ij (x_j - x_i),      y_j real, x_j the student's,

and the members differ in the weights. In `distances.py` V is minus the gradient of a distance between the two empirical
laws: so is the loss's. Drifting normalises its weights instead. With a Gaussian kernel its field is a difference of two
denoisers in closed form,

    V(x) = E_p[y k(x, y)] / E_p[k(x, y)] - E_q[y k(x, y)] / E_q[k(x, y)] = D_p(x, sigma) - D_q(x, sigma),

those of the empirical laws of real and of other student samples at noise level sigma, the kernel's width: distribution
matching without a fake network, at points without noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.distillation.batch import Batch, per_sample
from minidistill.distillation.objective import Terms

__all__ = [
    "DRIFTS", "Drifting", "Particles", "drift", "follow", "in_the_plane", "mean_near", "squared_distances", "to_both",
    "two_sided",
]


class Particles(Terms):
    """An objective of one particle rule: `velocity` says where samples move, and the student learns to be there."""

    needs_real = True

    def velocity(self, x: Tensor, real: Tensor, label: Tensor | None, real_label: Tensor | None) -> Tensor:
        """V at samples x (n, d), given real ones (m, d), both in standard deviations of the data, (n, d)."""
        raise NotImplementedError

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.real is not None
        x, real = (values.flatten(1) / batch.sigma_data for values in (batch.x0, batch.real))
        with torch.no_grad():
            velocity = self.velocity(x, real, batch.label, batch.real_label)
        return {"samples": follow(x, velocity)}


def follow(x: Tensor, velocity: Tensor) -> Tensor:
    """|x - sg(x + V)|^2, (n,): where V is minus half of n times a distance's gradient in x, its mean has just that
    gradient."""
    return per_sample((x - (x + velocity).detach()).square())


def in_the_plane(x: Tensor) -> float:
    """sqrt(d / 2): how much farther apart samples (n, d) are than in the plane, and kernels as much wider."""
    return (x.shape[1] / 2) ** 0.5


def to_both(x: Tensor, real: Tensor, label: Tensor | None, real_label: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared distances of samples x (n, d) to real ones (n, m) and to each other (n, n): infinite to itself and, where
    both have classes, to any of another class."""
    to_real, to_fake = squared_distances(x, real), squared_distances(x, x).fill_diagonal_(torch.inf)
    if label is not None and real_label is not None:
        to_real = to_real.masked_fill(label[:, None] != real_label, torch.inf)
        to_fake = to_fake.masked_fill(label[:, None] != label, torch.inf)
    return to_real, to_fake


@torch.no_grad()
def drift(
    x: Tensor, real: Tensor, widths: Sequence[float], label: Tensor | None = None, real_label: Tensor | None = None,
    kernel: str = "gaussian",
) -> Tensor:
    """Where samples x (n, d) move, given real ones (m, d): the sum over kernel widths of V, each brought to a root mean
    square of 1 so that no width drowns the others (Deng 2026), (n, d). A sample leaves itself out of D_q.

    With labels (n,) and (m,) each class drifts by itself; a sample whose class has no real one, or no other of the
    student's, stays.
    """
    to_real, to_fake = to_both(x, real, label, real_label)
    moves = (to_real.isfinite().any(1) & to_fake.isfinite().any(1))[:, None]
    total = torch.zeros_like(x)
    for width in widths:
        field = _validate.choose("kernel", kernel, DRIFTS)(to_real, to_fake, x, real, width)
        field = torch.where(moves, field, 0)
        total += field / field.square().mean().sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    return total


def two_denoisers(to_real: Tensor, to_fake: Tensor, x: Tensor, real: Tensor, width: float) -> Tensor:
    """D_p - D_q at level `width`: rows of Gaussian weights that sum to 1."""
    return mean_near(to_real, real, width) - mean_near(to_fake, x, width)


def two_sided(to_real: Tensor, to_fake: Tensor, x: Tensor, real: Tensor, width: float) -> Tensor:
    """The paper's weights: exp(-|x - y| / width) over the row of all others, real and made, and over the column of all
    that are moved, of both the geometric mean, so that a sample's pull is shared among those near it. Real and made
    ones weigh each other's sum: what pulls is as much as what pushes."""
    logits = torch.cat([to_real, to_fake], 1).sqrt() / -width
    weights = (logits.softmax(1) * logits.softmax(0)).sqrt().nan_to_num()  # NaN where nobody of the class is
    a, b = weights.split([len(real), len(x)], 1)
    return (a * b.sum(1, keepdim=True)) @ real - (b * a.sum(1, keepdim=True)) @ x


#: The fields of drifting, by their kernel.
DRIFTS = {"gaussian": two_denoisers, "laplace": two_sided}


def mean_near(squared: Tensor, points: Tensor, width: float) -> Tensor:
    """The mean of points (m, d) weighted by a Gaussian kernel, of squared distances (n, m) to them, (n, d): the
    denoiser of their empirical law at noise level `width`."""
    return (squared / (-2 * width**2)).softmax(1) @ points


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2, (n, m), from the differences themselves: far from the origin no digits are lost."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_()


@dataclass(frozen=True)
class Drifting(Particles):
    """|x - sg(x + step V(x))|^2 (Deng 2026, arXiv 2602.04770).

    widths: of the kernel, in standard deviations of the data, in the plane: narrow ones shape a mode, wide ones move
        mass between modes. In d dimensions samples are sqrt(d / 2) times as far apart, and the kernel as much wider;
        without that it would see the nearest sample only.
    step: how far a sample is moved, in standard deviations of the data, where the field has its mean size.
    features_at: the samples' features drift too, as a second term: what a trained teacher sees in them at this noise
        level, in standard deviations of the data. None for the samples alone.
    kernel: "gaussian", the difference of two denoisers, or "laplace", the paper's (`two_sided`).
    """

    widths: tuple[float, ...] = (0.07, 0.2, 0.7)
    step: float = 1.0
    features_at: float | None = None
    learning_rate: float = 3e-3
    kernel: str = "gaussian"

    def velocity(self, x: Tensor, real: Tensor, label: Tensor | None, real_label: Tensor | None) -> Tensor:
        widths = [width * in_the_plane(x) for width in self.widths]
        return self.step * drift(x, real, widths, label, real_label, self.kernel)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        terms = {"drifting": super().terms(batch)["samples"]}
        if self.features_at is not None:
            seen, of_real = self._features(batch)
            velocity = self.velocity(seen, of_real, batch.label, batch.real_label)
            terms["features"] = follow(seen, velocity) * (batch.x0[0].numel() / seen.shape[1])
        return terms

    def _features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's features of the student's samples and of the real ones, in the real ones' standard
        deviations, (n, f) each."""
        look = getattr(batch.teacher, "features", None)
        if look is None:
            raise ValueError(f"features_at={self.features_at}: this teacher has no `features(x, sigma, label)`; "
                             "wanted a trained one (`networks.Denoiser`), or None")
        level = _validate.positive("features_at", self.features_at) * batch.sigma_data
        seen = look(batch.x0, level, batch.label).flatten(1)
        with torch.no_grad():
            of_real = look(batch.real, level, batch.real_label).flatten(1)
        return seen / of_real.std(), of_real / of_real.std()
