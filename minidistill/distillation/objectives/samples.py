"""Samples alone: the student's samples drift towards real ones and away from each other, and the student follows.

No network but the student is trained. With a Gaussian kernel the field is a difference of two denoisers in closed form,

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

__all__ = ["Drifting", "drift", "mean_near", "squared_distances"]


@torch.no_grad()
def drift(
    x: Tensor, real: Tensor, widths: Sequence[float], label: Tensor | None = None, real_label: Tensor | None = None
) -> Tensor:
    """Where samples x (n, d) move, given real ones (m, d): the sum over kernel widths of V, each brought to a root mean
    square of 1 so that no width drowns the others (Deng 2026), (n, d). A sample leaves itself out of D_q.

    With labels (n,) and (m,) each class drifts by itself; a sample whose class has no real one, or no other of the
    student's, stays.
    """
    to_real, to_fake = squared_distances(x, real), squared_distances(x, x).fill_diagonal_(torch.inf)
    if label is not None and real_label is not None:
        to_real = to_real.masked_fill(label[:, None] != real_label, torch.inf)
        to_fake = to_fake.masked_fill(label[:, None] != label, torch.inf)
    moves = (to_real.isfinite().any(1) & to_fake.isfinite().any(1))[:, None]
    total = torch.zeros_like(x)
    for width in widths:
        field = mean_near(to_real, real, width) - mean_near(to_fake, x, width)
        field = torch.where(moves, field, 0)
        total += field / field.square().mean().sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    return total


def mean_near(squared: Tensor, points: Tensor, width: float) -> Tensor:
    """The mean of points (m, d) weighted by a Gaussian kernel, of squared distances (n, m) to them, (n, d): the
    denoiser of their empirical law at noise level `width`."""
    return (squared / (-2 * width**2)).softmax(1) @ points


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2, (n, m), from the differences themselves: far from the origin no digits are lost."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_()


@dataclass(frozen=True)
class Drifting(Terms):
    """|x - sg(x + step V(x))|^2 (Deng 2026, arXiv 2602.04770), with a Gaussian kernel.

    widths: of the kernel, in standard deviations of the data, in the plane: narrow ones shape a mode, wide ones move
        mass between modes. In d dimensions samples are sqrt(d / 2) times as far apart, and the kernel as much wider;
        without that it would see the nearest sample only.
    step: how far a sample is moved, in standard deviations of the data, where the field has its mean size.
    features_at: the samples' features drift too, as a second term: what a trained teacher sees in them at this noise
        level, in standard deviations of the data. None for the samples alone.
    """

    widths: tuple[float, ...] = (0.07, 0.2, 0.7)
    step: float = 1.0
    features_at: float | None = None
    learning_rate: float = 3e-3
    needs_real = True

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.real is not None
        x, real = (values.flatten(1) / batch.sigma_data for values in (batch.x0, batch.real))
        terms = {"drifting": self._pull(x, real, batch)}
        if self.features_at is not None:
            seen, of_real = self._features(batch)
            terms["features"] = self._pull(seen, of_real, batch) * (x.shape[1] / seen.shape[1])
        return terms

    def _pull(self, x: Tensor, real: Tensor, batch: Batch) -> Tensor:
        """|x - sg(x + step V(x))|^2, (n,)."""
        widths = [width * (x.shape[1] / 2) ** 0.5 for width in self.widths]
        wanted = (x + self.step * drift(x, real, widths, batch.label, batch.real_label)).detach()
        return per_sample((x - wanted).square())

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
