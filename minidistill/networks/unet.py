"""A U-Net for images: residual blocks, a little attention, skips from every block; three sizes by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, pixel_shuffle, pixel_unshuffle, scaled_dot_product_attention, silu

from minidistill import _validate
from minidistill.networks.jumps import WhereTo
from minidistill.networks.mlp import LabelEmbedding, NoiseEmbedding, frequencies, null_number

__all__ = ["PRESETS", "Attention", "Pointwise", "ResBlock", "UNet", "grow", "preset"]


def _norm(channels: int) -> nn.GroupNorm:
    """Groups of four channels or more, 32 groups at most."""
    return nn.GroupNorm(next(g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0), channels)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution, on a CPU as the matrix product that it is: twice as fast as oneDNN's convolution at 32x32."""

    def __init__(self, inward: int, outward: int) -> None:
        super().__init__(inward, outward, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        weight = self.weight.flatten(1).expand(len(x), -1, -1)  # (n, outward, inward), no copy
        return torch.baddbmm(self.bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])  # type: ignore


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a skip; the embedding scales and shifts the second normalisation (AdaGN)."""

    def __init__(self, inward: int, outward: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inward), nn.Conv2d(inward, outward, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outward)
        self.norm2, self.conv2 = _norm(outward), nn.Conv2d(outward, outward, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.skip = Pointwise(inward, outward) if inward != outward else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # each block starts as its skip
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(self.dropout(silu(torch.addcmul(shift, self.norm2(h), 1 + scale))))
        return h.add_(self.skip(x))  # in place: nothing needs h, and fresh memory costs as much as the sum


class Attention(nn.Module):
    """Self-attention over the pixels, heads of 64 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = next(heads for heads in range(max(1, channels // 64), 0, -1) if channels % heads == 0)
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        # Pixels first, channels last: the fused kernels of attention want each head's channels side by side.
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (n, h w, c)
        parts = linear(pixels, self.qkv.weight.flatten(1), self.qkv.bias).unflatten(2, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each (n, heads, h w, c / heads)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + linear(mixed, self.out.weight.flatten(1), self.out.bias).transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    """F(x, c_noise, label) for images (n, c, h, w).

    Args:
        shape: (c, h, w) of one image; h and w divisible by patch * 2^(levels - 1).
        channels: width at the first level.
        multipliers: width of each level as a multiple of `channels`; each level after the first halves h and w.
        blocks: residual blocks a level.
        attention: sides, in patches, at which attention follows each block, such as (8,).
        n_classes: 0 for an unconditional network.
        null_class: one more class, number n_classes, for samples whose class is not told.
        patch: patch x patch pixels become one position with patch^2 times as many channels, so that an image of 32x32
            costs with patch 2 what one of 16x16 costs (as in Hoogeboom 2023, simple diffusion, section 3.3).
        jumps: also told the level that a jump goes to, c_to (`networks.jumps`).
    Attributes:
        feature_channels: c of what `features` returns, (n, c, h, w).
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
        null_class: bool = False,
        patch: int = 1,
        jumps: bool = False,
    ) -> None:
        super().__init__()
        shape, channels = _validate.shape("shape", shape), _validate.whole("channels", channels)
        patch = _validate.whole("patch", patch)
        multipliers = _validate.shape("multipliers", multipliers, "whole numbers >= 1, one a level")
        blocks, n_classes = _validate.whole("blocks", blocks), _validate.whole("n_classes", n_classes, least=0)
        attention = [_validate.whole("attention", side) for side in attention]
        dropout = _validate.number("dropout", dropout, 0, 1)
        self.config: dict[str, Any] = {
            "kind": "unet", "shape": list(shape), "channels": channels, "multipliers": list(multipliers),
            "blocks": blocks, "attention": attention, "n_classes": n_classes, "dropout": dropout,
        } | ({"null_class": True} if null_class else {}) | ({"patch": patch} if patch > 1 else {}) | (
            {"jumps": True} if jumps else {})
        divisor = patch * 2 ** (len(multipliers) - 1)
        if len(shape) != 3 or shape[1] % divisor or shape[2] % divisor:
            raise ValueError(f"shape={shape}: wanted (c, h, w) with h and w divisible by {divisor}")
        if channels % 4:
            raise ValueError(f"channels={channels}: wanted a multiple of 4")
        self.shape, self.n_classes, self.null_class = shape, n_classes, null_number(n_classes, null_class)
        self.patch, colours = patch, shape[0] * patch**2
        width, side = 4 * channels, shape[1] // patch
        self.noise = NoiseEmbedding(channels)
        # The MLP's octaves, 0 to 7, sampled more finely: far higher frequencies would turn rounding into noise.
        self.noise.frequencies = frequencies(torch.linspace(0, 7, channels // 2, device="cpu"))
        self.embed = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.label = LabelEmbedding(n_classes + bool(null_class), width) if n_classes else None
        self.first = nn.Conv2d(colours, channels, 3, padding=1)

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
        self.feature_channels = now
        self.up = nn.ModuleList()
        for level in reversed(range(len(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(block(now + skips.pop(), multipliers[level] * channels))
                now = multipliers[level] * channels
            if level:
                side *= 2
                self.up.append(nn.Conv2d(now, now, 3, padding=1))
        self.last_norm, self.outward = _norm(now), nn.Conv2d(now, colours, 3, padding=1)
        self.where_to = None if not jumps else WhereTo(
            NoiseEmbedding(8), nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))

    def features(
        self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, c_to: Tensor | None = None
    ) -> Tensor:
        """The bottleneck, after the middle block: (n, feature_channels, h, w) at the lowest level's h and w.
        Nothing above it is computed, so that a discriminator's head costs half a network."""
        return self._encode(x, c_noise, label, c_to)[0]

    def forward(
        self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, c_to: Tensor | None = None
    ) -> Tensor:
        h, skips, embedding = self._encode(x, c_noise, label, c_to)
        for stage in self.up:
            if isinstance(stage, nn.Conv2d):
                h = stage(interpolate(h, scale_factor=2.0))
            else:
                h = _apply(stage, torch.cat([h, skips.pop()], 1), embedding)
        return pixel_shuffle(self.outward(silu(self.last_norm(h))), self.patch)

    def _encode(
        self, x: Tensor, c_noise: Tensor, label: Tensor | None, c_to: Tensor | None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """(bottleneck, the way up's skips, embedding (n, 4 channels))."""
        embedding = self.embed(self.noise(c_noise))
        if self.label is not None:
            embedding = embedding + self.label(label)
        if self.where_to is not None and c_to is not None:
            embedding = embedding + self.where_to(c_to)
        embedding = silu(embedding)
        h = self.first(pixel_unshuffle(x, self.patch))
        skips = [h]
        for stage in self.down:
            h = _apply(stage, h, embedding)
            skips.append(h)
        return _apply(self.middle, h, embedding), skips, embedding


def _apply(stage: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
    if isinstance(stage, nn.Conv2d):
        return stage(h)
    for layer in stage:  # type: ignore[attr-defined]
        h = layer(h, embedding)
    return h


#: Sizes by name, for images of 32x32: 1.7, 9.6 and 38 million parameters. The last is DDPM++'s shape (Song 2021).
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"channels": 32, "multipliers": (1, 2, 2), "blocks": 2, "attention": (8,)},
    "small": {"channels": 64, "multipliers": (1, 2, 2, 2), "blocks": 2, "attention": (16,)},
    "base": {"channels": 128, "multipliers": (1, 2, 2, 2), "blocks": 2, "attention": (16,), "dropout": 0.1},
}


def preset(name: str, shape: tuple[int, ...] = (3, 32, 32), n_classes: int = 0, **overrides: Any) -> UNet:
    """A `UNet` of a named size: "tiny" (trains on a CPU), "small" or "base". `overrides` replace its arguments."""
    size: dict[str, Any] = _validate.choose("name", name, PRESETS)
    return UNet(shape, n_classes=n_classes, **{**size, **overrides})


@torch.no_grad()
def grow(network: UNet) -> UNet:
    """A network for images of twice the side that starts where `network` (patch 1) is, and costs as much to run.

    Each position now holds 2x2 pixels. Of images x at noise level sigma it sees the means of the patches, which are the
    small images at level sigma / 2, and gives all four pixels what `network` gives their mean:

        grown(x, c_noise) = each pixel four times of network(average of 2x2 of x, c_noise - ln(2) / 4).

    The rest, four pixels that differ, is for training to find.
    """
    if network.patch != 1:
        raise ValueError(f"network has patch={network.patch}: wanted one with patch 1")
    colours, height, width = network.shape
    config = {name: value for name, value in network.config.items() if name != "kind"}
    grown = UNet(**{**config, "shape": (colours, 2 * height, 2 * width), "patch": 2})
    weights = dict(network.state_dict())
    # Channel c of a pixel stands at 4 c to 4 c + 3 of its patch.
    weights["first.weight"] = weights["first.weight"].repeat_interleave(4, 1) / 4
    for name in ("outward.weight", "outward.bias"):
        weights[name] = weights[name].repeat_interleave(4, 0)
    # A shift of c_noise turns each (sine, cosine) of its embedding by a fixed angle: a linear map, which the next layer
    # can take over. sin(a - t) = cos(t) sin(a) - sin(t) cos(a), cos(a - t) = sin(t) sin(a) + cos(t) cos(a).
    sine, cosine = weights["embed.0.weight"].chunk(2, 1)
    turn = math.log(2) / 4 * network.noise.frequencies / 4
    weights["embed.0.weight"] = torch.cat(
        [turn.cos() * sine + turn.sin() * cosine, turn.cos() * cosine - turn.sin() * sine], 1)
    grown.load_state_dict(weights)
    return grown.to(next(network.parameters()).device)
