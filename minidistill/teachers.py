"""Teachers: anything that denoises, D(x, sigma, label).

An exact `GaussianMixture` is one already. `train_denoiser` makes one from data; the exact mixture's noised
samples and the trained network then meet in the same tests, samplers and distillations.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minidistill import _validate, training
from minidistill.networks import MLP, Denoiser
from minidistill.score_matching import denoising_loss, edm_weight, log_normal_sigma


def train_denoiser(
    data: Tensor,
    network: nn.Module | None = None,
    *,
    labels: Tensor | None = None,
    steps: int = 5000,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    sigma_mean: float = -1.2,
    sigma_std: float = 1.2,
    ema_halflife: float = 100_000,
    clip: float = 1.0,
    warmup: int = 100,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    callbacks: Sequence[training.Callback] = (),
    callback_every: int = 500,
) -> Denoiser:
    """Train D(x, sigma) by denoising score matching with EDM's weights and noise levels (Karras 2022).

    Args:
        data: (n, *shape), floating; kept on `device` as a whole.
        network: F(x, c_noise, label); None for an MLP of width 256, class-conditional if there are labels.
        labels: (n,) classes 0..c-1, for a class-conditional teacher.
        sigma_mean, sigma_std: of ln sigma, relative to data of standard deviation 0.5 as in EDM; other data
            shift the mean by ln(sigma_data / 0.5).
        ema_halflife: in samples seen.
        checkpoint, resume, callbacks: as in `training.fit`; the state's modules are "net" and "ema".
    Returns:
        the averaged (EMA) denoiser, in eval mode.
    Raises:
        ValueError, TypeError: data that is not (n, *shape), finite and floating; labels that do not fit it
            or the network; bad counts and rates; a checkpoint of another run.
    """
    _validate.samples("data", data, least=2)
    n_classes = 0
    if labels is not None:
        _validate.labels("labels", labels, len(data))
        n_classes = int(labels.max()) + 1
    for name, number in (("steps", steps), ("batch_size", batch_size)):
        _validate.whole(name, number)
    for name, value in (("learning_rate", learning_rate), ("sigma_std", sigma_std),
                        ("ema_halflife", ema_halflife), ("clip", clip)):
        _validate.positive(name, value)
    rng = training.generator_on(device, seed)
    torch.manual_seed(seed)  # initial weights and dropout
    if network is None:
        network = MLP(tuple(data.shape[1:]), hidden=256, depth=3, n_classes=n_classes)
    _fits(network, data, n_classes)
    data = data.to(device, torch.get_default_dtype())  # the networks' own
    labels = None if labels is None else labels.to(device)
    sigma_data = float(data.std())
    denoiser = Denoiser(network.to(device).train(), sigma_data)
    ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
    averages: list[Tensor] = list(ema.parameters())
    weights: list[Tensor] = list(denoiser.parameters())
    optimizer = torch.optim.Adam(denoiser.parameters(), learning_rate, betas=(0.9, 0.99), fused=True)
    shift = sigma_mean + torch.log(torch.tensor(sigma_data / 0.5)).item()

    def update(state: training.State) -> dict[str, Tensor]:
        index = torch.randint(len(data), (batch_size,), generator=rng, device=device)
        x0, label = data[index], None if labels is None else labels[index]
        sigma = log_normal_sigma(batch_size, shift, sigma_std, rng, device)
        noise = torch.randn(x0.shape, generator=rng, device=device)
        loss = denoising_loss(denoiser, x0, sigma, noise, label, edm_weight(sigma, sigma_data)).mean()
        training.set_learning_rate(optimizer, learning_rate * training.schedule(state.step, steps, warmup))
        training.optimizer_step(loss, optimizer, clip)
        training.update_ema(averages, weights, ema_halflife, batch_size, state.step)
        return {"loss": loss.detach()}

    config = {
        "run": "denoiser", "network": network.config, "data": [*data.shape], "sigma_data": sigma_data, "steps": steps,
        "batch_size": batch_size, "learning_rate": learning_rate, "sigma": [sigma_mean, sigma_std],
        "ema_halflife": ema_halflife, "clip": clip, "warmup": warmup, "seed": seed,
    }
    state = training.State({"net": denoiser, "ema": ema}, {"net": optimizer}, rng, config)
    training.fit(
        state, update, steps, progress=progress, description="teacher", callbacks=callbacks,
        callback_every=callback_every, checkpoint=checkpoint, checkpoint_every=checkpoint_every, resume=resume,
    )
    return ema


def _fits(network: nn.Module, data: Tensor, n_classes: int) -> None:
    shape, classes = getattr(network, "shape", None), getattr(network, "n_classes", None)
    if shape is None or classes is None:
        given = type(network).__name__
        raise TypeError(f"network is {given}; wanted one with .shape and .n_classes, such as MLP or UNet")
    if tuple(shape) != tuple(data.shape[1:]):
        raise ValueError(f"network takes samples of shape {tuple(shape)}, but data has {tuple(data.shape[1:])}")
    if bool(classes) != bool(n_classes) or classes < n_classes:
        raise ValueError(f"network has {classes} classes, but labels has {n_classes}; wanted labels for conditional "
                         "networks, none for others")
