"""Embedding loss: MMD between what networks that nobody trained see in the student's samples and in real ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from minidistill.distillation.batch import Batch
from minidistill.distillation.objective import Around, terms_of
from minidistill.distillation.objectives.distances import kernel_pull
from minidistill.distillation.objectives.samples import follow, in_the_plane

__all__ = ["EmbeddingLoss", "random_network"]


@dataclass(frozen=True)
class EmbeddingLoss(Around):
    """E over psi of MMD^2(psi(x), psi(real)), psi a network of random weights drawn anew in each step (Ying 2026, arXiv
    2604.22379), alone or as one more term of any objective.

    Random layers keep what is near near, and of images they compare patches and not single pixels. Their MMD is 0
    wherever the laws are equal, and over many draws nowhere else; it needs neither pairs nor a critic.

    objective: the one it joins; None for the embedding loss alone.
    weight: of the embedding term, where it joins another.
    networks: drawn in each step; layers, width: of each.
    widths, alpha: of the kernels as in `MeanDiscrepancy`, on features in their own standard deviation.
    """

    objective: Any = None
    weight: float = 1.0
    networks: int = 1
    layers: int = 2
    width: int = 128
    widths: tuple[float, ...] = (0.07, 0.2, 0.7)
    alpha: float = 1.0
    needs_student_real = True

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.real is not None
        alone = self.objective is None
        terms = {} if alone else terms_of(self.objective, batch)
        x, real = (values / batch.sigma_data for values in (batch.x0, batch.real))
        total = torch.zeros_like(batch.sigma)
        for _ in range(self.networks):
            seen, of_real = random_network(torch.cat([x, real]), self.layers, self.width, batch.generator).split(
                [len(x), len(real)])
            scale = of_real.detach().std().clamp(min=torch.finfo(x.dtype).tiny)
            seen, of_real = seen / scale, of_real.detach() / scale
            widths = tuple(width * in_the_plane(seen) for width in self.widths)
            pull = kernel_pull(seen.detach(), of_real, widths, self.alpha, batch.label, batch.real_label)
            total = total + follow(seen, pull) / self.networks
        return terms | {"embedding": total if alone else self.weight * total}


def random_network(x: Tensor, layers: int, width: int, generator: torch.Generator | None) -> Tensor:
    """Features (n, f) of samples x (n, *shape) of about unit variance: `layers` layers of He's random weights and
    normal biases with ReLU between, convolutions of 3x3 that halve the side for images (c, h, w)."""
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=x.device, dtype=x.dtype)

    images = x.ndim == 4
    h = x if images else x.flatten(1)
    for layer in range(layers):
        fan_in = h.shape[1] * (9 if images else 1)
        h = h.relu() if layer else h
        weight, bias = normal(width, h.shape[1], *((3, 3) if images else ())) * (2 / fan_in) ** 0.5, normal(width)
        h = conv2d(pad(h, (1, 1, 1, 1)), weight, bias, stride=2) if images else h @ weight.T + bias
    return h.flatten(1)
