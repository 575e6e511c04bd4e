"""Discriminators: log p_sigma / q_sigma at every noise level, a network of its own or a head on features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minidistill import _validate
from minidistill.networks.denoisers import Denoiser, Preconditioned, check_input

__all__ = ["Discriminator", "FeatureDiscriminator"]


class Discriminator(Preconditioned):
    """logit(x, sigma, label), (n,): trained to tell noised data (1) from noised fakes (0), it estimates
    log p_sigma / q_sigma at every noise level."""

    def forward(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        label = check_input(self, x, label)
        s = _validate.broadcast_sigma(sigma, x, positive=True)
        scale = torch.rsqrt(s.square() + self.sigma_data**2)
        return self.run(scale * x, (s.log() / 4).flatten().expand(len(x)), label).flatten().to(x.dtype)


class FeatureDiscriminator(nn.Module):
    """logit(x, sigma, label), (n,), from a small head on a frozen denoiser's features, as DMD2 and f-distill have it:
    the teacher already knows what images look like at every noise level, so the head learns the ratio fast.

    `feature_channels` are the network's; the denoiser's weights are not part of this module.
    """

    def __init__(self, denoiser: Denoiser, hidden: int = 128) -> None:
        super().__init__()
        self._denoiser = [denoiser]
        channels = int(denoiser.network.feature_channels)  # type: ignore[arg-type]
        self.head = nn.Sequential(
            nn.GroupNorm(1, channels), nn.Conv2d(channels, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, 1, 1)
        )

    def forward(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        features = self._denoiser[0].features(x, sigma, label)
        features = features if features.ndim == 4 else features[:, :, None, None]
        own = next(self.head.parameters()).dtype
        return self.head(features.to(own)).mean((1, 2, 3)).to(x.dtype)  # a logit for every place of the image, averaged

