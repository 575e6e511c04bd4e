"""The student's own denoiser without a network: the closed form over fresh samples of it.

A control, in low dimension: with it, what a distillation does not reach is the student's fault or the objective's,
never that of a fake network which has not kept up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minidistill._random import stream
from minidistill.networks import Generator
from minidistill.teachers import EmpiricalTeacher

__all__ = ["EmpiricalFake"]


class EmpiricalFake:
    """D_q(x, sigma, label) of the empirical law of `n` samples of the student, drawn anew by `refresh`.

    Differentiable in x, as SIM and SiD need it. The samples count as fixed.
    """

    def __init__(self, generator: Generator, n: int = 2048) -> None:
        self.generator, self.n = generator, n
        self.denoiser: EmpiricalTeacher | None = None

    @torch.no_grad()
    def refresh(self, rng: torch.Generator) -> None:
        """Draw the samples: one call of the student, classes in turn."""
        z = torch.randn(self.n, *self.generator.shape, generator=rng, device=rng.device)
        label = torch.arange(self.n, device=rng.device) % self.generator.n_classes if self.generator.n_classes else None
        x0 = self.generator(z, label)
        self.denoiser = EmpiricalTeacher(x0, labels=label)

    def __call__(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Any:
        if self.denoiser is None:
            self.refresh(stream(x.device, 0, "empirical fake"))  # nobody's test samples are among them
        return self.denoiser(x, sigma, label)  # type: ignore[misc]
