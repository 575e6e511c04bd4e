"""Consistency: the student f(x, sigma) is asked at every level of a path, and has to say the same: where the path ends.

Two neighbouring points of one path of the probability flow, x at sigma and x' at a lower sigma', have one end. So the
student's answer at the upper point is fitted to its own at the lower one, held fixed, and at the lowest level to the
point itself. What is known at the bottom climbs up, level by level, to pure noise: there f is a one-step generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill.distillation.batch import Batch, column, per_sample
from minidistill.distillation.objective import Terms
from minidistill.distillation.settings import Settings
from minidistill.networks.jumps import HIGHEST, LOWEST
from minidistill.samplers.ode import heun_step

__all__ = [
    "Consistency", "EasyConsistency", "Grid", "doubling", "log_normal_weights", "one_step_down", "part_of_a_step",
]


@dataclass(frozen=True)
class Consistency(Terms):
    """weight d(f(x, sigma_{i+1}), sg f(x', sigma_i)) on a grid of levels (Song 2023; Song & Dhariwal 2024: iCT).

    x is a real sample with noise. x' has the same noise, less of it (consistency training), or is one Heun step of the
    teacher below x (consistency distillation). As it stands it is iCT, without a teacher.

    first, last: steps of the grid at the beginning of the run and at most; they double at even times (`doubling`).
    lognormal: levels drawn by iCT's weights (`log_normal_weights`) and an error that counts as 1 over the step's
        length; else all levels alike.
    huber: c of the pseudo-Huber distance for one dimension, in standard deviations of the data; None for |.|^2.
    teacher_step: x' by the teacher.
    scattered: four samples of five have a grid of their own, moved down by a part of a step, so that all levels are met
        and the student may be called again at any. False for the papers' fixed grid.
    weight: an error counts (1 + (sigma_data / sigma)^2)^weight times. At 0 errors of samples count alike, at 1 those of
        the preconditioned network, which move samples at low levels less.
    sigma_init: the grid's highest level, in standard deviations of the data: EDM's.
    needs_target: the lower answer from an average of the student, its half-life in samples; 0 for the student itself.
    """

    first: int = 10
    last: int = 1280
    lognormal: bool = True
    huber: float | None = 0.00108
    teacher_step: bool = False
    scattered: bool = False
    weight: float = 0.0
    needs_target: float = 0.0
    needs_real = True
    needs_samples = False
    sigma_init: float = HIGHEST
    route = "end"

    def grid(self, progress: float) -> Grid:
        """The grid in force."""
        return Grid(doubling(progress, self.first, self.last), self.sigma_init)

    def noise_levels(self, n: int, settings: Settings, progress: float, generator: torch.Generator) -> Tensor:
        """The upper level of each sample's step, (n,)."""
        grid, device = self.grid(progress), generator.device
        weights = torch.ones(grid.steps, device=device)
        if self.lognormal:
            weights = log_normal_weights(grid.level(torch.arange(grid.steps + 1, device=device)))
        position = 1.0 + torch.multinomial(weights, n, replacement=True, generator=generator)
        return settings.sigma_data * grid.level(position - part_of_a_step(n, generator) if self.scattered else position)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.real is not None
        assert batch.student is not None
        grid = self.grid(batch.progress)
        position = grid.position(batch.sigma / batch.sigma_data)
        below = (position if self.scattered else position.round()) - 1
        sigma = batch.sigma_data * grid.level(below.clamp(min=0))
        upper, lower = (column(s, batch.real) for s in (batch.sigma, sigma))
        x = batch.real + upper * batch.noise
        label = batch.real_label
        with torch.no_grad():
            point = one_step_down(batch.teacher, x, upper, lower, label) if self.teacher_step else (
                batch.real + lower * batch.noise)
            answer = (batch.target or batch.student)(point, sigma, label)
            answer = torch.where(column(below, x) < 1e-3, point, answer)  # f(x, sigma_min) = x
        gap = per_sample((batch.student(x, batch.sigma, label) - answer).square()) / batch.sigma_data**2
        if self.huber is not None:
            c = self.huber * math.sqrt(x[0].numel())
            gap = (gap + c**2).sqrt() - c
        if self.lognormal:
            gap = gap * batch.sigma_data / (upper - lower).flatten()
        return {"consistency": gap * (1 + (batch.sigma_data / batch.sigma).square()) ** self.weight}


@dataclass(frozen=True)
class EasyConsistency(Terms):
    """|D(x + t e, t) - sg D(x + r e, r)| / (t - r) from a trained teacher's weights (Geng 2024: ECT).

    The lower level r = t max(0, 1 - q^-(stage + 1) (1 + 8 sigmoid(-t))) begins near 0, where the loss is denoising,
    and moves up to t with the stages, evenly spread over the run: diffusion becomes consistency by degrees. At r = 0
    the answer is the clean sample. ln t is normal, mean -1.1 and deviation 2 for data of standard deviation 0.5.
    """

    q: float = 2.0
    stages: int = 8
    needs_real = True
    needs_samples = False
    sigma_init: float = HIGHEST
    route = "end"

    def noise_levels(self, n: int, settings: Settings, progress: float, generator: torch.Generator) -> Tensor:
        normal = torch.randn(n, generator=generator, device=generator.device)
        return (-1.1 + 2.0 * normal).exp() * 2 * settings.sigma_data

    def below(self, t: Tensor, progress: float) -> Tensor:
        """r for t, both in units in which the data have the standard deviation 0.5."""
        stage = min(int(progress * self.stages), self.stages - 1)
        return t * (1 - self.q ** -(stage + 1) * (1 + 8 * (-t).sigmoid())).clamp(min=0)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.real is not None
        assert batch.student is not None
        unit, t = 2 * batch.sigma_data, batch.sigma
        r = self.below(t / unit, batch.progress) * unit
        upper, lower = column(t, batch.real), column(r, batch.real)
        with torch.no_grad():
            safe = torch.where(r > 0, r, t)  # a denoiser is not asked at 0
            answer = batch.student(batch.real + lower * batch.noise, safe, batch.real_label)
            answer = torch.where(lower > 0, answer, batch.real)
        gap = batch.student(batch.real + upper * batch.noise, t, batch.real_label) - answer
        size = per_sample(gap.square()).clamp(min=torch.finfo(gap.dtype).tiny).sqrt()
        return {"consistency": size / (t - r)}


# ------------------------------------------------- levels

@dataclass(frozen=True)
class Grid:
    """Karras's levels from `LOWEST` to `top` by their number, 0 to `steps`, in standard deviations of the data; between
    two numbers lie levels too (Karras 2022, equation 5, with rho = 7)."""

    steps: int
    top: float

    def level(self, position: Tensor) -> Tensor:
        low, high = LOWEST ** (1 / 7), self.top ** (1 / 7)
        return (low + position / self.steps * (high - low)) ** 7

    def position(self, level: Tensor) -> Tensor:
        """`level`'s inverse."""
        low, high = LOWEST ** (1 / 7), self.top ** (1 / 7)
        return (level ** (1 / 7) - low) / (high - low) * self.steps


def part_of_a_step(n: int, generator: torch.Generator) -> Tensor:
    """By how much each sample's grid is moved down, (n,): a fifth not at all, so that the top, where sampling begins,
    is met; the others uniformly from 0 to 1."""
    return (1.25 * torch.rand(n, generator=generator, device=generator.device) - 0.25).clamp(min=0)


def doubling(progress: float, first: int, last: int) -> int:
    """Steps of the grid once `progress` (0 to 1) of the run is over: they double from `first` to at most `last`, each
    number for the same share of the run (Song & Dhariwal 2024, equation 8)."""
    times = math.floor(math.log2(last // first)) + 1
    return min(first * 2 ** math.floor(progress * times), last)


def log_normal_weights(grid: Tensor, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """Of each step of a grid (N + 1,), ascending, in standard deviations of the data: the mass of a log-normal law of
    noise levels, its mean and deviation those for data of standard deviation 0.5, (N,)."""
    reached = torch.erf(((grid / 2).log() - mean) / (math.sqrt(2) * std))
    return reached.diff()


def one_step_down(teacher: object, x: Tensor, upper: Tensor, lower: Tensor, label: Tensor | None) -> Tensor:
    """One Heun step of the probability flow, each sample between levels of its own, (n, 1, ...) like x."""
    return heun_step(lambda x, sigma: teacher(x, sigma.flatten(), label), x, upper, lower)  # type: ignore[operator]
