"""Reflow: a flow learned anew between each noise and its own sample, where paths no longer cross (Liu 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill.distillation.batch import Batch, column, per_sample
from minidistill.distillation.objective import Terms
from minidistill.distillation.settings import Settings
from minidistill.networks.jumps import TOP

__all__ = ["Reflow"]


@dataclass(frozen=True)
class Reflow(Terms):
    """|v - (e - y)|^2 on the line from noise e to y, what the teacher's flow makes of it (Liu 2023, equation 1).

    In flow's coordinates the line is (1 - t) y + t e and the velocity (z - D) / t, so this is the denoising loss whose
    noise belongs to its sample. Learned exactly it transports the same noise to the same law along straighter ways, and
    one step is a better sampler; at t = 1 alone it is regression. The student is sampled along lines, in any number of
    steps. A second round is a second distillation, whose teacher is the first one's `ema.denoiser`.

    needs_pairs: how many are made before training, once.
    sigma_init: where sampling begins, in standard deviations of the data.
    top: the share of the batch at the level where sampling begins; t is uniform in the rest.
    """

    needs_pairs: int = 8192
    top: float = 0.25
    needs_samples = False
    needs_pair_samples = False
    sigma_init: float = TOP
    route = "line"

    def noise_levels(self, n: int, settings: Settings, progress: float, generator: torch.Generator) -> Tensor:
        u = torch.rand(2, n, generator=generator, device=generator.device)
        t = u[0].clamp(min=1e-3) * settings.sigma_init / (settings.sigma_data + settings.sigma_init)
        return torch.where(u[1] < self.top, settings.sigma_init, settings.sigma_data * t / (1 - t))

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.pair_y is not None
        assert batch.pair_z is not None
        assert batch.student is not None
        x = batch.pair_y + column(batch.sigma, batch.pair_y) * batch.pair_z
        error = per_sample((batch.student(x, batch.sigma, batch.pair_label) - batch.pair_y).square())
        t = batch.sigma / (batch.sigma_data + batch.sigma)
        return {"reflow": error / (batch.sigma_data * t).square()}
