"""Which way to run a training step is the fastest on this machine? Each is tried for a few seconds."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minidistill import data, training
from minidistill.networks import Denoiser, UNet
from minidistill.score_matching import denoising_loss, edm_weight, log_normal_sigma
from minidistill.studies.cifar10_quality import until
from minidistill.training import Speed, checkpoints

__all__ = ["SPEEDS", "fastest", "hardware", "throughput", "without_compiling"]

SPEEDS = {
    "float32": Speed(),
    "bfloat16": Speed("bfloat16"),
    "bfloat16, channels last": Speed("bfloat16", channels_last=True),
    "bfloat16, channels last, compiled": Speed("bfloat16", channels_last=True, compile=True),
}
PATIENCE = 60  # seconds, for a way to run a training step to be tried


def fastest(
    network: Callable[[], UNet], where: str, file: Path, batch_size: int, images: Tensor, labels: Tensor, device: str
) -> Speed:
    """Try each way to run one training step for a few seconds. `file` keeps what was found, under the name `where`."""
    found = json.loads(file.read_text()).get(where) if file.exists() else None
    if found is None:
        # Compiling takes a minute that only a GPU's speed pays back; on CPUs the memory order matters little.
        tried = SPEEDS if device.startswith("cuda") else ("float32", "bfloat16")
        found = {name: _tried(network(), SPEEDS[name], batch_size, images, labels, device) for name in tried}
        with checkpoints.atomic(file) as path:
            path.write_text(json.dumps({where: found}, indent=1) + "\n")
    print("images/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in found.items()), flush=True)
    return SPEEDS[max(found, key=lambda name: found[name])]


def _tried(
    network: UNet, speed: Speed, batch_size: int, images: Tensor, labels: Tensor, device: str
) -> float:
    """Images per second; 0 for what does not run here, or takes longer to get going than it could ever save."""
    rate = 0.0
    with until(time.monotonic() + PATIENCE):
        try:
            rate = throughput(network, speed, batch_size, images, labels, device)
        except RuntimeError as error:  # of a compiler that is missing or fails, or of memory that does not suffice
            print(f"{speed}: {str(error).splitlines()[0]}", flush=True)
    return rate


def without_compiling(speed: Speed) -> Speed:
    """A student has three networks to compile, which takes minutes of the few there are."""
    return Speed(speed.precision, speed.channels_last)


def throughput(
    network: UNet, speed: Speed, batch_size: int, images: Tensor, labels: Tensor, device: str, seconds: float = 4.0
) -> float:
    """Images per second of the teacher's training step (forward, backward, Adam), after a warm-up."""
    model = Denoiser(network.to(device), 0.5)
    speed.apply(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    rng = training.generator_on(device, 0)
    x0, label = data.to_float(images[:batch_size].to(device)), labels[:batch_size].to(device)

    def step() -> None:
        sigma = log_normal_sigma(len(x0), -1.2, 1.2, rng, device)
        noise = torch.randn(x0.shape, generator=rng, device=device)
        loss = denoising_loss(model, x0, sigma, noise, label, edm_weight(sigma, 0.5)).mean()
        training.optimizer_step(loss, optimizer, 1.0)

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        wait()
        count += 1
    return count * len(x0) / (time.perf_counter() - start)


def hardware(device: str) -> str:
    """The device in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} x {platform.machine()} CPU cores"
