"""A bound on how hard each sample is pulled, for any objective."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.distillation.batch import Batch
from minidistill.distillation.objective import Through

__all__ = ["BoundedPull"]


@dataclass(frozen=True)
class BoundedPull(Through):
    """Any objective, its gradient at each sample cut to the length `most` / sigma_data (Euclidean, over the whole
    sample).

    Losses that differentiate through the fake network pull a sample the harder the farther it is from where that
    network has learned, and its slope there is anybody's guess. One sample that leaps away then outvotes its batch, the
    next ones are thrown farther, and the run is lost. A bound on the gradient of the weights (`clip` of `distill`) cuts
    all of a batch alike and leaves that vote as it is; here every sample has one vote.

    On 25 modes, from new students, it keeps SIM, SIM with squared L2, Uni-Instruct and SiD at alpha = 1.2 after a start
    with SIM, and with a `warmup` SiDA; but neither SiDA nor SiD from their first step (notebook 13).
    """

    objective: Any
    most: float = 1.0

    def __post_init__(self) -> None:
        _validate.positive("most", self.most)

    def see(self, batch: Batch) -> Batch:
        if not batch.x0.requires_grad:
            return batch
        x0, most = batch.x0.view_as(batch.x0), self.most / (batch.sigma_data * len(batch.x0))  # the loss is a mean

        def cut(pull: Tensor) -> Tensor:
            size = pull.flatten(1).norm(dim=1).clamp(min=torch.finfo(pull.dtype).tiny)
            return pull * (most / size).clamp(max=1).reshape(-1, *[1] * (pull.ndim - 1))

        x0.register_hook(cut)
        return replace(batch, x0=x0)
