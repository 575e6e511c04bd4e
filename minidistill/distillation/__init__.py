"""Distil a diffusion teacher to one step: `distill(teacher, objective="reverse_kl", steps=...)`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidistill import _validate, divergences, training
from minidistill.distillation.batch import Batch
from minidistill.distillation.implicit import ScoreIdentity, ScoreImplicitMatching
from minidistill.distillation.loop import Distilled, Objective, Run, draw, train
from minidistill.distillation.matching import DistributionMatching
from minidistill.networks import MLP, Correction, Denoiser, Discriminator, Generator

__all__ = [
    "OBJECTIVES", "Batch", "Distilled", "DistributionMatching", "Objective", "ScoreIdentity",
    "ScoreImplicitMatching", "distill", "draw",
]
#: Every objective by name: all f-divergences by distribution matching, then the score-implicit family.
OBJECTIVES: dict[str, Objective] = {
    **{name: DistributionMatching(row) for name, row in divergences.F.items()},
    "diff_instruct": DistributionMatching(divergences.F["reverse_kl"], normalise=False),
    "skew_jensen_shannon": DistributionMatching(divergences.skew_jensen_shannon(0.25)),
    "sim": ScoreImplicitMatching(divergences.pseudo_huber(0.1)),
    "sim_l2": ScoreImplicitMatching(divergences.squared_l2(), normalise=True),
    "sid": ScoreIdentity(alpha=1.2),
    "fisher": ScoreIdentity(alpha=0.5),
}


def distill(
    teacher: Callable[..., Tensor],
    generator: Generator | None = None,
    objective: str | Objective = "reverse_kl",
    *,
    steps: int,
    data: Tensor | None = None,
    labels: Tensor | None = None,
    shape: tuple[int, ...] | None = None,
    batch_size: int = 256,
    critic_steps: int = 3,
    learning_rate: float = 2e-3,
    critic_learning_rate: float = 5e-3,
    sigma_init: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    ema_halflife: float = 100_000,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    description: str | None = None,
    evaluate: Callable[[Generator], dict[str, float]] | None = None,
    evaluate_every: int = 500,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
) -> Distilled:
    """Distil a teacher D(x, sigma, label) to a generator x0 = G(z, label) of one network call.

    Args:
        teacher: any denoiser: an exact `GaussianMixture`, a trained `Denoiser`, or your own callable.
        generator: the student to train, in place; None makes one: a copy of a trained teacher (so it starts
            from the teacher's weights), else a new MLP.
        objective: a name of `OBJECTIVES`, or an object with `critic_loss(batch)` and `generator_loss(batch)`.
        data, labels: real samples (n, *shape) and classes (n,), needed only by objectives that learn a density
            ratio, and not even by those if the teacher can `sample(n, generator)`.
        shape: of one sample; only for a teacher without a `.shape`, when there are no data either.
        critic_steps: updates of the fake network (and the ratio) for each update of the generator.
        sigma_init: noise level at which the student reads its input, G(z) = D(sigma_init z, sigma_init).
        sigma_min, sigma_max: range of the noise levels, log-uniform. Defaults are multiples of the data's
            standard deviation: 0.035 and 5; `sigma_init` 1.5 for a student that starts from a trained teacher,
            0.5 for a new one.
        ema_halflife: of the generator's average, in samples.
        evaluate: called on the averaged generator every `evaluate_every` steps; its numbers join the history.
        checkpoint, resume: as in `training.fit`.
    Returns:
        `Distilled`: .generator, .ema, .sample(n), .history.
    Raises:
        ValueError, TypeError: an unknown objective, data that does not fit, a bad count or rate, an objective
            that needs data without any; all before training starts.
    """
    rule = _validate.choose("objective", objective, OBJECTIVES) if isinstance(objective, str) else objective
    for method in ("critic_loss", "generator_loss"):
        if not callable(getattr(rule, method, None)):
            given = type(rule).__name__
            raise TypeError(f"objective is {given}; wanted a name or an object with .{method}(batch)")
    if not callable(teacher):
        raise TypeError(f"teacher is {type(teacher).__name__}; wanted a denoiser D(x, sigma, label)")
    shape = _shape_of(teacher, generator, data, shape)
    if data is not None:
        _validate.samples("data", data, shape)
    n_classes = int(getattr(teacher, "n_classes", 0))
    if n_classes and data is not None:
        if labels is None:
            raise ValueError(f"labels: this teacher has {n_classes} classes; wanted the data's classes too")
        _validate.labels("labels", labels, len(data), n_classes)
    sigma_data = _sigma_data_of(teacher, generator, data)
    sigma_min = 0.035 * sigma_data if sigma_min is None else sigma_min
    sigma_max = 5.0 * sigma_data if sigma_max is None else sigma_max
    if sigma_init is None:
        sigma_init = (1.5 if isinstance(teacher, Denoiser) else 0.5) * sigma_data
    for name, value in (
        ("learning_rate", learning_rate), ("critic_learning_rate", critic_learning_rate), ("sigma_init", sigma_init),
        ("sigma_min", sigma_min), ("sigma_max", sigma_max), ("ema_halflife", ema_halflife),
    ):
        _validate.positive(name, value)
    if sigma_min >= sigma_max:
        raise ValueError(f"sigma_min={sigma_min:g} is not below sigma_max={sigma_max:g}")
    for name, count in (("steps", steps), ("batch_size", batch_size), ("critic_steps", critic_steps),
                        ("evaluate_every", evaluate_every)):
        _validate.whole(name, count)
    device = torch.device(device or _device_of(teacher))
    rng = training.generator_on(device, seed)
    torch.manual_seed(seed)
    run = _prepare(teacher, generator, rule, shape, n_classes, sigma_data, sigma_init, data, labels, rng)
    config = {
        "run": "distillation", "objective": repr(rule) if not isinstance(objective, str) else objective,
        "network": run.generator.denoiser.network.config, "sigma_init": run.generator.sigma_init,
        "steps": steps, "batch_size": batch_size, "critic_steps": critic_steps,
        "rates": [learning_rate, critic_learning_rate], "sigma": [sigma_min, sigma_max],
        "ema_halflife": ema_halflife, "seed": seed,
    }
    return train(
        run, rule, steps=steps, batch_size=batch_size, critic_steps=critic_steps, learning_rate=learning_rate,
        critic_learning_rate=critic_learning_rate, sigma_min=sigma_min, sigma_max=sigma_max,
        ema_halflife=ema_halflife, rng=rng, config=config, evaluate=evaluate, progress=progress,
        description=description or (objective if isinstance(objective, str) else type(rule).__name__),
        callback_every=evaluate_every, checkpoint=checkpoint, checkpoint_every=checkpoint_every, resume=resume,
    )


def _prepare(
    teacher: Any, generator: Generator | None, rule: Objective, shape: tuple[int, ...], n_classes: int,
    sigma_data: float, sigma_init: float, data: Tensor | None, labels: Tensor | None, rng: torch.Generator,
) -> Run:
    """Make the networks: copies of the teacher where it has weights, small MLPs where it has none."""
    device = rng.device
    trained = isinstance(teacher, Denoiser)
    real = _real_samples(teacher, data, labels, rng) if getattr(rule, "needs_ratio", False) else None
    if trained:
        teacher = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
    if generator is None:
        new = Denoiser(MLP(shape, depth=4, activation="relu", n_classes=n_classes), sigma_data)
        generator = Generator(copy.deepcopy(teacher) if trained else new, sigma_init)
    fake: nn.Module
    if trained:
        fake = copy.deepcopy(teacher)
    else:
        fake = Correction(teacher, MLP(shape, hidden=96, n_classes=n_classes), sigma_data)
    ratio = Discriminator(MLP(shape, hidden=64, n_classes=n_classes, out_features=1), sigma_data) if real else None
    return Run(
        teacher=teacher,
        generator=generator.to(device).train().requires_grad_(True),
        fake=fake.to(device).train().requires_grad_(True),
        ratio=None if ratio is None else ratio.to(device),
        real=real,
        class_weights=torch.ones(n_classes, device=device) if n_classes else None,
        sigma_data=sigma_data,
    )


def _real_samples(
    teacher: Any, data: Tensor | None, labels: Tensor | None, rng: torch.Generator
) -> Callable[[int], tuple[Tensor, Tensor | None]]:
    if data is not None:
        data = data.to(rng.device, torch.get_default_dtype())  # the networks' own
        classes = None if labels is None else labels.to(rng.device)

        def from_data(n: int) -> tuple[Tensor, Tensor | None]:
            index = torch.randint(len(data), (n,), generator=rng, device=rng.device)
            return data[index], None if classes is None else classes[index]

        return from_data
    if not hasattr(teacher, "sample"):
        raise ValueError("data=None: this objective learns a density ratio and the teacher can't sample; wanted data")
    return lambda n: (teacher.sample(n, rng), None)


def _shape_of(teacher: Any, generator: Generator | None, data: Tensor | None, shape: Any) -> tuple[int, ...]:
    known = [("teacher", getattr(teacher, "shape", None)), ("generator", getattr(generator, "shape", None)),
             ("shape", shape), ("data", None if data is None else data.shape[1:])]
    known = [(name, tuple(value)) for name, value in known if value is not None]
    if not known:
        raise ValueError("shape: this teacher does not tell its samples' shape; wanted shape=(...) or data")
    for name, value in known[1:]:
        if value != known[0][1]:
            raise ValueError(f"{name} has samples of shape {value}, but {known[0][0]} {known[0][1]}")
    return known[0][1]


def _sigma_data_of(teacher: Any, generator: Generator | None, data: Tensor | None) -> float:
    if hasattr(teacher, "sigma_data"):
        return float(teacher.sigma_data)
    if generator is not None:
        return generator.denoiser.sigma_data
    return float(data.std()) if data is not None else 1.0


def _device_of(teacher: Any) -> torch.device:
    if isinstance(teacher, nn.Module):
        return next(teacher.parameters()).device
    return getattr(getattr(teacher, "means", None), "device", torch.device("cpu"))
