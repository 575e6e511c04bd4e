"""DisBack: the student is not held against the teacher at once, but first against teachers that are more like it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from minidistill import _validate, training
from minidistill._random import stream
from minidistill.distillation.batch import Batch
from minidistill.distillation.objective import Needs, Objective, Through
from minidistill.distillation.objectives import fake_loss
from minidistill.distillation.settings import Settings
from minidistill.distillation.start import resolve
from minidistill.score_matching import log_uniform_sigma

__all__ = ["Backtracking", "WayBack", "backtracking"]


def backtracking(
    objective: str | Objective, *, stages: int = 5, degrading: int = 200, share: float = 0.5
) -> Backtracking:
    """Any objective with a fake network, along the way back from the student to the teacher (Zhang 2024, DisBack, arXiv
    2408.15991).

    First the fake network, which starts as the teacher, learns to denoise the samples of the student as it begins, and
    is copied on the way: s_0, the teacher, to s_N, which it is when it has arrived. Then the student is trained against
    s_{N-1}, ..., s_1 and, for the rest of the run, s_0; the fake network begins as s_N.

    Args:
        objective: a name of `OBJECTIVES`, or an objective.
        stages: N. degrading: updates of the fake network before training; the price of the way, to be counted.
        share: of the run, in which the targets move from s_{N-1} to s_0, each for as long as the others.
    Raises:
        ValueError: bad numbers; TypeError: an objective without a fake network.
    """
    inner = resolve(objective)
    if not Needs.of(inner).fake:
        raise TypeError(f"objective is {type(inner).__name__}, which has no fake network to record a way with; wanted "
                        "one that has")
    stages, degrading = _validate.whole("stages", stages), _validate.whole("degrading", degrading)
    if degrading < stages:
        raise ValueError(f"degrading={degrading}: wanted an update for each of the {stages} stages at least")
    return Backtracking(inner, stages, degrading, _validate.number("share", share, 0, 1))


@dataclass(frozen=True)
class Backtracking(Through):
    """What `backtracking` makes."""

    objective: Any
    stages: int = 5
    degrading: int = 200
    share: float = 0.5

    def before_training(self, run: Any, settings: Settings) -> None:
        """Record the way, which puts a `WayBack` in the teacher's place."""
        inner = getattr(self.objective, "before_training", None)
        if inner is not None:
            inner(run, settings)
        if not isinstance(run.fake, nn.Module):
            raise TypeError(f"fake is {type(run.fake).__name__}; a way is recorded with a network: wanted 'learned'")
        run.teacher = WayBack(run.teacher, self.degrade(run, settings), self.share)

    def degrade(self, run: Any, settings: Settings) -> list[nn.Module]:
        """Train the fake network on the untrained student's samples; copies of it, frozen, at even times."""
        generator, fake = run.generator, run.fake
        rng = stream(next(fake.parameters()).device, settings.seed, "backtracking")
        optimizer = torch.optim.Adam(fake.parameters(), settings.critic_learning_rate, betas=(0.0, 0.99))
        n, copies, recorded = settings.batch_size, [], 0
        for step in range(1, self.degrading + 1):
            z, noise = torch.randn(2, n, *generator.shape, generator=rng, device=rng.device)
            label = None
            if generator.n_classes:
                label = torch.arange(n, device=rng.device) % generator.n_classes
            sigma = log_uniform_sigma(n, settings.sigma_min, settings.sigma_max, rng, rng.device)
            with torch.no_grad():
                x0 = generator(z, label)
            batch = Batch(x0, sigma, noise, run.teacher, fake, label, sigma_data=run.sigma_data)
            training.optimizer_step(fake_loss(batch).mean(), optimizer)
            if step * self.stages // self.degrading > recorded:
                recorded += 1
                copies.append(copy.deepcopy(fake, {id(run.teacher): run.teacher}).eval().requires_grad_(False))
        return copies

    def see(self, batch: Batch) -> Batch:
        teacher: Any = batch.teacher
        return replace(batch, teacher=teacher.at(batch.progress))


class WayBack(nn.Module):
    """The teacher, which it is if called, with what it degrades to, s_1 to s_N, from which `at` finds its way back."""

    def __init__(self, teacher: Callable[..., Tensor], stages: Sequence[nn.Module], share: float) -> None:
        super().__init__()
        self.whole, self.stages, self.share = teacher, nn.ModuleList(stages), share

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "whole":
                raise
            return getattr(self.whole, name)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        return self.whole(x, sigma, label)

    def at(self, progress: float) -> Any:
        """The target when so much of the run is over: s_{N-1} first; the teacher itself after `share` of it."""
        between = len(self.stages) - 1  # s_{N-1} to s_1
        if progress >= self.share or not between:
            return self.whole
        return self.stages[between - 1 - int(progress / self.share * between)]
