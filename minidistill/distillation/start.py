"""`distill`: the arguments checked, the networks prepared, the loop run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minidistill import _validate, training
from minidistill._random import seeded
from minidistill.data import to_float
from minidistill.distillation.diagnosis import Diagnosis
from minidistill.distillation.loop import train
from minidistill.distillation.objective import Needs, Objective
from minidistill.distillation.objectives import OBJECTIVES, DistributionMatching
from minidistill.distillation.plateau import check_patience
from minidistill.distillation.prepare import check_data, device_of, has_weights, prepare, shape_of
from minidistill.distillation.settings import Settings
from minidistill.distillation.student import Distilled
from minidistill.divergences import FDivergence
from minidistill.networks import Generator, estimate_sigma_data, probe
from minidistill.training import Speed

__all__ = ["distill"]


def distill(
    teacher: Callable[..., Tensor],
    generator: Generator | None = None,
    objective: str | FDivergence | Objective = "reverse_kl",
    *,
    steps: int,
    data: Tensor | None = None,
    labels: Tensor | None = None,
    shape: tuple[int, ...] | None = None,
    sigma_data: float | None = None,
    second_teacher: Callable[..., Tensor] | None = None,
    fake: str = "learned",
    batch_size: int = 256,
    critic_steps: int | None = None,
    learning_rate: float | None = None,
    critic_learning_rate: float = 5e-3,
    sigma_init: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    student_levels: Sequence[float] = (),
    ema_halflife: float = 100_000,
    warmup: int | None = None,
    clip: float | None = None,
    hold: float = 0.2,
    schedule: str = "linear",
    flip: bool = False,
    accumulate: int = 1,
    speed: Speed | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    evaluate: Callable[[Generator], dict[str, float]] | None = None,
    inspect: Callable[[Diagnosis], None] | None = None,
    evaluate_every: int = 500,
    patience: int | None = None,
    monitor: str | None = None,
    **fit_options: Any,
) -> Distilled:
    """Distill a teacher D(x, sigma, label) to a generator x0 = G(z, label) of one network call, or of a few.

    Args:
        teacher: any denoiser (`networks.Teacher` says what it has to keep): an exact `GaussianMixture`, a trained
            `Denoiser`, or your own callable.
        generator: the student to train, in place; None makes one: a copy of a trained teacher (so it starts
            from the teacher's weights), else a new MLP.
        objective: a name of `OBJECTIVES`, an f-divergence (`divergences.F["forward_kl"]`, or your own), which is
            matched, or an object with `generator_loss(batch)` and what it needs besides (`Objective`, `Needs`).
        data, labels: real samples (n, *shape), floating or bytes, and classes (n,), needed only by objectives that
            compare with real samples, and not even by those if the teacher can `sample(n, generator)`. A ratio is read
            off a trained teacher's features by a small head, else a network of its own learns it.
        shape: of one sample; only for a teacher without a `.shape`, when there are no data either.
        sigma_data: the data's standard deviation; None for the teacher's, else the generator's, else that of data. If
            nobody knows it, it is estimated from the teacher, with a warning that says so.
        second_teacher: another denoiser, for objectives that compare with two.
        fake: "learned", a network; "empirical", the closed-form denoiser of 2,048 fresh samples of the student: a
            control in low dimension, without the error of a network that lags behind.
        critic_steps: updates of the fake network (and the ratio) for each update of the generator; None for the
            objective's own number (5 of `dmd2`, `f_distill`, `sid` and `sida`), else 3.
        learning_rate, critic_learning_rate: of Adam, for the generator and for the critics; None for the objective's
            own (5e-4 of `sid`), else 2e-3.
        sigma_init: noise level at which the student reads its input, G(z) = D(sigma_init z, sigma_init).
        sigma_min, sigma_max: range of the noise levels, log-uniform. Defaults are multiples of the data's
            standard deviation: 0.035 and 5; `sigma_init` the objective's own (160 of consistency), else 1.5 for a
            student that starts from a trained teacher, 0.5 for a new one.
        student_levels: noise levels, descending below sigma_init, at which a student of several steps is called again
            on its own samples with new noise; () for one step.
        ema_halflife: of the generator's average, in samples.
        warmup: steps in which the student's learning rate rises to its full size, while the critics' is full at once;
            None for the objective's own (100 of `sim_l2`, but at most a third of the run), else 0.
        clip: bound on the norm of either gradient; None for the objective's own (1 of `sim_l2` and `sida`), else none.
        hold, schedule: the share of the run after which the learning rates fall to 0, and how: "linear" or "cosine";
            "constant" for not at all.
        flip: mirror real images left to right half of the time.
        accumulate: pieces that a batch is computed in, one after the other, where memory is short.
        speed: precision, memory format, compilation of all three networks.
        evaluate: called on the averaged generator every `evaluate_every` steps; its numbers join the history.
        inspect: called as often with a `Diagnosis` (samples, and both denoisers' views of them); its score gap joins
            the history. `plotting.panel` draws it.
        patience, monitor: end the run once the number named `monitor` (None: the first), the lower the better, was not
            below its best for so many evaluations; the last record then holds "plateau": 1.
        fit_options: `checkpoint`, `resume`, `progress`, `minutes`, `callbacks`, ... of `training.fit`; callbacks are
            called every `evaluate_every` steps too.
    Returns:
        `Distilled`: .generator, .ema, .sample(n), .history.
    Raises:
        ValueError, TypeError: an unknown objective, data that does not fit, a bad count or rate, an objective
            that needs data without any; all before training starts.
    """
    rule = resolve(objective)
    if "callback_every" in fit_options:
        raise TypeError("callback_every: distill calls back every `evaluate_every` steps; wanted that name")
    if not callable(teacher):
        raise TypeError(f"teacher is {type(teacher).__name__}; wanted a denoiser D(x, sigma, label)")
    if generator is not None and not isinstance(generator, torch.nn.Module):
        given = repr(generator) if isinstance(generator, str) else type(generator).__name__
        hint = f"; did you mean objective={generator!r}?" if isinstance(generator, str) else ""
        raise TypeError(f"generator is {given}; wanted a student such as `Generator`, or None for a new one{hint}")
    needs, n_classes = Needs.of(rule), int(getattr(teacher, "n_classes", 0))
    shape = shape_of(teacher, generator, data, shape)
    check_data(data, labels, shape, n_classes, flip)
    steps, evaluate_every = _validate.whole("steps", steps), _validate.whole("evaluate_every", evaluate_every)
    check_patience(patience, monitor, evaluate is not None or inspect is not None)
    if needs.second_teacher and not callable(second_teacher):
        raise TypeError(f"second_teacher is {type(second_teacher).__name__}; this objective compares with two: wanted "
                        "another denoiser")
    device = _validate.device("device", device_of(teacher) if device is None else device)
    sigma_data = _sigma_data(sigma_data, teacher, generator, data, shape, n_classes, device)
    if sigma_init is None:
        sigma_init = (needs.sigma_init or (1.5 if has_weights(teacher) else 0.5)) * sigma_data
    if generator is not None:  # it reads its input at a level of its own
        sigma_init, student_levels = generator.sigma_init, student_levels or generator.levels
    settings = Settings(
        steps=steps, batch_size=batch_size, sigma_data=sigma_data, sigma_init=sigma_init,
        critic_steps=needs.critic_steps or 3 if critic_steps is None else critic_steps,
        learning_rate=needs.learning_rate or 2e-3 if learning_rate is None else learning_rate,
        critic_learning_rate=critic_learning_rate,
        sigma_min=0.035 * sigma_data if sigma_min is None else sigma_min,
        sigma_max=5.0 * sigma_data if sigma_max is None else sigma_max,
        student_levels=tuple(float(level) for level in student_levels), ema_halflife=ema_halflife,
        warmup=min(needs.warmup or 0, steps // 3) if warmup is None else warmup,
        clip=needs.gradient_clip if clip is None else clip, hold=hold, schedule=schedule, flip=flip, seed=seed,
        fake=fake, accumulate=accumulate,
    )
    for name, each in (("teacher", teacher), ("second_teacher", second_teacher)):
        if each is not None:
            probe(each, shape, sigma=sigma_data, n_classes=n_classes, device=device_of(each), name=name)
    rng = training.generator_on(device, seed)
    with seeded(seed, device):  # new networks' weights, and dropout
        run = prepare(teacher, generator, needs, settings, shape=shape, data=data, labels=labels, rng=rng,
                      second_teacher=second_teacher, progress=fit_options.get("progress", True))
        network = getattr(run.generator.denoiser, "network", None)
        name, told = type(rule).__name__, re.sub(r" at 0x\w+", "", repr(rule))  # without where it lies in memory
        if isinstance(objective, str):
            name = told = objective
        config = {
            "run": "distillation", "objective": told, "teacher": training.fingerprint(teacher),
            "data": training.fingerprint(data), "labels": training.fingerprint(labels),
            "second_teacher": training.fingerprint(second_teacher),
            "network": getattr(network, "config", type(network).__name__), **settings.config(),
        }
        return train(
            run, rule, settings, config=config, speed=speed or Speed(), rng=rng, evaluate=evaluate, inspect=inspect,
            callback_every=evaluate_every, patience=patience, monitor=monitor, **({"description": name} | fit_options),
        )


def resolve(objective: Any) -> Objective:
    """The objective of that name, the matching of that f-divergence, or the object itself once it is known to be one.

    Raises ValueError for a name that is not known, TypeError for anything else that is no objective.
    """
    if isinstance(objective, str):
        return _validate.choose("objective", objective, OBJECTIVES)
    if isinstance(objective, FDivergence):
        return DistributionMatching(objective)
    if isinstance(objective, type) or not callable(getattr(objective, "generator_loss", None)):
        given = objective.__name__ if isinstance(objective, type) else type(objective).__name__
        raise TypeError(f"objective is {given}; wanted a name or an object with .generator_loss(batch)"
                        + (": an instance, not the class" if isinstance(objective, type) else ""))
    return objective


def _sigma_data(
    given: float | None, teacher: Any, generator: Any, data: Tensor | None, shape: tuple[int, ...], n_classes: int,
    device: torch.device,
) -> float:
    """The data's standard deviation, from whoever knows it."""
    if given is not None:
        _validate.positive("sigma_data", given)
        return float(given)
    if hasattr(teacher, "sigma_data"):
        return float(teacher.sigma_data)
    if generator is not None:
        return float(generator.denoiser.sigma_data)
    if data is not None:
        return float(to_float(data).std())
    found = estimate_sigma_data(teacher, shape, n_classes=n_classes, device=device)
    warnings.warn(f"sigma_data: this teacher does not tell its data's standard deviation; estimated from it as "
                  f"{found:.4g}. Give sigma_data= to choose it yourself", stacklevel=3)
    return found
