"""Models of any process as denoisers, and denoisers as models of any process.

A model lives in its process's coordinates, `model(x_t, t)`, and predicts x0, eps, v, the score or the velocity; the
rest of the package has `D(x, sigma)`. Both wrappers are a change of coordinates and one of `conversions`. The models
of alpha-deblending come with the loop that they were made for.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.processes.conversions import FROM_PAIR, TO_PAIR
from minidistill.processes.process import Process

__all__ = ["as_denoiser", "as_model", "deblend"]


def as_denoiser(model: Callable[..., Tensor], process: Process, prediction: str = "eps") -> Callable[..., Tensor]:
    """Wrap `model(x_t, t)` of any process and prediction type as D(x, sigma) in EDM coordinates."""
    _validate.choose("prediction", prediction, TO_PAIR)

    def denoise(x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        x_t, t = process.from_edm(x, _validate.broadcast_sigma(sigma, x).flatten().expand(len(x)))
        out = _validate.denoised(model(x_t, t) if label is None else model(x_t, t, label), x_t, "model")
        return process.convert(out, x_t, t, prediction, "x0")

    return denoise


def as_model(denoiser: Callable[..., Tensor], process: Process, prediction: str = "eps") -> Callable[..., Tensor]:
    """The way back: D(x, sigma) as `model(x_t, t)`, t a float or (n,). "velocity": the probability flow's dx / dt."""
    _validate.choose("prediction", prediction, FROM_PAIR)

    def model(x: Tensor, t: float | Tensor, label: Tensor | None = None) -> Tensor:
        at = process.to_edm(x, t)
        x0 = _validate.denoised(denoiser(*at) if label is None else denoiser(*at, label), x)
        return process.convert(x0, x, t, "x0", prediction)

    return model


@torch.no_grad()
def deblend(model: Callable[[Tensor, Tensor], Tensor], x: Tensor, blends: Tensor) -> Tensor:
    """Iterative alpha-deblending (Heitz 2023), x <- x + (a' - a) model(x, a) from noise to data, x (n, *shape).

    `model(x, a)`, a (n,), is E[x0 - noise | x_a = x], minus flow's velocity at t = 1 - a; `blends` (m+1,) rise within
    [0, 1]. So this is Euler on flow and, divided by a, Euler (or DDIM) in EDM coordinates along sigma = (1 - a) / a.
    """
    _validate.samples("x", x, least=0)
    blends = _validate.tensor("blends", blends).to(x)
    if blends.ndim != 1 or len(blends) < 2 or not bool((blends.diff() > 0).all()) or blends[0] < 0 or blends[-1] > 1:
        raise ValueError(f"blends={blends.tolist()}: wanted two or more numbers rising within [0, 1]")
    for a, after in pairwise(blends):
        x = x + (after - a) * _validate.denoised(model(x, a.expand(len(x))), x, "model")
    return x
