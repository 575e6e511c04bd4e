"""What a distillation starts from: the student, the fake network, the density ratio, real samples and pairs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minidistill import _validate
from minidistill.data import random_flip, to_float
from minidistill.distillation.empirical import EmpiricalFake
from minidistill.distillation.objective import Needs
from minidistill.distillation.pairs import Pairs, make_pairs
from minidistill.distillation.settings import Settings
from minidistill.networks import MLP, Correction, Denoiser, Discriminator, FeatureDiscriminator, Generator, told_where

__all__ = [
    "Real", "Run", "check_data", "device_of", "has_weights", "own_denoiser", "prepare", "real_samples", "shape_of",
]

Real = Callable[[int], "tuple[Tensor, Tensor | None]"]  # n -> (samples, labels)


@dataclass
class Run:
    """The networks and samples of one distillation."""

    teacher: Callable[..., Tensor]
    generator: Generator
    fake: Any  # a network, an `EmpiricalFake`, or None
    ratio: nn.Module | None
    real: Real | None
    class_weights: Tensor | None
    sigma_data: float
    pairs: Pairs | None = None
    second_teacher: Callable[..., Tensor] | None = None
    own: nn.Module | None = None  # a critic of another kind, which an objective makes before training


def has_weights(teacher: object) -> bool:
    """Whether a student can start from this teacher's weights: a network that tells its shape, classes and scale."""
    return isinstance(teacher, nn.Module) and all(hasattr(teacher, n) for n in ("shape", "n_classes", "sigma_data"))


def prepare(
    teacher: Any, generator: Generator | None, needs: Needs, settings: Settings, *, shape: tuple[int, ...],
    data: Tensor | None, labels: Tensor | None, rng: torch.Generator, second_teacher: Any = None, progress: bool = True,
) -> Run:
    """Copies of the teacher where it has weights, small MLPs where it has none."""
    device, n_classes = rng.device, int(getattr(teacher, "n_classes", 0))
    real = real_samples(teacher, data, labels, settings.flip, rng) if needs.data else None
    trained = has_weights(teacher)
    if trained:
        teacher = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
    if generator is None:
        generator = _student(teacher if trained else None, shape, n_classes, settings, needs.octaves)
    generator.levels = settings.student_levels
    if needs.route == "jump":
        _tell_where(generator)
    generator.route = "jump" if _is_told(generator) else needs.route  # once it knows the way, it is asked for it
    generator = generator.to(device).train().requires_grad_(True)
    run = Run(
        teacher=teacher, generator=generator, ratio=None, real=real,
        fake=_fake(teacher, trained, generator, needs, settings, shape, n_classes),
        class_weights=torch.ones(n_classes, device=device) if n_classes else None,
        sigma_data=settings.sigma_data, second_teacher=second_teacher,
    )
    if isinstance(run.fake, nn.Module):
        run.fake = run.fake.to(device).train().requires_grad_(True)
    if needs.ratio:
        run.ratio = _ratio(teacher, trained, settings, shape, n_classes).to(device)
    if needs.pairs:
        run.pairs = make_pairs(run.teacher, needs.pairs, shape, settings.sigma_data, generator.n_classes,
                               seed=settings.seed, device=device, progress=progress)
    return run


def _student(
    teacher: Any, shape: tuple[int, ...], n_classes: int, settings: Settings, octaves: int
) -> Generator:
    """A copy of the teacher, or a new network whose kinks can tear one Gaussian into separate modes."""
    if teacher is not None:
        return Generator(copy.deepcopy(teacher), settings.sigma_init)
    network = MLP(shape, depth=4, activation="relu", n_classes=n_classes, centre=_centre(settings), octaves=octaves)
    return Generator(Denoiser(network, settings.sigma_data), settings.sigma_init)


def _tell_where(generator: Generator) -> None:
    """The student's network is one that is told where a jump goes to. TypeError if it can't be."""
    if not _is_told(generator):
        generator.denoiser.network = told_where(getattr(generator.denoiser, "network", generator.denoiser))


def _is_told(generator: Generator) -> bool:
    return getattr(getattr(generator.denoiser, "network", None), "where_to", None) is not None


def _fake(
    teacher: Any, trained: bool, generator: Generator, needs: Needs, settings: Settings, shape: tuple[int, ...],
    n_classes: int,
) -> Any:
    if not needs.fake:
        return None
    if settings.fake == "empirical":
        if settings.student_levels:
            raise ValueError("fake='empirical': wanted a student of one step, without student_levels")
        if needs.features:
            raise ValueError("fake='empirical': this objective reads the fake network's features; wanted 'learned'")
        return EmpiricalFake(generator)
    fake = copy.deepcopy(teacher) if trained else Correction(
        teacher, MLP(shape, hidden=96, n_classes=n_classes, centre=_centre(settings)), settings.sigma_data)
    if needs.features and not hasattr(fake, "features"):
        raise TypeError(f"teacher is {type(teacher).__name__}; this objective reads features: wanted one with "
                        ".features(x, sigma, label), or an exact teacher")
    return fake


def own_denoiser(run: Run, settings: Settings, told: bool = False) -> nn.Module:
    """A network D(x, sigma, label) for `Run.own`: a copy of the teacher where that has weights, else a new one. `told`,
    it is told a further number, by `to`, as jumps are where they go (`networks.jumps`); TypeError if it can't be."""
    if has_weights(run.teacher):
        own: Any = copy.deepcopy(run.teacher)
    else:
        network = MLP(run.generator.shape, n_classes=run.generator.n_classes, centre=_centre(settings))
        own = Denoiser(network, settings.sigma_data)
    if told:
        own.network = told_where(own.network)
    return own.to(device_of(run.generator)).train().requires_grad_(True)


def _ratio(teacher: Any, trained: bool, settings: Settings, shape: tuple[int, ...], n_classes: int) -> nn.Module:
    if trained and hasattr(teacher, "features"):
        return FeatureDiscriminator(teacher)
    network = MLP(shape, hidden=64, n_classes=n_classes, out_features=1, centre=_centre(settings))
    return Discriminator(network, settings.sigma_data)


def _centre(settings: Settings) -> float:
    """What ln(sigma) / 4 has to be reduced by for new networks to see the same numbers in any unit of data; 0 for data
    of standard deviation 0.5, as EDM's."""
    return math.log(2 * settings.sigma_data) / 4


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


def device_of(teacher: Any) -> torch.device:
    """Where the teacher is."""
    if isinstance(teacher, nn.Module):
        return next(teacher.parameters()).device
    return getattr(getattr(teacher, "means", None), "device", torch.device("cpu"))
