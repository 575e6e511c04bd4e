"""A look into a running distillation: what the student makes, and what teacher and fake network think of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidistill import training
from minidistill.networks.draws import entrance

__all__ = ["Diagnosis", "diagnose"]


@dataclass(frozen=True)
class Diagnosis:
    """Student samples, noised to levels that rise from one to the next, and denoised by both networks.

    Where teacher and fake agree the student gets no gradient: at the end of a good run they agree everywhere. A fake
    network that does not reproduce the student's samples at small noise has not kept up with it.
    """

    x0: Tensor  # (n, *shape) the student's samples
    sigma: Tensor  # (n,) noise levels, rising
    xt: Tensor  # (n, *shape) noised
    teacher_x0: Tensor  # (n, *shape) the teacher's denoised
    fake_x0: Tensor | None  # (n, *shape) the fake network's; None where there is none
    score_gap: float | None  # root mean square of D_teacher - D_fake over all levels, in units of sigma_data
    log_ratio: float | None  # mean of the learned log p / q at the student's samples; 0 once they can't be told apart


@torch.no_grad()
def diagnose(
    generator: Any,
    teacher: Callable[..., Tensor],
    fake: Callable[..., Tensor] | None,
    *,
    sigma_data: float,
    ratio: Callable[..., Tensor] | None = None,
    n: int = 48,
    seed: int = 0,
) -> Diagnosis:
    """Draw n samples from the generator, noise them at levels from 0.1 to 5 times sigma_data, denoise them twice.

    Neither the networks nor any global random state change.
    """
    device = next(generator.parameters()).device
    rng = training.generator_on("cpu", seed)
    z, noise = torch.randn(2, n, *generator.shape, generator=rng).to(device)
    label = torch.arange(n, device=device) % generator.n_classes if generator.n_classes else None
    sigma = sigma_data * torch.logspace(-1, 0.7, n, device=device)
    noises = [torch.randn(n, *generator.shape, generator=rng).to(device) for _ in getattr(generator, "levels", ())]
    x0 = entrance(generator, z, label, noises).into(generator, label)
    xt = x0 + sigma.reshape(-1, *[1] * (x0.ndim - 1)) * noise
    teacher_x0, fake_x0 = teacher(xt, sigma, label), None if fake is None else fake(xt, sigma, label)
    gap = None if fake_x0 is None else float((teacher_x0 - fake_x0).square().mean().sqrt()) / sigma_data
    log_ratio = None if ratio is None else float(ratio(xt, sigma, label).mean())
    return Diagnosis(x0, sigma, xt, teacher_x0, fake_x0, gap, log_ratio)
