"""Drawing from a student: one call G(z), or a few with new noise in between. Whoever draws, draws here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.networks.jumps import ROUTES, angles, way_down

__all__ = ["AT_ONCE", "Entrance", "call_levels", "calls_of", "device_of", "draw", "entrance"]

AT_ONCE = 4096  # samples in one call, which bounds what the network's layers hold


def calls_of(student: Any, steps: int | None = None) -> int:
    """How many network calls a sample takes: 1 and one for each of the student's further `levels`, or `steps` of them.
    ValueError for more than it has; one with a route takes any number."""
    most = 1 + len(getattr(student, "levels", ()))
    steps = most if steps is None else _validate.whole("steps", steps)
    if steps > most and getattr(student, "route", "call") == "call":
        raise ValueError(f"steps={steps}: this student has {most}")
    return steps


@torch.no_grad()
def draw(
    student: Any, n: int, *, label: Tensor | None = None, seed: int = 0, steps: int | None = None,
    gamma: float | None = None, batch_size: int = AT_ONCE, device: torch.device | None = None,
    after_call: Callable[[], object] = lambda: None,
) -> Tensor:
    """n samples G(z, label), z ~ N(0, I) from the seed; classes 0, 1, 2, ... in turn unless `label` (n,) is given.

    All noise is drawn on the CPU before the first call, so that neither the device nor the batch size matters (but for
    rounding).

    Args:
        student: a `Generator`, or any G(z, label) with a `shape`, and `n_classes` if it has classes.
        steps: calls of a student of several; None for all. One that knows the way from any level may be called any
            number of times: at its `levels`, if it has just as many, else at levels of evenly spaced angles (`angles`).
        gamma: of a student that can stop on the way, how much of each next level is noise anew, 0 to 1; None for 0.
        device: where the student is; None for where its weights are. after_call: called after each network call.
    Raises:
        ValueError, TypeError: bad counts, a label that does not fit, samples of another shape than the student's.
    """
    n, batch_size = _validate.whole("n", n), _validate.whole("batch_size", batch_size)
    rng = torch.Generator().manual_seed(_validate.whole("seed", seed, least=0))
    classes = getattr(student, "n_classes", 0)
    if label is not None and not classes:
        raise ValueError("label: this model has no classes; wanted None")
    if classes:
        label = torch.arange(n) % classes if label is None else _validate.labels("label", label, n, classes)
    calls, gamma = calls_of(student, steps), _gamma(student, gamma)
    noises = [torch.randn(n, *student.shape, generator=rng) for _ in range(calls if gamma else 1)]
    device = device_of(student) if device is None else device
    pieces = []
    for i in range(0, n, batch_size):
        z, *later = (noise[i : i + batch_size].to(device) for noise in noises)
        mine = None if label is None else label[i : i + batch_size].to(device)
        if getattr(student, "route", "call") == "call":
            pieces.append(entrance(student, z, mine, later, after_call).into(student, mine))
            after_call()
        else:
            levels = call_levels(student, calls)
            pieces.append(way_down(student, levels[0] * z, levels, mine, later, gamma, after_call))
    return torch.cat(pieces)


def call_levels(student: Any, calls: int) -> list[float]:
    """The levels at which a student that may be called at any is called."""
    if calls == 1 + len(student.levels):
        return [student.sigma_init, *student.levels]
    scale = student.denoiser.sigma_data
    return [student.sigma_init, *(scale * level for level in angles(calls, student.sigma_init / scale)[1:])]


def _gamma(student: Any, gamma: float | None) -> float:
    """The share of noise that is new in each call; 1 for students that land on clean samples. ValueError else."""
    stops = ROUTES[getattr(student, "route", "call")]
    gamma = (0.0 if stops else 1.0) if gamma is None else _validate.number("gamma", gamma, 0, 1)
    if not stops and gamma != 1:
        raise ValueError(f"gamma={gamma:g}: this student can't stop on its way to a sample, so that all noise is new; "
                         "wanted 1 or None")
    return gamma


def device_of(model: object) -> torch.device:
    """Where the model's weights are; the CPU for a callable without any."""
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return torch.device("cpu") if first is None else first.device


@dataclass(frozen=True)
class Entrance:
    """What a student's call is given: x at level sigma, or standard normal noise and None at the first call."""

    x: Tensor
    sigma: float | None = None

    def into(self, student: Callable[..., Tensor], label: Tensor | None) -> Tensor:
        """The call's samples, (n, *shape)."""
        out = student(self.x, label) if self.sigma is None else student(self.x, label, self.sigma)
        return _validate.denoised(out, self.x, "student")


@torch.no_grad()
def entrance(
    student: Any, z: Tensor, label: Tensor | None, noises: Sequence[Tensor],
    after_call: Callable[[], object] = lambda: None,
) -> Entrance:
    """The input of the call after as many others as there are `noises`, by running those: backward simulation, which
    trains a student on what it meets when it samples (DMD2, Yin 2024b)."""
    entry = Entrance(z)
    for noise, sigma in zip(noises, student.levels if noises else (), strict=False):
        entry = Entrance(entry.into(student, label) + sigma * noise, sigma)
        after_call()
    return entry
