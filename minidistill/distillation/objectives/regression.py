"""Regression: learn the teacher's own map from noise to samples, pair by pair. No score of the student is needed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from minidistill.distillation.batch import Batch, per_sample
from minidistill.distillation.objective import Terms

__all__ = ["Regression", "regression_loss"]


def regression_loss(batch: Batch) -> Tensor:
    """|G(z) - y|^2 / sigma_data^2, (n,), for what the teacher's deterministic sampler made of the same noise z."""
    assert batch.pair_x0 is not None
    assert batch.pair_y is not None
    return per_sample((batch.pair_x0 - batch.pair_y).square()) / batch.sigma_data**2


@dataclass(frozen=True)
class Regression(Terms):
    """The student fitted to pairs (z, y) of noise and the teacher's samples of it (Luhman & Luhman 2021; in DMD the
    term that keeps every mode). Its minimiser is the teacher's map itself, as far as a network can be as steep as that
    is.

    needs_pairs: how many are made before training, once; with few the student learns them by heart.
    """

    needs_pairs: int = 8192
    needs_samples = False

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return {"regression": regression_loss(batch)}
