"""Many small classifiers at once, for notebook 07b: what a student learns from a teacher's logits, over some runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minidistill import _validate, training

__all__ = ["BATCH", "train_many"]

BATCH = 64


def train_many(
    images: Tensor, seen: Tensor, loss: Callable[[Tensor, Tensor], Tensor], *, width: int, steps: int,
    learning_rate: float, generator: torch.Generator, classes: int = 10, starts: int | None = None,
) -> Tensor:
    """Train a network of one hidden layer for each row of `seen` by Adam, all of them in one batched product; the
    logits (runs, n, classes) of all images.

    Args:
        images: (n, d).
        seen: (runs, k), the numbers of the images that a run is trained on.
        loss: (logits (runs * BATCH, classes), numbers of their images (runs, BATCH)) -> (runs * BATCH,).
        width: of the hidden layer.
        starts: how many different initial weights there are, used in turn; None for one for each run.
    """
    _validate.samples("images", images)
    runs = len(seen)
    starts = runs if starts is None else _validate.whole("starts", starts)
    if runs % starts:
        raise ValueError(f"starts={starts} does not divide the {runs} rows of seen; wanted the same number of each")
    shapes = ((images.shape[1], width), (1, width), (width, classes), (1, classes))
    fans = (images.shape[1], images.shape[1], width, width)
    weights = []
    for shape, fan in zip(shapes, fans, strict=True):
        start = (2 * torch.rand(starts, *shape, generator=generator) - 1) / fan**0.5
        weights.append(start.repeat(runs // starts, 1, 1).requires_grad_())
    first, first_bias, second, second_bias = weights

    def logits(x: Tensor) -> Tensor:
        return (x @ first + first_bias).relu() @ second + second_bias

    optimizer = torch.optim.Adam(weights, learning_rate)
    for _ in range(steps):
        at = seen.gather(1, torch.randint(seen.shape[1], (runs, BATCH), generator=generator))
        each = loss(logits(images[at]).flatten(0, 1), at)
        training.optimizer_step(each.sum() / BATCH, optimizer)  # every run has the gradient of its own mean
    return logits(images).detach()
