"""The distillation loop: critic steps, a generator step, an average of the generator; and its records."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minidistill import _validate, parallel, training
from minidistill.distillation.batch import Batch
from minidistill.distillation.diagnosis import Diagnosis, diagnose
from minidistill.distillation.prepare import Run
from minidistill.networks import Generator
from minidistill.score_matching import log_uniform_sigma


class Objective(Protocol):
    """What `distill` minimises: two losses per sample, (n,). `needs_ratio` asks for a discriminator."""

    @property
    def needs_ratio(self) -> bool: ...
    def critic_loss(self, batch: Batch) -> Tensor: ...
    def generator_loss(self, batch: Batch) -> Tensor: ...


@dataclass
class Distilled:
    """A one-step student: `generator` as last trained, `ema` its average (usually the better one)."""

    generator: Generator
    ema: Generator
    history: list[dict[str, float]]
    teacher: Callable[..., Tensor]
    fake: nn.Module
    ratio: nn.Module | None

    @torch.no_grad()
    def sample(self, n: int, *, label: Tensor | None = None, seed: int = 0) -> Tensor:
        """n one-step samples of the averaged student, (n, *shape); classes in turn if it has them and none is given."""
        return draw(self.ema, n, label=label, seed=seed)


@torch.no_grad()
def draw(generator: Generator, n: int, *, label: Tensor | None = None, seed: int = 0) -> Tensor:
    """n samples G(z, label), z ~ N(0, I) from the seed; classes 0, 1, 2, ... in turn unless `label` (n,) is given."""
    _validate.whole("n", n)
    device = next(generator.parameters()).device
    z = torch.randn(n, *generator.shape, generator=training.generator_on("cpu", seed)).to(device)
    if label is None and generator.n_classes:
        label = torch.arange(n) % generator.n_classes
    return generator(z, None if label is None else label.to(device))


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
    clip: float | None,
    ema_halflife: float,
    accumulate: int,
    speed: training.Speed,
    rng: torch.Generator,
    config: dict[str, Any],
    evaluate: Callable[[Generator], dict[str, float]] | None,
    inspect: Callable[[Diagnosis], None] | None,
    callbacks: Sequence[training.Callback] = (),
    **fit_options: Any,
) -> Distilled:
    """Alternate `critic_steps` updates of fake (and ratio) with one of the generator, `steps` times."""
    device, generator = rng.device, run.generator
    critic = nn.ModuleDict({"fake": run.fake} | ({"ratio": run.ratio} if run.ratio else {}))
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    averages: list[Tensor] = list(ema.parameters())
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

    def noise() -> tuple[Tensor, Tensor]:
        sigma = log_uniform_sigma(batch_size, sigma_min, sigma_max, rng, device)
        return sigma, torch.randn(batch_size, *generator.shape, generator=rng, device=device)

    def noised(x0: Tensor, label: Tensor | None, level: tuple[Tensor, Tensor], i: slice, *critics: Any) -> Batch:
        fake, ratio = critics
        return Batch(x0, level[0][i], level[1][i], run.teacher, fake, label, ratio, sigma_data=run.sigma_data)

    def critic_step(x0: list[Tensor], label: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        level, loss = noise(), torch.zeros((), device=device)
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

    def generator_step(z: Tensor, x0: list[Tensor], label: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        level, loss = noise(), torch.zeros((), device=device)
        for k, i in enumerate(mine):
            with parallel.last_only(student, i is mine[-1]):
                made = x0[k] if x0[k].requires_grad else student(z[i], label[k])
                # The bare fake and ratio here: gradients pass through them, and their own are not wanted.
                batch = noised(made, label[k], level, i, run.fake, run.ratio)
                piece = objective.generator_loss(batch).mean() / accumulate
                training.backward(piece, generator_optimizer)
            loss += piece.detach()
        return loss, training.descend(generator_optimizer, clip)

    def update(state: training.State) -> dict[str, Tensor]:
        factor = training.schedule(state.step, steps, hold=hold)
        training.set_learning_rate(generator_optimizer, learning_rate * factor)
        training.set_learning_rate(critic_optimizer, critic_learning_rate * factor)
        z = torch.randn(batch_size, *generator.shape, generator=rng, device=device)
        label: list[Tensor | None] = [None] * accumulate
        if run.class_weights is not None:
            classes = torch.multinomial(run.class_weights, batch_size, replacement=True, generator=rng)
            label = [classes[i] for i in mine]
        with torch.set_grad_enabled(accumulate == 1):  # one piece keeps its graph; of several that would be too much
            x0 = [student(z[i], label[k]) for k, i in enumerate(mine)]
        for _ in range(critic_steps):  # the same samples at fresh noise levels: cheaper than fresh samples
            critic_loss, critic_skipped = critic_step(x0, label)
        generator_loss, skipped = generator_step(z, x0, label)
        training.update_ema(averages, weights, ema_halflife, batch_size, state.step)
        return {"critic": critic_loss, "generator": generator_loss, "skipped": torch.maximum(skipped, critic_skipped)}

    def look(state: training.State) -> dict[str, float]:
        seen = diagnose(ema, run.teacher, run.fake, sigma_data=run.sigma_data, ratio=run.ratio)
        inspect(seen)  # type: ignore[misc]
        return {"score_gap": seen.score_gap} | ({} if seen.log_ratio is None else {"log_ratio": seen.log_ratio})

    state = training.State(
        {"generator": generator, "ema": ema, "critic": critic},
        {"generator": generator_optimizer, "critic": critic_optimizer}, rng, config,
    )
    every = [*callbacks, *([look] if inspect else []), *([lambda state: evaluate(ema)] if evaluate else [])]
    training.fit(state, update, steps, batch_size=batch_size, callbacks=every, **fit_options)
    return Distilled(generator.eval(), ema, state.history, run.teacher, run.fake, run.ratio)
