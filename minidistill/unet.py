"""A small U-Net for images of 8x8 to 32x32: residual blocks, a little attention, skips from every block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention, silu

from minidistill.networks import NoiseEmbedding


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a skip; the embedding scales and shifts the second normalisation (AdaGN)."""

    def __init__(self, inward: int, outward: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inward), nn.Conv2d(inward, outward, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outward)
        self.norm2, self.conv2 = _norm(outward), nn.Conv2d(outward, outward, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(inward, outward, 1) if inward != outward else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # each block starts as its skip
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(self.dropout(silu(torch.addcmul(shift, self.norm2(h), 1 + scale))))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the pixels, heads of 64 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 64)
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = self.qkv(self.norm(x)).reshape(n, 3, self.heads, c // self.heads, h * w)
        q, k, v = parts.transpose(-1, -2).unbind(1)  # (n, heads, pixels, c / heads)
        mixed = scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(-1, -2).reshape(n, c, h, w))


class UNet(nn.Module):
    """F(x, c_noise, label) for images (n, c, h, w).

    Args:
        shape: (c, h, w) of one image; h and w divisible by 2^(levels - 1).
        channels: width at the first level.
        multipliers: width of each level as a multiple of `channels`; each level after the first halves h and w.
        blocks: residual blocks a level.
        attention: image sides at which attention follows each block, such as (8,).
        n_classes: 0 for an unconditional network.
    Raises:
        ValueError: a shape that can't be halved that often, or widths not divisible by 4.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        n_classes: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "kind": "unet", "shape": list(shape), "channels": channels, "multipliers": list(multipliers),
            "blocks": blocks, "attention": list(attention), "n_classes": n_classes, "dropout": dropout,
        }
        halvings = len(multipliers) - 1
        if len(shape) != 3 or shape[1] % 2**halvings or shape[2] % 2**halvings:
            raise ValueError(f"shape={tuple(shape)}: wanted (c, h, w) with h and w divisible by {2**halvings}")
        if channels % 4:
            raise ValueError(f"channels={channels}: wanted a multiple of 4")
        self.shape, self.n_classes = tuple(shape), n_classes
        width, side = 4 * channels, shape[1]
        self.noise = NoiseEmbedding(channels)
        self.embed = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(n_classes, width) if n_classes else None
        self.first = nn.Conv2d(shape[0], channels, 3, padding=1)

        def block(inward: int, outward: int) -> nn.ModuleList:
            layers: list[nn.Module] = [ResBlock(inward, outward, width, dropout)]
            return nn.ModuleList([*layers, Attention(outward)] if side in attention else layers)

        skips = [channels]
        now = channels
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            if level:
                side //= 2
                self.down.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
                skips.append(now)
            for _ in range(blocks):
                self.down.append(block(now, multiplier * channels))
                now = multiplier * channels
                skips.append(now)
        self.middle = nn.ModuleList(
            [ResBlock(now, now, width, dropout), Attention(now), ResBlock(now, now, width, dropout)]
        )
        self.up = nn.ModuleList()
        for level in reversed(range(len(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(block(now + skips.pop(), multipliers[level] * channels))
                now = multipliers[level] * channels
            if level:
                side *= 2
                self.up.append(nn.Conv2d(now, now, 3, padding=1))
        self.last_norm, self.outward = _norm(now), nn.Conv2d(now, shape[0], 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        embedding = self.embed(self.noise(c_noise))
        if self.label is not None:
            embedding = embedding + self.label(label)
        embedding = silu(embedding)  # (n, 4 channels)
        h = self.first(x)
        skips = [h]
        for stage in self.down:
            h = _apply(stage, h, embedding)
            skips.append(h)
        h = _apply(self.middle, h, embedding)
        for stage in self.up:
            if isinstance(stage, nn.Conv2d):
                h = stage(interpolate(h, scale_factor=2.0))
            else:
                h = _apply(stage, torch.cat([h, skips.pop()], 1), embedding)
        return self.outward(silu(self.last_norm(h)))


def _apply(stage: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
    if isinstance(stage, nn.Conv2d):
        return stage(h)
    for layer in stage:  # type: ignore[attr-defined]
        h = layer(h, embedding)
    return h
