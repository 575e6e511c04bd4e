"""The numbers of a distillation, checked once: `distill` makes them from its keywords, and the loop reads them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from minidistill import _validate
from minidistill.training import parallel

__all__ = ["SCHEDULES", "Settings"]

#: Learning rate schedules, of `training.schedule`'s factor, which falls linearly from 1 to 0 after a hold.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda factor: factor,
    "cosine": lambda factor: math.sin(math.pi / 2 * factor) ** 2,
    "constant": lambda factor: 1.0,
}


@dataclass(frozen=True)
class Settings:
    """What `distill` documents under the same names, with every default filled in. Noise levels are in data units.

    Raises ValueError for a number out of its range, or levels that are out of order.
    """

    steps: int
    batch_size: int
    critic_steps: int
    learning_rate: float
    critic_learning_rate: float
    sigma_data: float
    sigma_init: float
    sigma_min: float
    sigma_max: float
    student_levels: tuple[float, ...]
    ema_halflife: float
    warmup: int
    clip: float | None
    hold: float
    schedule: str
    flip: bool
    seed: int
    fake: str  # "learned" or "empirical"
    accumulate: int = field(default=1)  # changes nothing but the memory taken, so a resumed run may have another

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {"seed": _validate.seed("seed", self.seed)}
        for name in ("steps", "batch_size", "critic_steps", "accumulate", "warmup"):
            checked[name] = _validate.whole(name, getattr(self, name), least=int(name != "warmup"))
        for name in ("learning_rate", "critic_learning_rate", "sigma_data", "sigma_init", "sigma_min", "sigma_max",
                     "ema_halflife", "hold", *(["clip"] if self.clip is not None else [])):
            checked[name] = _validate.positive(name, getattr(self, name))
        for name, value in checked.items():  # NumPy's numbers and tensors without dimensions have become Python's
            object.__setattr__(self, name, value)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min:g} is not below sigma_max={self.sigma_max:g}")
        levels = self.student_levels
        for level in levels:
            _validate.positive("student_levels", level)
        if any(a <= b for a, b in zip((self.sigma_init, *levels), levels, strict=False)):
            raise ValueError(f"student_levels={levels}: wanted levels that descend from below "
                             f"sigma_init={self.sigma_init:g}")
        _validate.choose("schedule", self.schedule, SCHEDULES)
        _validate.choose("fake", self.fake, {"learned": None, "empirical": None})
        parallel.parts(self.batch_size, self.accumulate)  # raises unless the batch divides evenly

    def config(self) -> dict[str, Any]:
        """All that a run has to have in common with the one that it resumes."""
        numbers = asdict(self)
        del numbers["accumulate"]
        return numbers
