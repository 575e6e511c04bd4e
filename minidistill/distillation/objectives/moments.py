"""Inductive moment matching: a jump from t to s, and one from a little below t, are to make the same law at s."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill.distillation.batch import Batch, column
from minidistill.distillation.objective import Terms
from minidistill.distillation.settings import Settings
from minidistill.networks.jumps import TOP

__all__ = ["MomentMatching", "laplace_mmd"]


@dataclass(frozen=True)
class MomentMatching(Terms):
    """MMD^2 between J(x_t, t, s) and sg J(x_r, r, s), in groups of one (s, r, t), s <= r < t (Zhou 2025: IMM).

    x_r has the noise of x_t, less of it. As in consistency what is known at the bottom climbs up, where r = s the jump
    is no jump and x_r is real; but it is laws that are compared, and in groups of one sample it is consistency again.

    group: samples that share their levels; the largest common divisor with what is computed at once.
    steps: r lies 1 / steps of the quarter circle below t, in the angle arctan(level / sigma_data), and not below s.
    b: small levels count less, by sigmoid(b + 2 ln t); the paper's weight, and its 5.
    With classes only samples of one class are compared.
    """

    group: int = 16
    steps: int = 32
    b: float = 5.0
    needs_real = True
    needs_samples = False
    needs_uniform = True
    sigma_init: float = TOP
    route = "jump"

    def noise_levels(self, n: int, settings: Settings, progress: float, generator: torch.Generator) -> Tensor:
        """t of each sample, alike in each group: (n,), of even angles, a twentieth of them where sampling begins."""
        size = math.gcd(n, self.group)
        u = torch.rand(n // size, generator=generator, device=generator.device)
        angle = math.atan(self.sigma_init) * (1.05 * u).clamp(1e-3, 1)
        return settings.sigma_data * angle.tan().repeat_interleave(size)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.real is not None
        assert batch.student is not None
        size = math.gcd(len(batch.sigma), self.group)
        t, r, s = (level.repeat_interleave(size) for level in self.levels(batch, size))
        upper, lower = (batch.real + column(level, batch.real) * batch.noise for level in (t, r))
        label = batch.real_label
        jumped = batch.student(upper, t, label, to=s)
        with torch.no_grad():
            wanted = batch.student(lower, r, label, to=s)
            wanted = torch.where(column(r > s, wanted), wanted, lower)
        # Between samples of one level the jump's network differs by this much times its output.
        reach = (t - s) / (1 + (t / batch.sigma_data).square()).sqrt()
        made, aims = ((x.flatten(1) / reach[:, None]).unflatten(0, (-1, size)) for x in (jumped, wanted))
        alike = None if label is None else label.view(-1, size)
        distance = laplace_mmd(made, aims, alike).repeat_interleave(size)
        return {"moments": self.weight(t / batch.sigma_data) * distance}

    def levels(self, batch: Batch, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """(t, r, s) of each group, in data units: s anywhere below t, evenly in its angle."""
        assert batch.uniform is not None
        t = (batch.sigma[::size] / batch.sigma_data).atan()
        s = t * batch.uniform[::size] * (1 - 1e-3)
        r = torch.maximum(s, t - math.pi / 2 / self.steps)
        return batch.sigma[::size], batch.sigma_data * r.tan(), batch.sigma_data * s.tan()

    def weight(self, t: Tensor) -> Tensor:
        """The paper's, for even angles: sigmoid(b + 2 ln t) (-d ln SNR / 2 d angle) alpha, alpha = cos."""
        return (self.b + 2 * t.log()).sigmoid() * (1 + t.square()).sqrt() / t


def laplace_mmd(x: Tensor, y: Tensor, label: Tensor | None = None) -> Tensor:
    """MMD^2 of each group, x and y (g, m, d) -> (g,), all pairs counted, with the kernel exp(-|x - y| / d) between
    samples of one class, label (g, m)."""
    def mean(a: Tensor, b: Tensor) -> Tensor:
        kernel = (-torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[2]).exp()
        if label is not None:
            kernel = torch.where(label[:, :, None] == label[:, None], kernel, 0)
        return kernel.mean((1, 2))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)
