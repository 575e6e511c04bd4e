"""The student: one call G(z), or a few with new noise in between; and what a distillation returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minidistill import _validate, training
from minidistill.networks import Generator

__all__ = ["AT_ONCE", "Distilled", "Entrance", "check_levels", "draw", "entrance"]

AT_ONCE = 4096  # samples in one call, which bounds what the network's layers hold


@dataclass
class Distilled:
    """A few-step student: `generator` as last trained, `ema` its average (usually the better one)."""

    generator: Generator
    ema: Generator
    history: list[dict[str, float]]
    teacher: Callable[..., Tensor]
    fake: nn.Module
    ratio: nn.Module | None

    @torch.no_grad()
    def sample(self, n: int, *, label: Tensor | None = None, seed: int = 0, steps: int | None = None) -> Tensor:
        """n samples of the averaged student, (n, *shape), in one step or in as many as it has levels, at most `steps`;
        classes in turn if it has them and none is given."""
        return draw(self.ema, n, label=label, seed=seed, steps=steps)


@torch.no_grad()
def draw(
    generator: Generator, n: int, *, label: Tensor | None = None, seed: int = 0, steps: int | None = None
) -> Tensor:
    """n samples G(z, label), z ~ N(0, I) from the seed; classes 0, 1, 2, ... in turn unless `label` (n,) is given.
    `steps` calls of a student of several; None for all. ValueError for more than it has."""
    _validate.whole("n", n)
    calls = 1 + len(getattr(generator, "levels", ()))
    steps = calls if steps is None else steps
    _validate.whole("steps", steps)
    if steps > calls:
        raise ValueError(f"steps={steps}: this student has {calls}")
    device, rng = next(generator.parameters()).device, training.generator_on("cpu", seed)
    noises = [torch.randn(n, *generator.shape, generator=rng) for _ in range(steps)]
    if label is None and generator.n_classes:
        label = torch.arange(n) % generator.n_classes
    pieces = []
    for i in range(0, n, AT_ONCE):
        z, *later = (noise[i:i + AT_ONCE].to(device) for noise in noises)
        classes = None if label is None else label[i:i + AT_ONCE].to(device)
        pieces.append(entrance(generator, z, classes, later).into(generator, classes))
    return torch.cat(pieces)


@dataclass(frozen=True)
class Entrance:
    """What a student's call is given: x at level sigma, or standard normal noise and None at the first call."""

    x: Tensor
    sigma: float | None = None

    def into(self, generator: Callable[..., Tensor], label: Tensor | None) -> Tensor:
        """The call's samples, (n, *shape)."""
        return generator(self.x, label) if self.sigma is None else generator(self.x, label, self.sigma)


@torch.no_grad()
def entrance(generator: Generator, z: Tensor, label: Tensor | None, noises: Sequence[Tensor]) -> Entrance:
    """The input of the call after as many others as there are `noises`, by running those: backward simulation, which
    trains a student on what it meets when it samples (DMD2, Yin 2024b)."""
    entry = Entrance(z)
    for noise, sigma in zip(noises, generator.levels if noises else (), strict=False):
        entry = Entrance(entry.into(generator, label) + sigma * noise, sigma)
    return entry


def check_levels(levels: Sequence[float], sigma_init: float) -> tuple[float, ...]:
    """Raise ValueError unless the levels descend, from below sigma_init to above 0."""
    levels = tuple(float(level) for level in levels)
    for level in levels:
        _validate.positive("student_levels", level)
    if any(a <= b for a, b in zip((sigma_init, *levels), levels, strict=False)):
        raise ValueError(f"student_levels={levels}: wanted levels that descend from below sigma_init={sigma_init:g}")
    return levels
