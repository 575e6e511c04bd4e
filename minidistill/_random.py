"""Random numbers drawn where the generator lives and then moved, so that one seed means one draw on every device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from minidistill import _validate

__all__ = ["home", "noise_like", "normal", "seeded", "stream"]


def home(device: torch.device, generator: torch.Generator | None) -> torch.device:
    """Where to draw: the generator's device, and without one that of the data. TypeError for another generator."""
    _validate.generator("generator", generator)
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


def stream(device: str | torch.device, seed: int, purpose: str) -> torch.Generator:
    """A generator for one purpose, the same for the same seed, whose numbers are not those that whoever else was given
    that seed draws: two draws that are to be independent must not begin at one state."""
    words = hashlib.sha256(f"{purpose}, seed {_validate.seed('seed', seed)}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(words[:8], "little"))


@contextmanager
def seeded(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Torch's global generators, of the CPU and of `device`, are seeded inside the `with` and afterwards are again what
    they were: initial weights and dropout have no other generator, and it is the caller's."""
    seed, device = _validate.whole("seed", seed, least=0), torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
