"""Random numbers drawn where the generator lives and then moved, so that one seed means one draw on every device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["home", "noise_like", "normal"]


def home(device: torch.device, generator: torch.Generator | None) -> torch.device:
    """Where to draw: the generator's device, and without one that of the data."""
    return device if generator is None else generator.device


def normal(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, generator: torch.Generator | None
) -> Tensor:
    """Standard normal numbers of that shape, on that device."""
    where = home(device, generator)
    return torch.randn(shape, generator=generator, dtype=dtype, device=where).to(device)


def noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers with x's shape and dtype, on its device."""
    return normal(tuple(x.shape), x.device, x.dtype, generator)
