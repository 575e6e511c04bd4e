"""Small classifiers whose features measure image quality where Inception's would need a download.

The one for CIFAR-10 is stored in `weights/`; this command makes the file again, in a quarter of an hour on one core:

    minidistill classifier --out minidistill/metrics/weights/cifar10_classifier.safetensors
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.fusion import fuse_conv_bn_eval

from minidistill import _validate, data, training
from minidistill._random import seeded
from minidistill.training import checkpoints

__all__ = [
    "CIFAR10_STEPS", "CIFAR10_WEIGHTS", "Classifier", "ConvClassifier", "FeatureClassifier", "augment", "load",
    "load_cifar10", "save", "train_cifar10_classifier", "train_classifier",
]

CIFAR10_WEIGHTS = Path(__file__).parent / "weights" / "cifar10_classifier.safetensors"
CIFAR10_STEPS = 4000


class Classifier(nn.Module):
    """Logits (n, classes) = head(body(images)); the body's output is what `features` gives."""

    body: nn.Module
    head: nn.Module

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer, (n, features), of images (n, *shape)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    @torch.no_grad()
    def recognised(self, x: Tensor, label: Tensor) -> float:
        """The fraction of images classified as their label."""
        return float((self(x).argmax(1) == label).double().mean())


class FeatureClassifier(Classifier):
    """Two hidden layers on the pixels of images (n, *shape); `features` gives the second, (n, 32)."""

    def __init__(self, shape: tuple[int, ...], n_classes: int, hidden: int = 128, features: int = 32) -> None:
        super().__init__()
        pixels = int(torch.Size(shape).numel())
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, features), nn.ReLU()
        )
        self.head = nn.Linear(features, n_classes)


class ConvClassifier(Classifier):
    """Stages of 3x3 convolutions and ReLUs on images (n, *shape) in [-1, 1], halved in size between the stages;
    `features` are the last stage's channels averaged over the image, (n, stages[-1][-1]).

    Args:
        shape: of one image: channels, height, width; the sides at least 2 ** (number of stages - 1).
        stages: for each stage, its convolutions' channels.
        norm: a batch norm after every convolution, for training; `folded` takes them out again.
    """

    def __init__(
        self, shape: tuple[int, ...] = (3, 32, 32), n_classes: int = 10,
        stages: Sequence[Sequence[int]] = ((32,), (64,), (128, 128), (128,)), norm: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "shape": list(shape), "n_classes": n_classes, "stages": [list(stage) for stage in stages],
        }
        self.info: dict[str, Any] = {}  # how it was trained and how good it is, once stored
        layers: list[nn.Module] = []
        width = shape[0]
        for number, stage in enumerate(stages):
            layers += [nn.MaxPool2d(2)] if number else []
            for channels in stage:
                layers.append(nn.Conv2d(width, channels, 3, padding=1, bias=not norm))
                layers += [nn.BatchNorm2d(channels), nn.ReLU()] if norm else [nn.ReLU()]
                width = channels
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, n_classes)

    def folded(self) -> ConvClassifier:
        """The same function in eval mode, frozen, with every batch norm multiplied into its convolution: an image's
        features depend on no other image of the batch."""
        with seeded(0):  # the weights are replaced
            out = ConvClassifier(**self.config)
        bare: list[nn.Module] = []
        for layer in copy.deepcopy(self).eval().body.children():
            if isinstance(layer, nn.BatchNorm2d):
                bare[-1] = fuse_conv_bn_eval(bare[-1], layer)  # type: ignore[type-var]
            else:
                bare.append(layer)
        out.body, out.head = nn.Sequential(*bare), copy.deepcopy(self.head)
        return out.eval().requires_grad_(False)


def train_classifier(
    images: Tensor, labels: Tensor, *, steps: int = 1500, batch_size: int = 128, seed: int = 0, progress: bool = True
) -> FeatureClassifier:
    """Fit on images (n, *shape) and labels (n,) with a little noise for augmentation; about a second for the digits."""
    _validate.samples("images", images, least=2)
    labels = _validate.labels("labels", labels, len(images))
    rng = training.generator_on("cpu", seed)
    with seeded(seed):  # initial weights
        model = FeatureClassifier(tuple(images.shape[1:]), int(labels.max()) + 1)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, weight_decay=1e-4, fused=True)

    def update(state: training.State) -> dict[str, Tensor]:
        index = torch.randint(len(images), (batch_size,), generator=rng)
        x = images[index]
        loss = cross_entropy(model(x + 0.2 * torch.randn(x.shape, generator=rng)), labels[index])
        training.optimizer_step(loss, optimizer)
        return {"loss": loss.detach()}

    training.fit(training.State({"net": model}, {"net": optimizer}, rng), update, steps,
                 progress=progress, description="classifier")
    return model.eval().requires_grad_(False)


def train_cifar10_classifier(
    images: Tensor, labels: Tensor, *, steps: int = CIFAR10_STEPS, batch_size: int = 256, learning_rate: float = 0.2,
    seed: int = 0, device: str | torch.device = "cpu", progress: bool = True, **fit_options: Any,
) -> ConvClassifier:
    """Fit a `ConvClassifier` on images (n, c, h, w), uint8 or floats in [-1, 1], and labels (n,), with flips and shifts
    by up to 4 pixels: SGD with momentum on one cycle of the learning rate, convolutions in bfloat16.

    `fit_options` go to `training.fit` (checkpoint, resume, ...). Returns the folded model in eval mode, on the device.
    Raises ValueError or TypeError for images and labels that do not fit.
    """
    least = 2
    if images.dtype != torch.uint8:
        _validate.samples("images", images, least=least)
    if images.ndim != 4 or len(images) < least:
        raise ValueError(f"images has shape {tuple(images.shape)}; wanted (n, c, h, w) with n >= {least}")
    labels, batch_size = (
        _validate.labels("labels", labels, len(images)), _validate.whole("batch_size", batch_size, least=2))
    device, rng = _validate.device("device", device), training.generator_on("cpu", seed)
    with seeded(seed):  # initial weights
        model = ConvClassifier(tuple(images.shape[1:]), int(labels.max()) + 1, norm=True)
    model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def update(state: training.State) -> dict[str, Tensor]:
        factor = training.schedule(state.step, steps, warmup=max(1, steps // 5), hold=0.2)
        training.set_learning_rate(optimizer, learning_rate * factor)
        index = torch.randint(len(images), (batch_size,), generator=rng)
        x = augment(data.to_float(images[index]), rng).to(device, memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = cross_entropy(model(x), labels[index].to(device))
        training.optimizer_step(loss, optimizer)
        return {"loss": loss.detach()}

    config = {"images": list(images.shape), "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate,
              "seed": seed, "network": model.config,
              "checksums": {"images": training.fingerprint(images), "labels": training.fingerprint(labels)}}
    training.fit(training.State({"net": model}, {"net": optimizer}, rng, config), update, steps,
                 **{"progress": progress, "description": "classifier", **fit_options})
    return model.folded()


def augment(images: Tensor, rng: torch.Generator, reach: int = 4) -> Tensor:
    """Each image (n, c, h, w) mirrored left to right with probability 1/2 and shifted by up to `reach` pixels either
    way, what comes in at the border being the image's own reflection."""
    n, _, height, width = images.shape
    windows = pad(data.random_flip(images, rng), (reach,) * 4, mode="reflect").unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * reach + 1, (2, n), generator=rng)
    return windows[torch.arange(n), :, down, right]


def save(path: str | Path, model: ConvClassifier, **info: Any) -> None:
    """A folded classifier to one file, in float16, with `info` beside it as JSON."""
    weights = checkpoints.halved(path, model.state_dict())
    recipe = json.dumps({"network": model.config, "info": info})
    checkpoints.write(checkpoints.writable(path), weights, {"kind": "classifier", "recipe": recipe})


def load(path: str | Path) -> ConvClassifier:
    """A classifier that `save` wrote, in float32, eval mode and frozen; its `info` says how it was made.

    Raises FileNotFoundError, or ValueError for a file that is corrupt, of another kind or another architecture."""
    model, recipe, _ = checkpoints.load_network(path, ["classifier"], lambda config: ConvClassifier(**config))
    with checkpoints.malformed(path):
        model.info = dict(recipe["info"])
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


def load_cifar10() -> ConvClassifier:
    """The stored classifier of CIFAR-10 images (n, 3, 32, 32) in [-1, 1]: 128 features, 10 classes, on the CPU. Its
    `info` has the accuracy on the test set and the command that trained it; nothing is downloaded."""
    return load(CIFAR10_WEIGHTS)
