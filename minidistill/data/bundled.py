"""Images that need no download: the handwritten digits that come with scikit-learn."""

from __future__ import annotations

import torch
from torch import Tensor

from minidistill import _validate

__all__ = ["digits", "digits_as_rgb"]


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships (UCI Optical Recognition of
    Handwritten Digits, Alpaydin & Kaynak 1998).

    Returns:
        images (1797, 1, 8, 8), float32 in [-1, 1]; labels (1797,), int64, 0 to 9.
    """
    from sklearn.datasets import load_digits  # here, since it doubles the time of `import minidistill`

    images, labels = load_digits(return_X_y=True)  # pixels are whole numbers from 0 to 16
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)


def digits_as_rgb(size: int = 32) -> tuple[Tensor, Tensor]:
    """The digits in CIFAR-10's form, for when CIFAR-10 is not at hand: enlarged bilinearly, the same in each channel.

    Returns:
        images (1797, 3, size, size), uint8, 0 to 255; labels (1797,), int64, 0 to 9.
    Raises:
        ValueError: a size that is not a whole number >= 1.
    """
    _validate.whole("size", size)
    images, labels = digits()
    images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    return ((images + 1) * 127.5).round().to(torch.uint8).repeat(1, 3, 1, 1), labels
