"""The distillation loop: critic steps, a generator step, an average of the generator; and its records."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minidistill import _validate, training
from minidistill.distillation.batch import Batch
from minidistill.networks import Discriminator, Generator
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
    ratio: Discriminator | None

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


@dataclass
class Run:
    """The networks and samples of one distillation, made by `prepare`."""

    teacher: Callable[..., Tensor]
    generator: Generator
    fake: nn.Module
    ratio: Discriminator | None
    real: Callable[[int], tuple[Tensor, Tensor | None]] | None  # n -> (samples, labels)
    class_weights: Tensor | None
    sigma_data: float


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
    ema_halflife: float,
    rng: torch.Generator,
    config: dict[str, Any],
    evaluate: Callable[[Generator], dict[str, float]] | None = None,
    **fit_options: Any,
) -> Distilled:
    """Alternate `critic_steps` updates of fake (and ratio) with one of the generator, `steps` times."""
    device = rng.device
    critic = nn.ModuleDict({"fake": run.fake} | ({"ratio": run.ratio} if run.ratio else {}))
    ema = copy.deepcopy(run.generator).eval().requires_grad_(False)
    averages: list[Tensor] = list(ema.parameters())
    weights: list[Tensor] = list(run.generator.parameters())
    # beta1 = 0: both play a game whose gradients turn, and momentum overshoots (as SiD's and StyleGAN's Adam).
    generator_optimizer = torch.optim.Adam(run.generator.parameters(), learning_rate, betas=(0.0, 0.99), fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), critic_learning_rate, betas=(0.0, 0.99), fused=True)

    def noised(x0: Tensor, label: Tensor | None) -> Batch:
        sigma = log_uniform_sigma(len(x0), sigma_min, sigma_max, rng, device)
        noise = torch.randn(x0.shape, generator=rng, device=device)
        return Batch(x0, sigma, noise, run.teacher, run.fake, label, run.ratio, sigma_data=run.sigma_data)

    def generate() -> tuple[Tensor, Tensor | None]:
        z = torch.randn(batch_size, *run.generator.shape, generator=rng, device=device)
        label = None
        if run.class_weights is not None:
            label = torch.multinomial(run.class_weights, batch_size, replacement=True, generator=rng)
        return run.generator(z, label), label

    def update(state: training.State) -> dict[str, Tensor]:
        factor = training.schedule(state.step, steps)
        training.set_learning_rate(generator_optimizer, learning_rate * factor)
        training.set_learning_rate(critic_optimizer, critic_learning_rate * factor)
        x0, label = generate()
        for _ in range(critic_steps):  # the same samples at fresh noise levels: cheaper than fresh samples
            batch = noised(x0.detach(), label)
            if run.real is not None:
                batch.real, batch.real_label = run.real(batch_size)
            critic_loss = objective.critic_loss(batch).mean()
            training.optimizer_step(critic_loss, critic_optimizer)
        generator_loss = objective.generator_loss(noised(x0, label)).mean()
        training.optimizer_step(generator_loss, generator_optimizer)
        training.update_ema(averages, weights, ema_halflife, batch_size, state.step)
        return {"critic": critic_loss.detach(), "generator": generator_loss.detach()}

    state = training.State(
        {"generator": run.generator, "ema": ema, "critic": critic},
        {"generator": generator_optimizer, "critic": critic_optimizer}, rng, config,
    )
    callbacks = [] if evaluate is None else [lambda state: evaluate(ema)]
    training.fit(state, update, steps, callbacks=callbacks, **fit_options)
    return Distilled(run.generator.eval(), ema, state.history, run.teacher, run.fake, run.ratio)
