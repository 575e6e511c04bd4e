"""Progressive distillation: two steps become one, again and again, until one is left (Salimans & Ho 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill.distillation.batch import Batch, column, per_sample
from minidistill.distillation.objective import Terms
from minidistill.distillation.settings import Settings
from minidistill.networks.jumps import TOP, angles, jump

__all__ = ["Progressive"]


@dataclass(frozen=True)
class Progressive(Terms):
    """The aim of one jump fitted to where two half jumps land, in stages; both first by the teacher's DDIM, then by the
    student as it was when the stage began (Salimans & Ho 2022, algorithm 2).

    The student of the first stage walks in `first` steps, the next one's in half as many, the last one's in one. It is
    told where each jump goes, so that a later stage need not unlearn an earlier one: it can be sampled in 1, 2, 4, ...
    steps. The error of the aim counts max(SNR, 1) times, the paper's truncated weight. Levels are evenly spaced in the
    angle arctan(sigma / sigma_data), which is the paper's cosine schedule.

    sigma_init: where sampling begins, in standard deviations of the data.
    first: a power of two. inner: DDIM steps of the teacher in each half jump of the first stage; 1 is the paper's.
    """

    first: int = 32
    inner: int = 4
    needs_real = True
    needs_samples = False
    needs_uniform = True
    sigma_init: float = TOP
    route = "jump"

    @property
    def needs_snapshots(self) -> int:
        return self.first.bit_length()  # stages: of first, first / 2, ..., 1 steps

    def stage(self, progress: float) -> int:
        return min(int(progress * self.needs_snapshots), self.needs_snapshots - 1)

    def noise_levels(self, n: int, settings: Settings, progress: float, generator: torch.Generator) -> Tensor:
        """Where each sample's jump begins: any level of the stage's grid, (n,)."""
        steps = self.first >> self.stage(progress)
        levels = torch.tensor(angles(steps, self.sigma_init), device=generator.device) * settings.sigma_data
        return levels[torch.randint(steps, (n,), generator=generator, device=generator.device)]

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.real is not None
        assert batch.student is not None
        sigma, label, stage = batch.sigma, batch.real_label, self.stage(batch.progress)
        x = batch.real + column(sigma, batch.real) * batch.noise
        # The half way and the end in equal steps of the angle, the end exactly 0 where it is the last.
        angle, step = (sigma / batch.sigma_data).atan(), math.atan(self.sigma_init) / (self.first >> stage)
        half, end = (batch.sigma_data * (angle - share * step).clamp(min=0).tan() for share in (0.5, 1.0))
        end = torch.where(end < 1e-4 * half, 0.0, end)
        with torch.no_grad():
            landed = x
            for a, b in ((sigma, half), (half, end)):
                landed = self._half(batch, landed, a, b, stage)
            share = column(end / sigma, x)
            wanted = (landed - share * x) / (1 - share)
        error = per_sample((batch.student(x, sigma, label, to=end, aim=True) - wanted).square())
        return {"progressive": error * (1 / sigma.square()).clamp(min=batch.sigma_data**-2)}

    def _half(self, batch: Batch, x: Tensor, a: Tensor, b: Tensor, stage: int) -> Tensor:
        """x at level a taken to b: by the last stage's student, in the first stage by the teacher's DDIM."""
        if stage:
            assert batch.target is not None
            return batch.target(x, a, batch.real_label, to=b)
        top, bottom = ((level / batch.sigma_data).atan() for level in (a, b))
        for k in range(self.inner):
            here, there = (batch.sigma_data * torch.lerp(top, bottom, (k + i) / self.inner).tan() for i in (0, 1))
            there = torch.where(there < 1e-4 * here, 0.0, there)
            x = jump(lambda x, sigma, label, to: batch.teacher(x, sigma, label), x, here, there, batch.real_label)
        return x
