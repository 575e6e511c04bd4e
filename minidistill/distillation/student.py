"""What a distillation returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

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

    def sample(self, n: int, *, label: Tensor | None = None, seed: int = 0, steps: int | None = None) -> Tensor:
        """n samples of the averaged student, (n, *shape), in one step or in as many as it has levels, at most `steps`;
        classes in turn if it has them and none is given."""
        return draw(self.ema, n, label=label, seed=seed, steps=steps)
