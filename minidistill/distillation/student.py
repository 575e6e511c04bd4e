"""The student: one call G(z), or a few with new noise in between; and what a distillation returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minidistill import _validate, training
from minidistill.networks import Generator

__all__ = ["AT_ONCE", "Distilled", "Entrance", "draw", "entrance"]

AT_ONCE = 4096  # samples in one call, which bounds what the network's layers hold


@dataclass(repr=False)
class Distilled:
    """A few-step student: `generator` as last trained, `ema` its average (usually the better one). `fake` and `ratio`
    are None where the objective has none."""

    generator: Generator
    ema: Generator
    history: list[dict[str, float]]
    teacher: Callable[..., Tensor]
    fake: Any
    ratio: nn.Module | None

    def __repr__(self) -> str:
        calls, done = 1 + len(self.ema.levels), self.history[-1]["step"] if self.history else 0
        return (f"Distilled({calls} call{'s' if calls > 1 else ''}, shape={self.ema.shape}, {done:,.0f} steps, "
                f"{sum(p.numel() for p in self.ema.parameters()):,} parameters)")

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
