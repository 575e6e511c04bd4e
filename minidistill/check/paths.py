"""Exercises of the notebook 13."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidistill.check import ours
from minidistill.check._core import points, report

__all__ = ["asd_stand_in", "cut", "forgetting_teacher", "stage_at"]


def stage_at(f: Callable[..., Any]) -> bool:
    """13, exercise 1: f(progress, stages, share) is the number of the target, from stages - 1 to 1, each for as long as
    the others, and 0 from `share` of the run on."""
    times = [(progress, 5, 0.5) for progress in (0.0, 0.1, 0.13, 0.3, 0.49, 0.5, 0.9)]
    times += [(progress, 2, 0.8) for progress in (0.0, 0.7, 0.8, 1.0)] + [(0.5, 1, 0.5), (0.0, 1, 0.5)]

    def mistake(first: int = -1, stop: bool = True, turned: bool = False, whole: bool = False) -> Callable[..., int]:
        def stage(progress: float, stages: int, share: float) -> int:
            if progress >= (1.0 if whole else share) and stop:
                return 0
            targets = stages + first
            gone = int(progress / (1.0 if whole else share) * targets)
            return 1 + gone if turned else targets - gone

        return stage

    def with_the_teacher(progress: float, stages: int, share: float) -> int:
        return max(0, stages - 1 - int(progress / share * stages))

    return report(1, f, [
        (f"progress {progress:g}, {stages} stages, share {share:g}", (progress, stages, share),
         ours.stage_at(progress, stages, share)) for progress, stages, share in times
    ], hints={
        "s_N is where the fake network begins: it would hold the student against itself; the first target is s_{N-1}":
            mistake(first=0),
        "the way leads back: the most degraded one first": mistake(turned=True),
        "after `share` of the run the target is the teacher, number 0": mistake(stop=False),
        "the way ends at `share` of the run, not with the run": mistake(whole=True),
        "s_{N-1} to s_1 divide the way; the teacher comes after it, it is not one of them": with_the_teacher,
    })


def asd_stand_in(f: Callable[..., Any]) -> bool:
    """13, exercise 2: f(teacher, x0, sigma, noise, later) is x_t less sigma times the noise that the teacher sees in
    the same sample with the same noise at the level `later`, (n, d)."""
    x0, noise = points(6), points(6, seed=1)
    sigma, later = torch.linspace(0.2, 1.0, 6), torch.linspace(0.5, 3.0, 6)

    def seen(teacher: Any, x: Tensor, level: Tensor) -> Tensor:
        return (x - teacher(x, level)) / level[:, None]

    def at(x0: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        return x0 + level[:, None] * noise

    return report(2, f, [
        ("six samples", (_pulled, x0, sigma, noise, later), ours.asd_stand_in(_pulled, x0, sigma, noise, later)),
    ], hints={
        "at the same level the teacher stands in for itself, and nothing pulls: ask it at the level `later`":
            lambda D, x0, s, e, t: D(at(x0, s, e), s),
        "a teacher that is asked at `later` has to see a sample noised to `later`":
            lambda D, x0, s, e, t: at(x0, s, e) - s[:, None] * seen(D, at(x0, s, e), t),
        "that is the teacher's clean sample at `later`; wanted x_t at `sigma`, less `sigma` times that noise":
            lambda D, x0, s, e, t: D(at(x0, t, e), t),
        "the noise that was seen is (x - D) / its own level, `later`":
            lambda D, x0, s, e, t: at(x0, s, e) - (at(x0, t, e) - D(at(x0, t, e), t)),
        "you return noise; wanted a clean sample, x_t less sigma times it":
            lambda D, x0, s, e, t: seen(D, at(x0, t, e), t),
        "the noise comes off x_t, not off x0": lambda D, x0, s, e, t: x0 - s[:, None] * seen(D, at(x0, t, e), t),
        "that is x0 itself, which is SDS": lambda D, x0, s, e, t: x0,
    })


def _pulled(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    """The denoiser of N((1, 1), I)."""
    return 1 + (x - 1) / (1 + sigma[:, None] ** 2)


def forgetting_teacher(f: Callable[..., Any]) -> bool:
    """13, exercise 3: f(teacher, x, sigma, label, forget, safe) is the teacher's answer, (n, d), and for `forget` that
    for `safe`."""
    x, sigma, label = points(8), torch.linspace(0.2, 2.0, 8), torch.tensor([0, 1, 2, 3, 2, 2, 0, 3])

    return report(3, f, [
        (f"forget {forget}, {safe} is safe", (_by_class, x, sigma, label, forget, safe),
         ours.forgetting_teacher(_by_class, x, sigma, label, forget, safe)) for forget, safe in ((2, 0), (0, 3))
    ], hints={
        "`forget` and `safe` are exchanged": lambda D, x, s, y, forget, safe: D(x, s, torch.where(
            y == safe, forget, y)),
        "kept classes are to be answered for as ever": lambda D, x, s, y, forget, safe: D(x, s, torch.full_like(
            y, safe)),
        "you ask the teacher for the class that it is to forget": lambda D, x, s, y, forget, safe: D(x, s, y),
    })


def _by_class(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    """Of each class k the denoiser of N((k, k), I)."""
    assert label is not None
    mean = label[:, None].to(x.dtype)
    return mean + (x - mean) / (1 + sigma[:, None] ** 2)


def cut(f: Callable[..., Any]) -> bool:
    """13, exercise 4: f(pull, most) shortens each row that is longer than `most` to that length, (n, d)."""
    pull = points(6) * torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0, 1000.0])[:, None]
    pull[0] = 0
    return report(4, f, [
        (f"at most {most:g}", (pull, most), ours.cut(pull, most)) for most in (1.0, 0.2)
    ], hints={
        "one factor for the whole batch is `clip`: the one that leaps away makes all others stand still": _batch_cut,
        "cut the length of a row, not each of its numbers: the direction has to stay":
            lambda pull, most: pull.clamp(-most, most),
        "short rows stay as they are": lambda pull, most: most * torch.nn.functional.normalize(pull, dim=1),
        "0 / 0: a row of zeros has to stay one": lambda pull, most: most * pull / pull.norm(dim=1, keepdim=True),
        "squared lengths are not lengths: a root is missing": lambda pull, most: pull * (
            most / pull.square().sum(1, keepdim=True).clamp(min=1e-30)).clamp(max=1),
    })


def _batch_cut(pull: Tensor, most: float) -> Tensor:
    return pull * (most / pull.norm()).clamp(max=1)
