"""What a distillation returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minidistill import _validate
from minidistill.networks import Generator, draw

__all__ = ["Distilled"]


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

    def sample(
        self, n: int, *, label: Tensor | None = None, seed: int = 0, steps: int | None = None,
        gamma: float | None = None,
    ) -> Tensor:
        """n samples of the averaged student, (n, *shape), in one step or in as many as it has levels, at most `steps`;
        classes in turn if it has them and none is given. A student of a trajectory objective takes any number of steps:
        `networks.draw` says at which levels, and what `gamma` is."""
        return draw(self.ema, n, label=label, seed=seed, steps=steps, gamma=gamma)

    @torch.no_grad()
    def jump(
        self, x: Tensor, sigma: float | Tensor, to: float | Tensor = 0.0, label: Tensor | None = None
    ) -> Tensor:
        """Where the averaged student takes x (n, *shape) from level sigma to level `to`, each a float or (n,), in data
        units. A consistency function only knows to = 0.

        Raises ValueError for a student of one call, which knows no way, for levels that do not fit and for to > sigma.
        """
        if self.ema.route == "call":
            raise ValueError("this student was trained at one level and knows no way down from any other; wanted "
                             "one of a trajectory objective, such as 'ctm'")
        s = _validate.broadcast_sigma(sigma, x, positive=True)
        if _validate.any_of(_validate.broadcast_sigma(to, x, name="to") > s):
            raise ValueError("to is above sigma at some sample; wanted jumps downwards")
        return self.ema(x, label, sigma, to)
