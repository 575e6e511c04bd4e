"""The distillation loop: critic steps, a generator step, an average of the generator."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minidistill import _validate, training
from minidistill.distillation.batch import Batch
from minidistill.distillation.diagnosis import Diagnosis, diagnose
from minidistill.distillation.plateau import run_to_end, stop_on_plateau
from minidistill.distillation.prepare import Needs, Run
from minidistill.distillation.student import Distilled, Entrance, entrance
from minidistill.networks import Generator
from minidistill.score_matching import log_uniform_sigma
from minidistill.training import parallel

__all__ = ["SCHEDULES", "Levels", "Objective", "train"]


class Objective(Protocol):
    """What `distill` minimises: two losses per sample, (n,). `needs_ratio` asks for a discriminator; what else an
    objective can ask for is in `prepare.Needs`. Those in `OBJECTIVES` also have `terms(batch)`, the named losses that
    `generator_loss` is the sum of."""

    @property
    def needs_ratio(self) -> bool: ...
    def critic_loss(self, batch: Batch) -> Tensor: ...
    def generator_loss(self, batch: Batch) -> Tensor: ...


#: Learning rate schedules, of `training.schedule`'s factor, which falls linearly from 1 to 0 after a hold.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda factor: factor,
    "cosine": lambda factor: math.sin(math.pi / 2 * factor) ** 2,
    "constant": lambda factor: 1.0,
}


@dataclass(frozen=True)
class Levels:
    """How a whole batch is noised."""

    sigma: Tensor  # (n,)
    noise: Tensor  # (n, *shape)
    uniform: Tensor | None  # (n,)


def train(
    run: Run,
    objective: Objective,
    *,
    steps: int,
    batch_size: int,
    critic_steps: int,
    learning_rate: float,
    critic_learning_rate: float,
    sigma_min: float,
    sigma_max: float,
    hold: float,
    schedule: str,
    warmup: int,
    clip: float | None,
    ema_halflife: float,
    accumulate: int,
    speed: training.Speed,
    rng: torch.Generator,
    config: dict[str, Any],
    evaluate: Callable[[Generator], dict[str, float]] | None,
    inspect: Callable[[Diagnosis], None] | None,
    patience: int | None,
    monitor: str | None,
    callbacks: Sequence[training.Callback] = (),
    **fit_options: Any,
) -> Distilled:
    """Alternate `critic_steps` updates of fake (and ratio) with one of the generator, `steps` times.

    A student of several steps is trained at one of them in each update, drawn at random, on samples that its own
    earlier steps made.
    """
    device, generator, needs = rng.device, run.generator, Needs.of(objective)
    critic = nn.ModuleDict({"fake": run.fake} | ({"ratio": run.ratio} if run.ratio else {}))
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    weights: list[Tensor] = list(generator.parameters())
    speed.apply(generator, ema)
    for module in (run.fake, run.teacher):
        if isinstance(module, nn.Module):
            speed.apply(module)
    # beta1 = 0: both play a game whose gradients turn, and momentum overshoots (as SiD's and StyleGAN's Adam).
    generator_optimizer = torch.optim.Adam(weights, learning_rate, betas=(0.0, 0.99), fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), critic_learning_rate, betas=(0.0, 0.99), fused=True)
    mine = parallel.parts(batch_size, accumulate)  # of every batch, what this process computes, in pieces
    student, fake = parallel.wrap(generator), parallel.wrap(run.fake)
    ratio = parallel.wrap(run.ratio) if run.ratio else None
    rate, latest = _validate.choose("schedule", schedule, SCHEDULES), dict[str, Tensor]()

    def normal() -> Tensor:
        return torch.randn(batch_size, *generator.shape, generator=rng, device=device)

    def levels() -> Levels:  # of the whole batch, whatever the pieces
        sigma = log_uniform_sigma(batch_size, sigma_min, sigma_max, rng, device)
        e = normal()
        uniform = torch.rand(batch_size, generator=rng, device=device) if needs.uniform else None
        return Levels(sigma, e, uniform)

    def noised(x0: Tensor, label: Tensor | None, level: Levels, i: slice, fake: Any, ratio: Any) -> Batch:
        uniform = None if level.uniform is None else level.uniform[i]
        return Batch(x0, level.sigma[i], level.noise[i], run.teacher, fake, label, ratio, sigma_data=run.sigma_data,
                     uniform=uniform)

    def critic_step(x0: list[Tensor], label: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        level, loss = levels(), torch.zeros((), device=device)
        real, real_label = (None, None) if run.real is None else run.real(batch_size)
        for k, i in enumerate(mine):
            batch = noised(x0[k].detach(), label[k], level, i, fake, ratio)
            batch.real = None if real is None else real[i]
            batch.real_label = None if real_label is None else real_label[i]
            with parallel.last_only(fake, i is mine[-1]), parallel.last_only(ratio, i is mine[-1]):
                piece = objective.critic_loss(batch).mean() / accumulate
                training.backward(piece, critic_optimizer)
            loss += piece.detach()
        return loss, training.descend(critic_optimizer, clip)

    def generator_step(
        entries: list[Entrance], x0: list[Tensor], label: list[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        level, loss = levels(), torch.zeros((), device=device)
        pairs = None if run.pairs is None else run.pairs.draw(batch_size, rng)
        for k, i in enumerate(mine):
            with parallel.last_only(student, i is mine[-1]):
                made = x0[k] if x0[k].requires_grad else entries[k].into(student, label[k])
                # The bare fake and ratio here: gradients pass through them, and their own are not wanted.
                batch = noised(made, label[k], level, i, run.fake, run.ratio)
                if pairs is not None:
                    pair = pairs[i]
                    batch.pair_x0, batch.pair_y = student(pair.z, pair.label), pair.y
                piece = objective.generator_loss(batch).mean() / accumulate
                training.backward(piece, generator_optimizer)
            loss += piece.detach()
        return loss, training.descend(generator_optimizer, clip)

    def update(state: training.State) -> dict[str, Tensor]:
        factor = rate(training.schedule(state.step, steps, hold=hold))
        rise = training.schedule(state.step, steps, warmup, hold=1)  # of the student's alone: first its critics learn
        training.set_learning_rate(generator_optimizer, learning_rate * factor * rise)
        training.set_learning_rate(critic_optimizer, critic_learning_rate * factor)
        z = normal()
        label: list[Tensor | None] = [None] * accumulate
        if run.class_weights is not None:
            classes = torch.multinomial(run.class_weights, batch_size, replacement=True, generator=rng)
            label = [classes[i] for i in mine]
        several = len(generator.levels)
        before = int(torch.randint(several + 1, (), generator=rng, device=device)) if several else 0
        noises = [normal() for _ in range(before)]
        entries = [entrance(generator, z[i], label[k], [e[i] for e in noises]) for k, i in enumerate(mine)]
        with torch.set_grad_enabled(accumulate == 1):  # one piece keeps its graph; of several that would be too much
            x0 = [entry.into(student, label[k]) for k, entry in enumerate(entries)]
        for _ in range(critic_steps):  # the same samples at fresh noise levels: cheaper than fresh samples
            critic_loss, critic_skipped = critic_step(x0, label)
        generator_loss, skipped = generator_step(entries, x0, label)
        training.update_ema(ema, generator, ema_halflife, batch_size, state.step)
        latest.update(critic=critic_loss, generator=generator_loss)
        return latest | {"skipped": torch.maximum(skipped, critic_skipped)}

    def look(state: training.State) -> dict[str, float]:
        seen = diagnose(ema, run.teacher, run.fake, sigma_data=run.sigma_data, ratio=run.ratio)
        inspect(seen)  # type: ignore[misc]
        return {"score_gap": seen.score_gap} | ({} if seen.log_ratio is None else {"log_ratio": seen.log_ratio})

    state = training.State(
        {"generator": generator, "ema": ema, "critic": critic},
        {"generator": generator_optimizer, "critic": critic_optimizer}, rng, config,
    )
    every = [*callbacks, *([look] if inspect else []), *([lambda state: evaluate(ema)] if evaluate else [])]
    if patience is not None:
        every = [stop_on_plateau(every, patience, monitor, lambda: parallel.mean(latest, device))]
    run_to_end(state, update, steps, batch_size=batch_size, callbacks=every, **fit_options)
    return Distilled(generator.eval(), ema, state.history, run.teacher, run.fake, run.ratio)
