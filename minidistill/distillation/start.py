"""`distill`: the arguments checked, the networks prepared, the loop run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minidistill import _validate, training
from minidistill.distillation.diagnosis import Diagnosis
from minidistill.distillation.loop import SCHEDULES, Objective, train
from minidistill.distillation.objectives import OBJECTIVES
from minidistill.distillation.pairs import make_pairs
from minidistill.distillation.plateau import check_patience
from minidistill.distillation.prepare import (
    Needs,
    check_data,
    device_of,
    has_weights,
    prepare,
    shape_of,
    sigma_data_of,
)
from minidistill.distillation.student import Distilled, check_levels
from minidistill.networks import Generator
from minidistill.training import Speed, parallel

__all__ = ["distill"]


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
    """Distil a teacher D(x, sigma, label) to a generator x0 = G(z, label) of one network call, or of a few.

    Args:
        teacher: any denoiser: an exact `GaussianMixture`, a trained `Denoiser`, or your own callable.
        generator: the student to train, in place; None makes one: a copy of a trained teacher (so it starts
            from the teacher's weights), else a new MLP.
        objective: a name of `OBJECTIVES`, or an object with `critic_loss(batch)` and `generator_loss(batch)`, and what
            it needs besides (`Needs`).
        data, labels: real samples (n, *shape), floating or bytes, and classes (n,), needed only by objectives that
            compare with real samples, and not even by those if the teacher can `sample(n, generator)`. A ratio is read
            off a trained teacher's features by a small head, else a network of its own learns it.
        shape: of one sample; only for a teacher without a `.shape`, when there are no data either.
        critic_steps: updates of the fake network (and the ratio) for each update of the generator; None for the
            objective's own number (5 of `dmd2`, `sid` and `sida`), else 3.
        learning_rate, critic_learning_rate: of Adam, for the generator and for the critics; None for the objective's
            own (5e-4 of `sid`), else 2e-3.
        sigma_init: noise level at which the student reads its input, G(z) = D(sigma_init z, sigma_init).
        sigma_min, sigma_max: range of the noise levels, log-uniform. Defaults are multiples of the data's
            standard deviation: 0.035 and 5; `sigma_init` 1.5 for a student that starts from a trained teacher,
            0.5 for a new one.
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
    rule = _validate.choose("objective", objective, OBJECTIVES) if isinstance(objective, str) else objective
    for method in ("critic_loss", "generator_loss"):
        if not callable(getattr(rule, method, None)):
            given = type(rule).__name__
            raise TypeError(f"objective is {given}; wanted a name or an object with .{method}(batch)")
    if "callback_every" in fit_options:
        raise TypeError("callback_every: distill calls back every `evaluate_every` steps; wanted that name")
    if not callable(teacher):
        raise TypeError(f"teacher is {type(teacher).__name__}; wanted a denoiser D(x, sigma, label)")
    shape = shape_of(teacher, generator, data, shape)
    check_data(data, labels, shape, int(getattr(teacher, "n_classes", 0)), flip)
    sigma_data = sigma_data_of(teacher, generator, data)
    sigma_min = 0.035 * sigma_data if sigma_min is None else sigma_min
    sigma_max = 5.0 * sigma_data if sigma_max is None else sigma_max
    if sigma_init is None:
        sigma_init = (1.5 if has_weights(teacher) else 0.5) * sigma_data
    _validate.whole("steps", steps)
    needs = Needs.of(rule)
    critic_steps = needs.critic_steps or 3 if critic_steps is None else critic_steps
    learning_rate = needs.learning_rate or 2e-3 if learning_rate is None else learning_rate
    warmup = min(needs.warmup or 0, steps // 3) if warmup is None else warmup
    clip = needs.gradient_clip if clip is None else clip
    for name, value in (
        ("learning_rate", learning_rate), ("critic_learning_rate", critic_learning_rate), ("sigma_init", sigma_init),
        ("sigma_min", sigma_min), ("sigma_max", sigma_max), ("ema_halflife", ema_halflife), ("hold", hold),
        ("clip", 1.0 if clip is None else clip),
    ):
        _validate.positive(name, value)
    if sigma_min >= sigma_max:
        raise ValueError(f"sigma_min={sigma_min:g} is not below sigma_max={sigma_max:g}")
    for name, count in (("batch_size", batch_size), ("critic_steps", critic_steps),
                        ("evaluate_every", evaluate_every), ("accumulate", accumulate)):
        _validate.whole(name, count)
    _validate.whole("warmup", warmup, least=0)
    parallel.parts(batch_size, accumulate)
    _validate.choose("schedule", schedule, SCHEDULES)
    check_patience(patience, monitor, evaluate is not None or inspect is not None)
    student_levels = check_levels(student_levels, generator.sigma_init if generator is not None else sigma_init)
    device = torch.device(device or device_of(teacher))
    rng = training.generator_on(device, seed)
    torch.manual_seed(seed)
    run = prepare(
        teacher, generator, needs=needs, shape=shape, sigma_data=sigma_data, sigma_init=sigma_init, data=data,
        labels=labels, flip=flip, rng=rng,
    )
    if student_levels:
        run.generator.levels = student_levels
    if needs.pairs:
        run.pairs = make_pairs(
            run.teacher, needs.pairs, shape, sigma_data, run.generator.n_classes, seed=seed, device=device,
            progress=fit_options.get("progress", True),
        )
    network = getattr(run.generator.denoiser, "network", None)
    config = {
        "run": "distillation", "objective": repr(rule) if not isinstance(objective, str) else objective,
        "network": getattr(network, "config", type(network).__name__), "sigma_init": run.generator.sigma_init,
        "steps": steps, "batch_size": batch_size, "critic_steps": critic_steps,
        "rates": [learning_rate, critic_learning_rate], "sigma": [sigma_min, sigma_max],
        "ema_halflife": ema_halflife, "clip": clip, "hold": hold, "flip": flip, "seed": seed,
    }
    if run.generator.levels:  # named only where they differ from what runs had before there were any
        config["student_levels"] = list(run.generator.levels)
    if schedule != "linear":
        config["schedule"] = schedule
    if warmup:
        config["warmup"] = warmup
    description = objective if isinstance(objective, str) else type(rule).__name__
    return train(
        run, rule, steps=steps, batch_size=batch_size, critic_steps=critic_steps, learning_rate=learning_rate,
        critic_learning_rate=critic_learning_rate, sigma_min=sigma_min, sigma_max=sigma_max, hold=hold,
        schedule=schedule, warmup=warmup, clip=clip, ema_halflife=ema_halflife, accumulate=accumulate,
        speed=speed or Speed(), rng=rng, config=config, evaluate=evaluate, inspect=inspect,
        callback_every=evaluate_every, patience=patience, monitor=monitor,
        **({"description": description} | fit_options),
    )
