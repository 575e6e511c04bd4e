"""A residual MLP with an embedded noise level, F(x, c_noise, label)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, silu

from minidistill import _validate
from minidistill.networks.jumps import WhereTo

__all__ = ["ACTIVATIONS", "MLP", "LabelEmbedding", "NoiseEmbedding", "frequencies", "null_number"]


class NoiseEmbedding(nn.Module):
    """Sines and cosines of c_noise at octave frequencies, (n, features)."""

    frequencies: Tensor

    def __init__(self, features: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequencies(torch.arange(features // 2, device="cpu")), persistent=False)

    def forward(self, c_noise: Tensor) -> Tensor:
        angle = c_noise.reshape(-1, 1) * self.frequencies / 4
        return torch.cat([angle.sin(), angle.cos()], 1)


class LabelEmbedding(nn.Embedding):
    """A vector for each class; not filled on the meta device, for the same reason as `frequencies`."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def frequencies(steps: Tensor) -> Tensor:
    """pi 2^steps, from steps on the CPU to the default device. On the meta device, where checkpoints are looked at, any
    arithmetic makes torch load its compiler, which takes it two seconds."""
    return (math.pi * 2.0 ** steps).to(torch.get_default_device())


def null_number(n_classes: int, null_class: bool) -> int | None:
    """The number of the null class, which comes after the others; None without one."""
    if null_class and not n_classes:
        raise ValueError("null_class=True with n_classes=0: wanted classes for it to stand beside")
    return n_classes if null_class else None


ACTIVATIONS = {"silu": silu, "relu": relu}


class MLP(nn.Module):
    """F(x, c_noise, label) on flattened samples: `depth` residual blocks of width `hidden`.

    Args:
        shape: one sample's shape; samples are (n, *shape).
        n_classes: 0 for an unconditional network.
        null_class: one more class, number n_classes, for samples whose class is not told.
        out_features: None for an output shaped like the input; a number m for (n, m).
        activation: "silu", smooth as denoisers are, or "relu", whose kinks suit a generator that has to tear
            one Gaussian into separate modes.
        gain: factor on the first layer's weights as they start: above 1, functions of higher frequency from the first
            step on, for a generator that has to tear its input into many modes.
        centre: taken off c_noise = ln(sigma) / 4. With ln(2 sigma_data) / 4 the network sees the same numbers whatever
            the data's unit; 0 is EDM's, for data of standard deviation 0.5.
        jumps: also told the level that a jump goes to, c_to (`networks.jumps`).
        octaves: frequencies of the noise embedding; fewer make derivatives in the level tamer.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        hidden: int = 128,
        depth: int = 3,
        n_classes: int = 0,
        out_features: int | None = None,
        activation: str = "silu",
        gain: float = 1.0,
        centre: float = 0.0,
        null_class: bool = False,
        jumps: bool = False,
        octaves: int = 8,
    ) -> None:
        super().__init__()
        shape, gain = _validate.shape("shape", shape), _validate.positive("gain", gain)
        hidden, depth = _validate.whole("hidden", hidden), _validate.whole("depth", depth, least=0)
        n_classes = _validate.whole("n_classes", n_classes, least=0)
        out_features = None if out_features is None else _validate.whole("out_features", out_features)
        more: dict[str, Any] = {"gain": (gain, 1), "centre": (centre, 0), "null_class": (null_class, False),
                                "jumps": (jumps, False), "octaves": (_validate.whole("octaves", octaves), 8)}
        self.config: dict[str, Any] = {
            "kind": "mlp", "shape": list(shape), "hidden": hidden, "depth": depth,
            "n_classes": n_classes, "out_features": out_features, "activation": activation,
        } | {name: value for name, (value, usual) in more.items() if value != usual}
        self.shape, self.n_classes, self.out_features = shape, n_classes, out_features
        self.centre = _validate.number("centre", centre)
        self.null_class = null_number(n_classes, null_class)
        self.activation = _validate.choose("activation", activation, ACTIVATIONS)
        features = math.prod(shape)
        self.noise = NoiseEmbedding(2 * octaves)
        self.condition = nn.Linear(2 * octaves, hidden)
        self.label = LabelEmbedding(n_classes + bool(null_class), hidden) if n_classes else None
        self.inward = nn.Linear(features, hidden)
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth))
        self.outward = nn.Linear(hidden, out_features or features)
        if gain != 1:
            with torch.no_grad():
                self.inward.weight *= gain
        self.where_to = WhereTo(NoiseEmbedding(8), nn.Linear(8, hidden)) if jumps else None

    @property
    def feature_channels(self) -> int:
        return self.outward.in_features

    def features(
        self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, c_to: Tensor | None = None
    ) -> Tensor:
        """The last hidden layer, (n, hidden)."""
        h = self.inward(x.flatten(1)) + self.condition(self.noise(c_noise - self.centre))
        if self.label is not None:
            h = h + self.label(label)
        if self.where_to is not None and c_to is not None:
            h = h + self.where_to(c_to)
        for block in self.blocks:
            h = h + self.activation(block(h))
        return h

    def forward(
        self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, c_to: Tensor | None = None
    ) -> Tensor:
        out = self.outward(self.features(x, c_noise, label, c_to))
        return out if self.out_features else out.reshape(x.shape)

