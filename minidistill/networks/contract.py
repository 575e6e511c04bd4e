"""What a teacher is: the contract that everything which denoises keeps, and how it is checked once.

`GaussianMixture`, a trained `Denoiser`, the closed-form teachers, a wrapped diffusers model and your own function are
all teachers. Nothing but the call is required; the attributes save the user an argument where they are there.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from minidistill import _validate

__all__ = ["Teacher", "estimate_sigma_data", "probe"]


class Teacher(Protocol):
    """D(x, sigma, label) -> E[x0 | x] at x = x0 + sigma e, e standard normal.

    Called with x (n, *shape) floating, sigma (n,) noise levels in data units, and label (n,) int64 or None, it returns
    (n, *shape) in x's dtype, on x's device. Where it is differentiated (SIM, SiD, likelihood) it has to be
    differentiable in x.

    Attributes, all optional:
        shape: of one sample, a tuple; else `distill` needs `shape=` or data.
        sigma_data: the data's standard deviation, which sets every default noise level; else it comes from the data or
            is estimated (`estimate_sigma_data`).
        n_classes: 0 or missing for an unconditional teacher; else labels are 0 to n_classes - 1.
        sample: (n, generator) -> (n, *shape), real samples for objectives that compare with them; else they need data.
        features: (x, sigma, label) -> (n, c) or (n, c, h, w), from which a density ratio is read off.
    """

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor | None = None, /) -> Tensor: ...


def probe(
    teacher: Any, shape: tuple[int, ...], *, sigma: float, n_classes: int = 0, device: torch.device | str = "cpu",
    name: str = "teacher",
) -> None:
    """Call the teacher once, on two points at level sigma, and raise unless what comes back is a denoised sample.

    Raises TypeError, ValueError: it can't be called so, or it returned something of another type, shape or kind; the
    text has what was returned and what is wanted.
    """
    x = sigma * torch.linspace(-1, 1, 2, device=device).reshape(2, *[1] * len(shape)).expand(2, *shape).contiguous()
    level = torch.full((2,), float(sigma), device=device)
    label = torch.zeros(2, dtype=torch.long, device=device) if n_classes else None
    with torch.no_grad():
        try:
            out = teacher(x, level, label)
        except TypeError as error:
            raise TypeError(f"{name}: can't be called as D(x, sigma, label) with x {tuple(x.shape)}, sigma (2,) and "
                            f"label {'(2,)' if n_classes else None}: {error}") from error
    _validate.denoised(out, x, name)


@torch.no_grad()
def estimate_sigma_data(
    teacher: Any, shape: tuple[int, ...], *, n_classes: int = 0, device: torch.device | str = "cpu", n: int = 4096,
) -> float:
    """The data's standard deviation (of all values together), read off the denoiser at noise far above it.

    There D(x) is nearly E[x0] + Cov x0 (x - E[x0]) / sigma^2, so sigma E[e D] along the noise e of x = sigma e is the
    mean variance, and the spread of E[D] between coordinates adds to it. What "far above" is, is not known beforehand:
    the level is moved to twenty times the last estimate until that stays (at levels too low D returns x, and the
    estimate is the level itself, so it climbs). Exact up to Monte Carlo's 1 / sqrt(n dim) and 1 part in 400.

    Raises ValueError if the estimate does not settle on a positive number.
    """
    rng = torch.Generator("cpu").manual_seed(0)
    e = torch.randn(n, *shape, generator=rng).to(device)
    label = torch.arange(n, device=device) % n_classes if n_classes else None
    std = 1.0
    for _ in range(200):
        level = 20 * std
        x0 = teacher(level * e, torch.full((n,), level, device=device), label)
        mean = x0.mean(0)
        variance = level * ((x0 - mean) * e).mean() + mean.flatten().var(correction=0)
        last, std = std, float(variance.clamp(min=0).sqrt())
        if not 0 < std < float("inf"):
            break
        if abs(std / last - 1) < 0.01:
            return std
    raise ValueError("sigma_data: this teacher does not tell its data's standard deviation, and none could be "
                     "estimated from it; wanted sigma_data=..., or data")
