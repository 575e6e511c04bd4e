"""What is done to images (n, c, h, w) before a network sees them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["random_flip", "smaller", "to_float"]


def to_float(images: Tensor) -> Tensor:
    """Bytes 0..255 to float32 in [-1, 1], as x / 127.5 - 1; images that are floating already are returned as they are.

    Raises:
        TypeError: any other kind of tensor.
    """
    if images.is_floating_point():
        return images
    if images.dtype != torch.uint8:
        raise TypeError(f"images is a tensor of {images.dtype}; wanted uint8 (0 to 255) or floating point")
    return images.to(torch.float32).div_(127.5).sub_(1)


def random_flip(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image of (n, c, h, w) mirrored left to right with probability 1/2: a new tensor on the images' device."""
    coins = torch.rand(len(images), generator=rng, device=rng.device) < 0.5
    return torch.where(coins.to(images.device).reshape(-1, 1, 1, 1), images.flip(-1), images)


def smaller(images: Tensor, size: int) -> Tensor:
    """Square images of bytes averaged over blocks of pixels to (n, c, size, size), rounded to the nearest byte, halves
    up; the images themselves if that is their size. Raises ValueError unless `size` divides their side."""
    height, width = images.shape[-2:]
    if height != width or height % size:
        raise ValueError(f"size={size}: wanted a divisor of the side of square images, but they are {height} x {width}")
    if size == width:
        return images
    pool = torch.nn.functional.avg_pool2d  # in parts: floats of all would be four times as many
    parts = [pool(part.float(), width // size) for part in images.split(5000)]
    return torch.cat([part.add_(0.5).to(torch.uint8) for part in parts])
