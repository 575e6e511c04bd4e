"""Pairs (z, y) of noise and what the teacher's deterministic sampler makes of it, for DMD's regression."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill._random import stream
from minidistill.samplers import dpm_solver_2m, karras_sigmas

__all__ = ["LEVELS", "Pairs", "make_pairs"]

LEVELS = 36  # of DPM-Solver++(2M): as many calls as Heun on EDM's 18 levels, for about a fifth of its error


@dataclass
class Pairs:
    """z (m, *shape) standard normal, y (m, *shape) the teacher's samples from sigma_top z, label (m,) or None."""

    z: Tensor
    y: Tensor
    label: Tensor | None = None

    def draw(self, n: int, rng: torch.Generator) -> Pairs:
        """n of the pairs at random."""
        index = torch.randint(len(self.z), (n,), generator=rng, device=self.z.device)
        return self[index]

    def __getitem__(self, index: Tensor | slice) -> Pairs:
        return Pairs(self.z[index], self.y[index], None if self.label is None else self.label[index])


def make_pairs(
    teacher: Callable[..., Tensor], n: int, shape: tuple[int, ...], sigma_data: float, n_classes: int, *,
    seed: int, device: torch.device, batch_size: int = 1024, progress: bool = True,
) -> Pairs:
    """n pairs from the teacher's probability flow, on Karras levels from 160 to 0.004 standard deviations of the data
    (EDM's 80 and 0.002), `batch_size` at a time, with a progress bar. The same for the same seed, classes in turn."""
    rng = stream(device, seed, "pairs")  # not the training's own: its first batch would be the first pairs again
    z = torch.randn(n, *shape, generator=rng, device=device)
    label = torch.arange(n, device=device) % n_classes if n_classes else None
    sigmas = karras_sigmas(LEVELS, 0.004 * sigma_data, 160 * sigma_data)
    y = dpm_solver_2m(teacher, float(sigmas[0]) * z, sigmas, label=label, batch_size=batch_size, progress=progress)
    return Pairs(z, y, label)
