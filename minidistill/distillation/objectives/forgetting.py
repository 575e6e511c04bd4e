"""Score forgetting: a student that was asked for one class is held against the teacher of another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from minidistill.distillation.batch import Batch
from minidistill.distillation.objective import Through
from minidistill.distillation.objectives.implicit import ScoreIdentity
from minidistill.distillation.settings import Settings

__all__ = ["ScoreForgetting"]


@dataclass(frozen=True)
class ScoreForgetting(Through):
    """SFD (Chen 2024, arXiv 2409.11219): of kept classes the teacher of their own, of the forgotten one the teacher of
    a safe class, D_p(x, sigma, safe) against D_q(x, sigma, forget). What is asked for the forgotten class then looks
    like the safe one, in the same run that makes the teacher a student of one step; no data are needed.

    objective: any that compares with `batch.teacher`; the paper's is SiD.
    forget, safe: classes. Of a teacher without classes there is nothing to forget, and the inner objective is left.
    """

    objective: Any = field(default_factory=ScoreIdentity)
    forget: int = 0
    safe: int = 1

    def __post_init__(self) -> None:
        if self.forget == self.safe:
            raise ValueError(f"safe={self.safe}: wanted another class than the one to forget")

    def before_training(self, run: Any, settings: Settings) -> None:
        """Raises ValueError if the teacher does not have both classes."""
        classes = run.generator.n_classes
        for name in ("forget", "safe"):
            if classes and not 0 <= getattr(self, name) < classes:
                raise ValueError(f"{name}={getattr(self, name)}: wanted a class of 0 to {classes - 1}")
        inner = getattr(self.objective, "before_training", None)
        if inner is not None:
            inner(run, settings)

    def see(self, batch: Batch) -> Batch:
        def teacher(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
            assert label is not None
            return batch.teacher(x, sigma, torch.where(label == self.forget, self.safe, label))

        return batch if batch.label is None else replace(batch, teacher=teacher)
