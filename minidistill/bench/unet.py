"""One training step of `unet.preset` against diffusers' `UNet2DModel` of the same widths, levels and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minidistill._random import seeded
from minidistill.bench.timing import Row, alternate
from minidistill.networks import Denoiser
from minidistill.networks.unet import UNet, preset
from minidistill.score_matching import denoising_loss, edm_weight, log_normal_sigma

__all__ = ["Peer", "bench", "training_step"]


class Peer(nn.Module):
    """diffusers' UNet2DModel built like `network`, as F(x, c_noise, label): c_noise is its timestep."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        config = network.config
        widths = [multiplier * config["channels"] for multiplier in config["multipliers"]]
        attended = [network.shape[1] // 2**level in config["attention"] for level in range(len(widths))]
        groups = min(32, config["channels"] // 4)
        self.shape, self.n_classes = network.shape, network.n_classes
        self.model = _diffusers().UNet2DModel(
            sample_size=network.shape[1:], in_channels=network.shape[0], out_channels=network.shape[0],
            block_out_channels=widths, layers_per_block=config["blocks"], dropout=config["dropout"],
            down_block_types=["AttnDownBlock2D" if here else "DownBlock2D" for here in attended],
            up_block_types=["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)],
            attention_head_dim=min(64, widths[-1]), norm_num_groups=groups, attn_norm_num_groups=groups,
            resnet_time_scale_shift="scale_shift", num_class_embeds=network.n_classes or None,
        )

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return self.model(x, c_noise, class_labels=label, return_dict=False)[0]


def training_step(
    network: nn.Module, batch: int, dtype: torch.dtype, device: str | torch.device
) -> Callable[[], float]:
    """A function that takes one step on fixed noised images, EDM's loss and fused Adam, and returns the loss. A dtype
    other than float32 is autocast's."""
    rng = torch.Generator(device).manual_seed(0)
    denoiser = Denoiser(network, 0.5).to(device).train()
    optimizer = torch.optim.Adam(denoiser.parameters(), 2e-4, fused=True)
    x0, noise = torch.randn(2, batch, *denoiser.shape, generator=rng, device=device)
    sigma = log_normal_sigma(batch, -1.2, 1.2, rng, device)
    weight = edm_weight(sigma, 0.5)

    def step() -> float:
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            loss = denoising_loss(denoiser, 0.5 * x0, sigma, noise, weight=weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def bench(
    short: bool = False, *, device: str | torch.device = "cpu", size: str = "tiny", progress: bool = True
) -> list[Row]:
    """Median seconds of one step of each: batch 64 (16 if `short`) of 3x32x32, float32, and bfloat16 too on CUDA.

    Raises:
        ImportError: diffusers is missing. ValueError: unknown size. AssertionError: the two differ by more than 10 % in
        parameters.
    """
    version = f"diffusers {_diffusers().__version__}"
    batch, repeats, warmup = (16, 3, 1) if short else (64, 20, 3)
    cuda = torch.device(device).type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} thread(s)"
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
        with seeded(0):
            network = preset(size)
            peer = Peer(network)
        n, m = (sum(p.numel() for p in each.parameters()) for each in (network, peer))
        assert abs(n / m - 1) < 0.1, f"{n:,} and {m:,} parameters: not alike"
        kind = str(dtype).removeprefix("torch.")
        ours, theirs = alternate(
            training_step(network, batch, dtype, device), training_step(peer, batch, dtype, device), repeats, warmup,
            device=device, progress=progress, description=f"unet {size} {kind}",
        )
        name = f"unet {size} training step, batch {batch}, {kind}, {where}, {n:,} / {m:,} parameters"
        rows.append({"name": name, "ours": ours, "peer": theirs, "peer_version": version, "ratio": ours / theirs,
                     "unit": "s/step"})
    return rows


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("this benchmark needs diffusers: pip install 'minidistill[diffusers]'") from error
    return diffusers
