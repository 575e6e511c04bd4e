"""A learned teacher: `train_denoiser`, denoising score matching with EDM's weights and noise levels."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from minidistill import _validate, training
from minidistill._random import seeded
from minidistill.data import random_flip, to_float
from minidistill.networks import MLP, Denoiser, reserve_null_class
from minidistill.score_matching import denoising_loss, edm_weight, log_normal_sigma
from minidistill.training import Speed, parallel

__all__ = ["train_denoiser"]


def train_denoiser(
    data: Tensor,
    network: nn.Module | None = None,
    *,
    labels: Tensor | None = None,
    drop_label: float = 0.0,
    steps: int = 5000,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    sigma_mean: float = -1.2,
    sigma_std: float = 1.2,
    ema_halflife: float = 100_000,
    clip: float = 1.0,
    warmup: int = 100,
    hold: float = 0.2,
    flip: bool = False,
    accumulate: int = 1,
    speed: Speed | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    **fit_options: Any,
) -> Denoiser:
    """Train D(x, sigma) by denoising score matching with EDM's weights and noise levels (Karras 2022).

    Args:
        data: (n, *shape), floating, or images as bytes (uint8), which are trained on as [-1, 1]; kept on `device`
            as a whole.
        network: F(x, c_noise, label); None for an MLP of width 256, class-conditional if there are labels.
        labels: (n,) classes 0..c-1, for a class-conditional teacher.
        drop_label: this share of the labels is replaced by a null class, the network's last, which so learns the
            unconditional denoiser that `classifier_free(D, scale, unconditional=c)` needs (Ho 2022). A network must
            have c + 1 classes for that, or c and `null_class=True`; the default one has. The denoiser then has c
            `n_classes`, to draw and to measure, and c is its `null_class`.
        sigma_mean, sigma_std: of ln sigma, relative to data of standard deviation 0.5 as in EDM; other data
            shift the mean by ln(sigma_data / 0.5).
        ema_halflife: in samples seen.
        warmup, hold: the learning rate rises for `warmup` steps, stays until `hold` of the run, and falls to 0
            (hold = 1: never).
        flip: mirror each image left to right half of the time.
        accumulate: pieces that a batch is computed in, one after the other, where memory is short.
        speed: precision, memory format, compilation.
        fit_options: `checkpoint`, `resume`, `callbacks`, `progress`, `minutes`, ... of `training.fit`; the state's
            modules are "net" and "ema".
    Returns:
        the averaged (EMA) denoiser, in eval mode.
    Raises:
        ValueError, TypeError: data that is not (n, *shape), finite and floating or bytes; labels that do not fit it
            or the network; bad counts and rates; a checkpoint of another run.
    """
    if not (isinstance(data, Tensor) and data.dtype == torch.uint8 and data.ndim == 4):
        _validate.samples("data", data, least=2)
    n_classes = 0
    if labels is not None:
        labels = _validate.labels("labels", labels, len(data))
        n_classes = int(labels.max()) + 1
    drop_label = _validate.number("drop_label", drop_label)
    if not 0 <= drop_label < 1 or (drop_label and labels is None):
        raise ValueError(f"drop_label={drop_label!r}: wanted a share from 0 to below 1, and above 0 only with labels")
    n_classes += drop_label > 0  # the null class
    steps, batch_size = _validate.whole("steps", steps), _validate.whole("batch_size", batch_size)
    accumulate, sigma_mean = _validate.whole("accumulate", accumulate), _validate.number("sigma_mean", sigma_mean)
    learning_rate, sigma_std, ema_halflife, clip, hold = (_validate.positive(name, value) for name, value in (
        ("learning_rate", learning_rate), ("sigma_std", sigma_std), ("ema_halflife", ema_halflife), ("clip", clip),
        ("hold", hold)))
    warmup = _validate.whole("warmup", warmup, least=0)
    mine = parallel.parts(batch_size, accumulate)
    if flip and data.ndim != 4:
        raise ValueError(f"flip=True: wanted images (n, c, h, w), but data has shape {tuple(data.shape)}")
    device = _validate.device("device", device)
    rng = training.generator_on(device, seed)
    with seeded(seed, device):  # initial weights and dropout
        if network is None:  # one that sees the same numbers whatever the data's unit
            scale = _validate.positive("data's standard deviation", _standard_deviation(data))
            centre = math.log(2 * scale) / 4
            network = MLP(tuple(data.shape[1:]), hidden=256, depth=3, n_classes=n_classes, centre=centre)
        _validate.fits(network, tuple(data.shape[1:]), n_classes)
        recipe = copy.deepcopy(getattr(network, "config", type(network).__name__))
        if drop_label and getattr(network, "null_class", None) is None:
            reserve_null_class(network)
        if data.is_floating_point():
            data = data.to(torch.get_default_dtype())  # the networks' own
        checksums = {"data": training.fingerprint(data), "labels": training.fingerprint(labels)}
        data, labels = data.to(device), None if labels is None else labels.to(device)
        sigma_data = _validate.positive("data's standard deviation", _standard_deviation(data))
        denoiser = Denoiser(network.to(device).train(), sigma_data)
        ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
        (speed or Speed()).apply(denoiser, ema)
        optimizer = torch.optim.Adam(denoiser.parameters(), learning_rate, betas=(0.9, 0.99), fused=True)
        shift = sigma_mean + math.log(sigma_data / 0.5)
        model = parallel.wrap(denoiser)

        def update(state: training.State) -> dict[str, Tensor]:
            index = torch.randint(len(data), (batch_size,), generator=rng, device=device)
            sigma = log_normal_sigma(batch_size, shift, sigma_std, rng, device)
            noise = torch.randn((batch_size, *data.shape[1:]), generator=rng, device=device)
            x0 = to_float(data[index])
            x0 = random_flip(x0, rng) if flip else x0
            classes = None if labels is None else labels[index]
            if classes is not None and drop_label:
                dropped = torch.rand(batch_size, generator=rng, device=device) < drop_label
                classes = classes.masked_fill(dropped, int(network.null_class))  # type: ignore
            training.set_learning_rate(optimizer, learning_rate * training.schedule(state.step, steps, warmup, hold))
            loss = torch.zeros((), device=device)
            for number, i in enumerate(mine, 1):
                with parallel.last_only(number == len(mine), model):
                    label = None if classes is None else classes[i]
                    weight = edm_weight(sigma[i], sigma_data)
                    piece = denoising_loss(model, x0[i], sigma[i], noise[i], label, weight).mean() / len(mine)
                    training.backward(piece, optimizer)
                loss += piece.detach()
            skipped = training.descend(optimizer, clip)
            training.update_ema(ema, denoiser, ema_halflife, batch_size, state.step)
            return {"loss": loss, "skipped": skipped}

        config = {
            "run": "denoiser", "network": recipe, "data": [*data.shape], "sigma_data": sigma_data, "steps": steps,
            "batch_size": batch_size, "learning_rate": learning_rate, "sigma": [sigma_mean, sigma_std],
            "ema_halflife": ema_halflife, "clip": clip, "warmup": warmup, "hold": hold, "flip": flip, "seed": seed,
            "checksums": checksums,
        }
        if drop_label:
            config["drop_label"] = drop_label
        state = training.State({"net": denoiser, "ema": ema}, {"net": optimizer}, rng, config)
        training.fit(state, update, steps, batch_size=batch_size, **({"description": "teacher"} | fit_options))
        return ema


def _standard_deviation(data: Tensor) -> float:
    """Of all values; bytes are counted instead of turned into floats, of which there would be four times as many."""
    if data.is_floating_point():
        return float(data.std())
    counts = torch.bincount(data.flatten(), minlength=256).double()
    values = to_float(torch.arange(256, dtype=torch.uint8, device=data.device)).double()
    mean = (counts * values).sum() / counts.sum()
    return float(((counts * (values - mean).square()).sum() / counts.sum()).sqrt())
