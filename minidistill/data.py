"""Real images in memory. The digits come with scikit-learn, so nothing is ever downloaded for them."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships (UCI Optical Recognition of
    Handwritten Digits, Alpaydin & Kaynak 1998).

    Returns:
        images (1797, 1, 8, 8), float32 in [-1, 1]; labels (1797,), int64, 0 to 9.
    """
    images, labels = load_digits(return_X_y=True)  # pixels are whole numbers from 0 to 16
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
