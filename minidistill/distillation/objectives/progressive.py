"""Progressive distillation: two steps become one, again and again, until one is left (Salimans & Ho 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minidistill.distillation.batch import Batch, column, per_sample
from minidistill.distillation.objective import Terms
from minidistill.distillation.settings import Settings
from minidistill.networks.jumps import TOP, jump

__all__ = ["Progressive"]


@dataclass(frozen=True)
class Progressive(Terms):
    """The aim of one jump fitted to where two half jumps land, in stages; both first by the teacher's DDIM, then by the
    student as it was when the stage began (Salimans & Ho 2022, algorithm 2).

    The student of the first stage walks in `first` steps, the next one's in half as many, the last one's in one. It is
    told where each jump goes, and part of every batch repeats the jumps of earlier stages: so it can be sampled in 1,
    2, 4, ... steps. The error of the aim counts max(SNR, 1) times, the paper's truncated weight. Levels are evenly
    spaced in the angle arctan(sigma / sigma_data), which is the paper's cosine schedule.

    sigma_init: where sampling begins, in standard deviations of the data.
    first: a power of two. inner: DDIM steps of the teacher in each half jump of the first stage; 1 is the paper's.
    """

    first: int = 16
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
        """Where each sample's jump begins, (n,): on the grid of the stage or, half of them, of any so far."""
        now = torch.full((n,), self.stage(progress), device=generator.device)
        u = torch.rand(3, n, generator=generator, device=generator.device)
        stage = torch.where(u[0] < 0.5, now, (u[1] * (now + 1)).long())
        jumps = self.first >> stage  # how many there are on the stage's grid
        number = (1 + (u[2] * jumps).long()) << stage  # the level, counted from 0 in the first stage's steps
        return settings.sigma_data * (number * self.step).tan()

    @property
    def step(self) -> float:
        """Of the first stage, in radians."""
        return math.atan(self.sigma_init) / self.first

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.real is not None
        assert batch.student is not None
        sigma, label = batch.sigma, batch.real_label
        x = batch.real + column(sigma, batch.real) * batch.noise
        number, stage = self.stages(batch)
        angles = ((number - share * 2**stage).to(sigma) * self.step for share in (0.5, 1.0))
        half, end = (batch.sigma_data * angle.tan() for angle in angles)
        with torch.no_grad():
            landed = torch.empty_like(x)
            for mine, walk in ((stage == 0, partial(self.teachers, batch)), (stage > 0, batch.target)):
                if bool(mine.any()):
                    assert walk is not None
                    there, label_there = x[mine], None if label is None else label[mine]
                    for a, b in ((sigma, half), (half, end)):
                        there = walk(there, a[mine], label_there, to=b[mine])
                    landed[mine] = there
        share = column(end / sigma, x)
        wanted = (landed - share * x) / (1 - share)
        error = per_sample((batch.student(x, sigma, label, to=end, aim=True) - wanted).square())
        return {"progressive": error * (1 / sigma.square()).clamp(min=batch.sigma_data**-2)}

    def stages(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(number, stage) of each sample: its level, counted from 0 in steps of the first stage, and whose jump it is.
        That is the stage now where that has such a level, or, for half of them, any earlier one that has."""
        assert batch.uniform is not None
        number = ((batch.sigma / batch.sigma_data).atan() / self.step).round().long()
        latest = sum((number % 2**k == 0).long() for k in range(1, self.stage(batch.progress) + 1))
        latest = latest + torch.zeros_like(number)
        any_of_them = ((2 * batch.uniform - 1) * (latest + 1)).long()
        return number, torch.where(batch.uniform < 0.5, latest, any_of_them)

    def teachers(self, batch: Batch, x: Tensor, a: Tensor, label: Tensor | None, *, to: Tensor) -> Tensor:
        """x at level a taken to level `to` by DDIM, in equal steps of the angle."""
        top, bottom = ((level / batch.sigma_data).atan() for level in (a, to))
        for k in range(self.inner):
            here, there = (batch.sigma_data * torch.lerp(top, bottom, (k + i) / self.inner).tan() for i in (0, 1))
            x = jump(lambda x, sigma, label, to: batch.teacher(x, sigma, label), x, here, there.clamp(min=0), label)
        return x
