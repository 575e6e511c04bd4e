"""What a distillation starts from: the student, the fake network, the density ratio, real samples and pairs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minidistill import _validate
from minidistill.data import random_flip, to_float
from minidistill.distillation.pairs import Pairs
from minidistill.networks import MLP, Correction, Denoiser, Discriminator, FeatureDiscriminator, Generator

__all__ = [
    "Needs", "Real", "Run", "check_data", "device_of", "has_weights", "prepare", "real_samples", "shape_of",
    "sigma_data_of",
]

Real = Callable[[int], "tuple[Tensor, Tensor | None]"]  # n -> (samples, labels)


@dataclass(frozen=True)
class Needs:
    """What an objective asks for, each by an attribute of its own (`needs_ratio`, ..., `critic_steps`)."""

    ratio: bool = False  # a discriminator that learns log p / q, and real samples for it
    real: bool = False  # real samples alone
    features: bool = False  # a fake network with `.features(x, sigma, label)`
    pairs: int = 0  # so many pairs of noise and the teacher's samples
    uniform: bool = False  # a number in [0, 1) for each sample
    critic_steps: int | None = None  # critic updates for each of the student's, unless the caller says how many
    learning_rate: float | None = None  # of the student, unless the caller says which; and likewise
    warmup: int | None = None  # steps in which that rises
    gradient_clip: float | None = None  # bound on the norm of either gradient

    @property
    def data(self) -> bool:
        """Whether it compares with real samples."""
        return self.ratio or self.real

    @classmethod
    def of(cls, objective: object) -> Needs:
        needs = {name: f"needs_{name}" for name in ("ratio", "real", "features", "pairs", "uniform")}
        own = {name: name for name in ("critic_steps", "learning_rate", "warmup", "gradient_clip")}
        return cls(**{name: getattr(objective, attribute, getattr(cls, name))
                      for name, attribute in (needs | own).items()})


@dataclass
class Run:
    """The networks and samples of one distillation."""

    teacher: Callable[..., Tensor]
    generator: Generator
    fake: nn.Module
    ratio: nn.Module | None
    real: Real | None
    class_weights: Tensor | None
    sigma_data: float
    pairs: Pairs | None = None


def has_weights(teacher: object) -> bool:
    """Whether a student can start from this teacher's weights: a network that tells its shape, classes and scale."""
    return isinstance(teacher, nn.Module) and all(hasattr(teacher, n) for n in ("shape", "n_classes", "sigma_data"))


def prepare(
    teacher: Any, generator: Generator | None, *, needs: Needs, shape: tuple[int, ...], sigma_data: float,
    sigma_init: float, data: Tensor | None, labels: Tensor | None, flip: bool, rng: torch.Generator,
) -> Run:
    """Copies of the teacher where it has weights, small MLPs where it has none."""
    device, n_classes = rng.device, int(getattr(teacher, "n_classes", 0))
    real = real_samples(teacher, data, labels, flip, rng) if needs.data else None
    trained = has_weights(teacher)
    if trained:
        teacher = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
    if generator is None:
        new = Denoiser(MLP(shape, depth=4, activation="relu", n_classes=n_classes), sigma_data)
        generator = Generator(copy.deepcopy(teacher) if trained else new, sigma_init)
    fake: nn.Module
    ratio: nn.Module | None = None
    if trained:
        fake = copy.deepcopy(teacher)
    else:
        fake = Correction(teacher, MLP(shape, hidden=96, n_classes=n_classes), sigma_data)
    if needs.features and not hasattr(fake, "features"):
        raise TypeError(f"teacher is {type(teacher).__name__}; this objective reads features: wanted one with "
                        ".features(x, sigma, label), or an exact teacher")
    if needs.ratio and trained and hasattr(teacher, "features"):
        ratio = FeatureDiscriminator(teacher)
    elif needs.ratio:
        ratio = Discriminator(MLP(shape, hidden=64, n_classes=n_classes, out_features=1), sigma_data)
    return Run(
        teacher=teacher,
        generator=generator.to(device).train().requires_grad_(True),
        fake=fake.to(device).train().requires_grad_(True),
        ratio=None if ratio is None else ratio.to(device),
        real=real,
        class_weights=torch.ones(n_classes, device=device) if n_classes else None,
        sigma_data=sigma_data,
    )


def real_samples(teacher: Any, data: Tensor | None, labels: Tensor | None, flip: bool, rng: torch.Generator) -> Real:
    """Draws from the data, else from a teacher that can sample. ValueError if there is neither."""
    if data is None:
        if not hasattr(teacher, "sample"):
            raise ValueError("data=None: this objective compares with real samples and the teacher can't sample; "
                             "wanted data")
        return lambda n: (teacher.sample(n, rng), None)
    images = data.to(rng.device) if data.dtype == torch.uint8 else data.to(rng.device, torch.get_default_dtype())
    classes = None if labels is None else labels.to(rng.device)

    def draw(n: int) -> tuple[Tensor, Tensor | None]:
        index = torch.randint(len(images), (n,), generator=rng, device=rng.device)
        x0 = to_float(images[index])
        return random_flip(x0, rng) if flip else x0, None if classes is None else classes[index]

    return draw


def check_data(data: Tensor | None, labels: Tensor | None, shape: tuple[int, ...], n_classes: int, flip: bool) -> None:
    """Raise unless the data (floats, or images as bytes) and its classes fit the teacher."""
    if flip and len(shape) != 3:
        raise ValueError(f"flip=True: wanted images (n, c, h, w), but samples have shape {shape}")
    if data is None:
        return
    if not (isinstance(data, Tensor) and data.dtype == torch.uint8 and data.ndim == 4):
        _validate.samples("data", data, shape)
    if n_classes:
        if labels is None:
            raise ValueError(f"labels: this teacher has {n_classes} classes; wanted the data's classes too")
        _validate.labels("labels", labels, len(data), n_classes)


def shape_of(teacher: Any, generator: Generator | None, data: Tensor | None, shape: Any) -> tuple[int, ...]:
    """One sample's shape, from whoever knows it. ValueError if nobody does or two disagree."""
    known = [("teacher", getattr(teacher, "shape", None)), ("generator", getattr(generator, "shape", None)),
             ("shape", shape), ("data", None if data is None else data.shape[1:])]
    known = [(name, tuple(value)) for name, value in known if value is not None]
    if not known:
        raise ValueError("shape: this teacher does not tell its samples' shape; wanted shape=(...) or data")
    for name, value in known[1:]:
        if value != known[0][1]:
            raise ValueError(f"{name} has samples of shape {value}, but {known[0][0]} {known[0][1]}")
    return known[0][1]


def sigma_data_of(teacher: Any, generator: Generator | None, data: Tensor | None) -> float:
    """The data's standard deviation, as the teacher knows it, or the generator, or the data."""
    if hasattr(teacher, "sigma_data"):
        return float(teacher.sigma_data)
    if generator is not None:
        return float(generator.denoiser.sigma_data)
    return float(to_float(data).std()) if data is not None else 1.0


def device_of(teacher: Any) -> torch.device:
    """Where the teacher is."""
    if isinstance(teacher, nn.Module):
        return next(teacher.parameters()).device
    return getattr(getattr(teacher, "means", None), "device", torch.device("cpu"))
