"""How far a classifier's confidence is from how often it is right."""

from __future__ import annotations

import torch
from torch import Tensor

from minidistill import _validate

__all__ = ["expected_calibration_error"]


def expected_calibration_error(probabilities: Tensor, labels: Tensor, n_bins: int = 15) -> float:
    """The mean gap between how sure a classifier is and how often it is right, from 0 to 1 (Guo 2017, equation 3).

    Samples are grouped by confidence, the largest of `probabilities` (n, k), in n_bins bins of equal width; each bin's
    |accuracy - mean confidence| counts by its share of the samples. With few samples it is biased upwards. ValueError
    unless the rows are probabilities that sum to 1 and labels (n,) are classes.
    """
    _validate.samples("probabilities", probabilities)
    labels = _validate.labels("labels", labels, len(probabilities), probabilities.shape[1])
    n_bins = _validate.whole("n_bins", n_bins)
    off = (probabilities.sum(1) - 1).abs().max().item()
    if off > 1e-3 or (probabilities < 0).any():
        raise ValueError(f"probabilities has rows that miss a sum of 1 by up to {off:.2g}, or negative entries; wanted "
                         "probabilities, such as logits.softmax(1)")
    confidence, answer = probabilities.double().max(1)
    group = (confidence * n_bins).long().clamp(max=n_bins - 1)
    gap = torch.zeros(n_bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, group, (answer == labels).double() - confidence)
    return float(gap.abs().sum() / len(labels))

