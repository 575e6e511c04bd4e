"""Flow maps: mean flow, improved mean flow, alpha-flow and Lagrangian self-distillation, one residual for all.

In flow's coordinates z = (1 - t) x0 + t e (data of unit variance, t from 0 to 1) the student's jump from t down to r is
a line, z_r = z - (t - r) u, and u(z, r, t) = (z - aim) / t the mean velocity of the way (`networks.jumps`); on the
diagonal, r = t, it is the velocity v itself, learned by flow matching. What makes u right for r < t is one of two
derivatives of (t - r) u = z_t - z_r: in t along the path (Euler's view; z_r stays),

    u + (t - r) (d/dt) u = v(z, t),         d/dt along dz = v dt,                  mean flow, Geng 2025

or in r (Lagrange's; the point moves on with the velocity where it is),

    u - (t - r) (d/dr) u = v(z_r, r),                                              flow maps, Boffi 2025

and each is the minimum of the squared difference of its two sides. The members differ in what stands for v, in how
the derivative is taken, and in what of it carries a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidistill import _validate
from minidistill._autodiff import jvp
from minidistill.distillation.batch import Batch, column, per_sample
from minidistill.distillation.objective import Terms
from minidistill.distillation.prepare import own_denoiser
from minidistill.distillation.settings import Settings
from minidistill.networks.jumps import TOP
from minidistill.training import parallel

__all__ = ["AlphaFlow", "FlowMap", "ImprovedMeanFlow", "MeanFlow", "mean_velocity"]


def mean_velocity(student: Callable[..., Tensor], sigma_data: float, label: Tensor | None) -> Callable[..., Tensor]:
    """u(z, r, t) of a student (`Batch.student`) in flow's coordinates, z (n, *shape), r and t (n,), t > 0."""
    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        tt = column(t, z)
        sigma, to = (sigma_data * s / (1 - s) for s in (t, r))
        return (z - student(sigma_data * z / (1 - tt), sigma, label, to=to, aim=True) / sigma_data) / tt

    return u


@dataclass(frozen=True)
class MeanFlow(Terms):
    """|u - sg(v - (t - r) du/dt)|^2, adaptively weighted, with the velocity v = e - x0 of the sample (Geng 2025).

    power, floor: of the adaptive weight 1 / (|.|^2 + floor)^power. At power 1, the paper's, the loss is nearly
        constant, whatever is learned: look at the samples instead.
    diagonal: the share of the batch with r = t, where the loss is flow matching; 0.75 in the paper.
    sigma_init: where sampling begins, in standard deviations of the data.
    logit: mean and deviation of the normal law of logit t, of which two are drawn, t the larger; -0.4 and 1 in the
        paper, whose tails hardly reach the ends.
    teacher: the teacher's velocity at z in the place of e - x0, of which it is the mean: the same minimiser, without
        the noise. False for the papers' training from data alone.
    difference: du/dt by a difference over this share of t - r, backwards along v, in the place of forward
        differentiation (`torch.func.jvp`); for networks that cannot be so differentiated.
    """

    power: float = 0.0
    floor: float = 0.01
    diagonal: float = 0.5
    logit: tuple[float, float] = (-0.5, 1.5)
    teacher: bool = True
    difference: float | None = None
    needs_real = True
    needs_samples = False
    needs_uniform = True
    octaves = 4
    sigma_init: float = TOP
    route = "jump"

    def noise_levels(self, n: int, settings: Settings, progress: float, generator: torch.Generator) -> Tensor:
        """The upper level, that of the larger of two times: (n,), in data units."""
        normal = torch.randn(2, n, generator=generator, device=generator.device)
        t = (self.logit[0] + self.logit[1] * normal).sigmoid().amax(0)
        return settings.sigma_data * (t / (1 - t)).clamp(max=self.sigma_init)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        z, r, t, v = self.start(batch)
        u = mean_velocity(batch.student, batch.sigma_data, batch.real_label)  # type: ignore[arg-type]
        frozen = mean_velocity(batch.frozen or batch.student, batch.sigma_data, batch.real_label)  # type: ignore
        with torch.no_grad():
            rate = self.rate(frozen, z, r, t, self.along(frozen, z, t, v, batch), batch)
            wanted = v - column(t - r, z) * rate
        return {"flow": self.weighted(u(z, r, t) - wanted)}

    def start(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(z, r, t, v): noised real samples in flow's coordinates, where the jump goes, and the velocity to learn."""
        assert batch.real is not None
        assert batch.uniform is not None
        t = batch.sigma / (batch.sigma_data + batch.sigma)
        r = t * self.to_where(batch.uniform, t)
        x0, tt = batch.real / batch.sigma_data, column(t, batch.real)
        z = (1 - tt) * x0 + tt * batch.noise
        v = batch.noise - x0
        if self.teacher:
            v = _velocity(batch.teacher, batch, z, t)
        return z, r, t, v

    def to_where(self, uniform: Tensor, t: Tensor) -> Tensor:
        """r / t of each sample: 1 for a share `diagonal`, else r is the lesser of two draws with the larger at t."""
        share = ((uniform - self.diagonal) / (1 - self.diagonal)).clamp(min=0) if self.diagonal < 1 else 0 * uniform
        # Given the larger of two draws the other is a draw below it: its quantile is uniform below that of t.
        mean, std = self.logit
        below = torch.special.ndtr((torch.logit(t) - mean) / std) * share
        r = (mean + std * torch.special.ndtri(below.clamp(min=1e-7))).sigmoid()
        return torch.where(uniform < self.diagonal, 1.0, (r / t).clamp(max=1.0))

    def along(self, frozen: Callable[..., Tensor], z: Tensor, t: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """What dz/dt is in the derivative along the path."""
        return v

    def rate(
        self, frozen: Callable[..., Tensor], z: Tensor, r: Tensor, t: Tensor, v: Tensor, batch: Batch
    ) -> Tensor:
        """du/dt along dz/dt = v, r held."""
        if self.difference is None:
            return jvp(frozen, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))[1]
        return backward_difference(frozen, z, r, t, v, self.difference)

    def weighted(self, residual: Tensor) -> Tensor:
        """|residual|^2 / sg(|residual|^2 + floor)^power, (n,)."""
        square = per_sample(residual.square())
        return square / (square.detach() + self.floor) ** self.power


@dataclass(frozen=True)
class ImprovedMeanFlow(MeanFlow):
    """Mean flow whose derivative is along the student's own velocity u(z, t, t) (Geng 2025b, arXiv 2512.02012).

    Written as there, V = u + (t - r) sg(du/dt) is fitted to e - x0. A prediction of a sample's velocity must not look
    at the sample, so the path that the derivative follows is the student's. Where that is the true velocity the target
    is mean flow's in the mean, without the noise that e - x0 brings into the derivative.

    auxiliary: that velocity from a network of its own, trained beside the student to denoise the real samples, in the
        place of the student's diagonal. The paper's is a second head of the student's network; neither is asked once
        the student is trained.
    """

    auxiliary: bool = False
    needs_fake = False
    critic_steps = 1

    @property
    def needs_student_real(self) -> bool:
        return self.auxiliary

    def before_training(self, run: Any, settings: Settings) -> None:
        if self.auxiliary:
            run.own = own_denoiser(run, settings)

    def critic_loss(self, batch: Batch) -> Tensor:
        assert batch.own is not None
        assert batch.real is not None
        x = batch.real + column(batch.sigma, batch.real) * batch.noise
        error = per_sample((batch.own(x, batch.sigma, batch.real_label) - batch.real).square())
        return error * (1 / batch.sigma.square() + 1 / batch.sigma_data**2)

    def along(self, frozen: Callable[..., Tensor], z: Tensor, t: Tensor, v: Tensor, batch: Batch) -> Tensor:
        return _velocity(batch.own, batch, z, t) if self.auxiliary else frozen(z, t, t)


@dataclass(frozen=True)
class AlphaFlow(MeanFlow):
    """From flow matching along trajectories to mean flow by one number (Zhang 2025, arXiv 2510.20771).

    u(z, r, t) is fitted to alpha v + (1 - alpha) u(z_s, r, s), s = t - alpha (t - r), z_s = z - (t - s) v: for alpha =
    1 that is v itself, for 1/2 the two halves of a shortcut model, and in the limit 0 mean flow. Written as a residual
    of mean flow's size (the paper weights by alpha instead), it is mean flow with a backward difference in the place of
    the derivative,

        u - (v - (1 - alpha) (t - r) (u(z, r, t) - u(z_s, r, s)) / (t - s)),

    alpha falls from 1 to 0 between the shares `fall` of the run, along a sigmoid, and counts as 0 below `least`.
    """

    fall: tuple[float, float] = (0.0, 0.7)
    least: float = 0.005

    def alpha(self, progress: float) -> float:
        begin, end = self.fall
        x = (progress - (begin + end) / 2) / (end - begin)  # from -1/2 to 1/2
        value = 1 / (1 + float(torch.tensor(12.0 * x).exp()))
        return 0.0 if value < self.least else 1.0 if value > 1 - self.least else value

    def rate(
        self, frozen: Callable[..., Tensor], z: Tensor, r: Tensor, t: Tensor, v: Tensor, batch: Batch
    ) -> Tensor:
        alpha = self.alpha(batch.progress)
        if alpha == 0:
            return super().rate(frozen, z, r, t, v, batch)
        if alpha == 1:
            return torch.zeros_like(z)
        return (1 - alpha) * backward_difference(frozen, z, r, t, v, alpha)


@dataclass(frozen=True)
class FlowMap(MeanFlow):
    """|u - (t - r) du/dr - sg(v(z_r, r))|^2, Lagrangian self-distillation (Boffi 2025, arXiv 2505.18825).

    The derivative is in where the jump goes and carries a gradient; v is the teacher's velocity (Lagrangian map
    distillation) or, without `teacher`, the student's own, u(z_r, r, r). On the diagonal the loss is flow matching.

    Raises RuntimeError with several processes, which do not add up gradients through a forward derivative: there it
    wants `difference`.
    """

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        z, r, t, v = self.start(batch)
        u = mean_velocity(batch.student, batch.sigma_data, batch.real_label)  # type: ignore[arg-type]
        frozen = mean_velocity(batch.frozen or batch.student, batch.sigma_data, batch.real_label)  # type: ignore
        span = column(t - r, z)
        mean, rate = self.in_where(u, z, r, t)
        with torch.no_grad():
            there, low = z - span * mean, r.clamp(min=1e-3)  # a velocity is not asked at 0
            v_there = _velocity(batch.teacher, batch, there, low) if self.teacher else frozen(there, low, low)
            wanted = torch.where(span > 0, v_there, v)
        return {"flow": self.weighted(mean - span * rate - wanted)}

    def in_where(self, u: Callable[..., Tensor], z: Tensor, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(u, du/dr), with their graphs."""
        if self.difference is not None:
            mean, step = u(z, r, t), self.difference * (t - r)
            return mean, (u(z, r + step, t) - mean) / column(step, z).clamp(min=torch.finfo(z.dtype).tiny)
        if parallel.world() > 1:
            raise RuntimeError("flow_map's forward derivative carries a gradient, which several processes do not add "
                               "up; wanted FlowMap(difference=0.01)")
        return jvp(lambda r: u(z, r, t), (r,), (torch.ones_like(r),))


def backward_difference(
    u: Callable[..., Tensor], z: Tensor, r: Tensor, t: Tensor, v: Tensor, share: float
) -> Tensor:
    """(u(z, r, t) - u(z - h v, r, t - h)) / h for h = share (t - r); 0 where that is 0."""
    share = _validate.number("difference", share, 0, 1)
    h = share * (t - r)
    change = u(z, r, t) - u(z - column(h, z) * v, r, t - h)
    return change / column(h, z).clamp(min=torch.finfo(z.dtype).tiny)


def _velocity(denoiser: Callable[..., Tensor], batch: Batch, z: Tensor, t: Tensor) -> Tensor:
    """(z - D) / t in flow's coordinates, without gradient."""
    tt, scale = column(t, z), batch.sigma_data
    with torch.no_grad():
        return (z - denoiser(scale * z / (1 - tt), scale * t / (1 - t), batch.real_label) / scale) / tt
