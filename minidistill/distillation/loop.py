"""The distillation loop: critic steps, a generator step, an average of the generator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minidistill import training
from minidistill.distillation.batch import Batch
from minidistill.distillation.diagnosis import Diagnosis, diagnose
from minidistill.distillation.empirical import EmpiricalFake
from minidistill.distillation.objective import Needs, Objective, check_losses
from minidistill.distillation.plateau import run_to_end, stop_on_plateau
from minidistill.distillation.prepare import Run
from minidistill.distillation.settings import SCHEDULES, Settings
from minidistill.distillation.student import Distilled
from minidistill.networks import Generator
from minidistill.networks.draws import Entrance, entrance
from minidistill.score_matching import log_uniform_sigma
from minidistill.training import parallel

__all__ = ["Distillation", "train"]


@dataclass(frozen=True)
class Drawn:
    """Of one update: where the student's call begins, its classes, and its samples, in pieces."""

    entries: list[Entrance]
    label: list[Tensor | None]
    x0: list[Tensor]


class Distillation:
    """One distillation: `update` alternates `critic_steps` updates of fake network and ratio with one of the student.

    A student of several steps is trained at one of them in each update, drawn at random, on samples that its own
    earlier steps made. Every batch is computed in pieces (of several processes, and `accumulate` in each); everything
    random is drawn for the whole batch, so that the pieces change nothing.
    """

    def __init__(
        self, run: Run, objective: Objective, settings: Settings, speed: training.Speed, rng: torch.Generator
    ) -> None:
        self.run, self.objective, self.settings, self.rng = run, objective, settings, rng
        self.needs, self.device = Needs.of(objective), rng.device
        self.name = type(objective).__name__
        self.ema = copy.deepcopy(run.generator).eval().requires_grad_(False)
        self.target = copy.deepcopy(self.ema) if self.needs.target or self.needs.snapshots else None
        speed.apply(run.generator, self.ema)
        for module in (run.fake, run.teacher, run.own):
            if isinstance(module, nn.Module):
                speed.apply(module)
        learned = {name: module for name, module in (("fake", run.fake), ("ratio", run.ratio), ("own", run.own))
                   if isinstance(module, nn.Module)}
        self.critic = nn.ModuleDict(learned) if learned else None
        self.optimizers = {"generator": _adam(run.generator, settings.learning_rate)}
        if self.critic is not None:
            self.optimizers["critic"] = _adam(self.critic, settings.critic_learning_rate)
        self.pieces = parallel.parts(settings.batch_size, settings.accumulate)  # what this process computes
        self.student = parallel.wrap(run.generator)
        self.fake = parallel.wrap(run.fake) if isinstance(run.fake, nn.Module) else run.fake
        self.ratio = parallel.wrap(run.ratio) if run.ratio is not None else None
        self.own = parallel.wrap(run.own) if run.own is not None else None
        self.latest: dict[str, Tensor] = {}
        self.checked: set[str] = set()
        self.progress = 0.0

    def state(self, config: dict[str, Any]) -> training.State:
        """Everything that a checkpoint holds."""
        modules: dict[str, nn.Module] = {"generator": self.run.generator, "ema": self.ema}
        if self.critic is not None:
            modules["critic"] = self.critic
        if self.target is not None:
            modules["target"] = self.target
        return training.State(modules, self.optimizers, self.rng, config)

    def update(self, state: training.State) -> dict[str, Tensor]:
        """One step: the critics', then the student's on the same samples."""
        settings, parts = self.settings, self.needs.snapshots
        self.progress = state.step / settings.steps
        now, last = (parts * step // settings.steps for step in (state.step, state.step - 1))
        if self.target is not None and now > last:
            self.target.load_state_dict(self.ema.state_dict())
        self._set_rates(state.step)
        drawn, skipped = self._draw(), []
        if self.critic is not None:
            for _ in range(settings.critic_steps):  # the same samples at fresh noise levels: cheaper than fresh samples
                loss, bad = self.critic_step(drawn)
            self.latest["critic"], skipped = loss, [bad]
        if isinstance(self.run.fake, EmpiricalFake):
            self.run.fake.refresh(self.rng)
        self.latest["generator"], bad = self.generator_step(drawn)
        self._average(self.ema, settings.ema_halflife, state.step)
        if self.target is not None and self.needs.target:
            self._average(self.target, self.needs.target, state.step)
        return self.latest | {"skipped": torch.stack([*skipped, bad]).amax()}

    def critic_step(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """One update of fake network and ratio on the student's samples, which it holds fixed: (loss, skipped)."""
        whole = self._levels()
        real = self.run.real(self.settings.batch_size) if self.run.real is not None else (None, None)
        total = torch.zeros((), device=self.device)
        for k, i in enumerate(self.pieces):
            batch = self._batch(drawn.x0[k].detach(), drawn.label[k], whole, i, self.fake, self.ratio, self.own)
            batch.real, batch.real_label = (None if values is None else values[i] for values in real)
            last = i is self.pieces[-1]
            with parallel.last_only(last, self.fake, self.ratio, self.own):
                loss = self._checked("critic_loss", self.objective.critic_loss(batch), batch)  # type: ignore[attr-defined]
                piece = loss.mean() / self.settings.accumulate
                training.backward(piece, self.optimizers["critic"])
            total += piece.detach()
        return total, training.descend(self.optimizers["critic"], self.settings.clip)

    def generator_step(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """One update of the student: (loss, skipped)."""
        whole, needs = self._levels(), self.needs
        pairs = None if self.run.pairs is None else self.run.pairs.draw(self.settings.batch_size, self.rng)
        wants_real = self.run.real is not None and (needs.student_real or self.critic is None)
        real = self.run.real(self.settings.batch_size) if wants_real else (None, None)  # type: ignore[misc]
        total = torch.zeros((), device=self.device)
        for k, i in enumerate(self.pieces):
            with parallel.last_only(i is self.pieces[-1], self.student):
                made = drawn.x0[k]
                if needs.samples and not made.requires_grad:
                    made = drawn.entries[k].into(self.student, drawn.label[k])
                # The bare critics here: gradients pass through them, and their own are not wanted.
                batch = self._batch(made, drawn.label[k], whole, i, self.run.fake, self.run.ratio, self.run.own)
                batch.entry = drawn.entries[k] if needs.samples else None
                batch.real, batch.real_label = (None if values is None else values[i] for values in real)
                if pairs is not None:
                    mine = pairs[i]
                    batch.pair_z, batch.pair_y, batch.pair_label = mine.z, mine.y, mine.label
                    batch.pair_x0 = self.student(mine.z, mine.label) if needs.pair_samples else None
                loss = self._checked("generator_loss", self.objective.generator_loss(batch), batch)
                piece = loss.mean() / self.settings.accumulate
                training.backward(piece, self.optimizers["generator"])
            total += piece.detach()
        return total, training.descend(self.optimizers["generator"], self.settings.clip)

    def _draw(self) -> Drawn:
        """Noise and classes for one update, and the student's samples of them."""
        generator, settings = self.run.generator, self.settings
        z = self._normal()
        label: list[Tensor | None] = [None] * len(self.pieces)
        if self.run.class_weights is not None:
            classes = torch.multinomial(self.run.class_weights, settings.batch_size, True, generator=self.rng)
            label = [classes[i] for i in self.pieces]
        if not self.needs.samples:
            return Drawn([], label, [torch.zeros_like(z[i]) for i in self.pieces])
        several = len(generator.levels)
        before = int(torch.randint(several + 1, (), generator=self.rng, device=self.device)) if several else 0
        noises = [self._normal() for _ in range(before)]
        entries = [entrance(generator, z[i], label[k], [e[i] for e in noises]) for k, i in enumerate(self.pieces)]
        with torch.set_grad_enabled(settings.accumulate == 1):  # one piece keeps its graph; of several, too much memory
            x0 = [entry.into(self.student, label[k]) for k, entry in enumerate(entries)]
        return Drawn(entries, label, x0)

    def _levels(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Noise levels (n,), noise (n, *shape) and uniform numbers (n,) for a whole batch."""
        n, settings = self.settings.batch_size, self.settings
        own = getattr(self.objective, "noise_levels", None)
        if own is None:
            sigma = log_uniform_sigma(n, settings.sigma_min, settings.sigma_max, self.rng, self.device)
        else:
            sigma = own(n, settings, self.progress, self.rng)
        noise = self._normal()
        return sigma, noise, torch.rand(n, generator=self.rng, device=self.device) if self.needs.uniform else None

    def _batch(
        self, x0: Tensor, label: Tensor | None, whole: tuple[Tensor, Tensor, Tensor | None], i: slice, fake: Any,
        ratio: Any, own: Any,
    ) -> Batch:
        sigma, noise, uniform = (None if values is None else values[i] for values in whole)
        return Batch(
            x0, sigma, noise, self.run.teacher, fake, label, ratio, sigma_data=self.run.sigma_data, uniform=uniform,  # type: ignore[arg-type]
            student=at_any_level(self.student), frozen=at_any_level(self.run.generator),
            target=None if self.target is None else at_any_level(self.target),
            second_teacher=self.run.second_teacher, own=own, progress=self.progress, generator=self.rng,
        )

    def _checked(self, method: str, loss: Any, batch: Batch) -> Tensor:
        """The loss; the first of each kind is looked at closely."""
        if method not in self.checked:
            check_losses(f"{self.name}.{method}", loss, len(batch.x0))
            self.checked.add(method)
        return loss

    def _set_rates(self, step: int) -> None:
        s = self.settings
        factor = SCHEDULES[s.schedule](training.schedule(step, s.steps, hold=s.hold))
        rise = training.schedule(step, s.steps, s.warmup, hold=1)  # of the student's alone: first its critics learn
        training.set_learning_rate(self.optimizers["generator"], s.learning_rate * factor * rise)
        if self.critic is not None:
            training.set_learning_rate(self.optimizers["critic"], s.critic_learning_rate * factor)

    def _average(self, average: nn.Module, halflife: float, step: int) -> None:
        training.update_ema(average, self.run.generator, halflife, self.settings.batch_size, step)

    def _normal(self) -> Tensor:
        return torch.randn(self.settings.batch_size, *self.run.generator.shape, generator=self.rng, device=self.device)


def at_any_level(generator: Any) -> Callable[..., Tensor]:
    """A student as a denoiser, D(x, sigma, label), or a jump, with to=...."""
    return lambda x, sigma, label=None, **where: generator(x, label, sigma, **where)


def _adam(module: nn.Module, rate: float) -> torch.optim.Optimizer:
    # beta1 = 0: both play a game whose gradients turn, and momentum overshoots (as SiD's and StyleGAN's Adam).
    return torch.optim.Adam((p for p in module.parameters() if p.requires_grad), rate, betas=(0.0, 0.99), fused=True)


def train(
    run: Run, objective: Objective, settings: Settings, *, config: dict[str, Any], speed: training.Speed,
    rng: torch.Generator, evaluate: Callable[[Generator], dict[str, float]] | None,
    inspect: Callable[[Diagnosis], None] | None, patience: int | None, monitor: str | None,
    callbacks: Sequence[training.Callback] = (), **fit_options: Any,
) -> Distilled:
    """Distill for `settings.steps` updates, in `training.fit`, with evaluations and an early end on a plateau."""
    before_training = getattr(objective, "before_training", None)
    if before_training is not None:
        before_training(run, settings)
    work = Distillation(run, objective, settings, speed, rng)

    def look(state: training.State) -> dict[str, float]:
        seen = diagnose(work.ema, run.teacher, run.fake, sigma_data=run.sigma_data, ratio=run.ratio)
        inspect(seen)  # type: ignore[misc]
        numbers = {"score_gap": seen.score_gap, "log_ratio": seen.log_ratio}
        return {name: value for name, value in numbers.items() if value is not None}

    state = work.state(config)
    every = [*callbacks, *([look] if inspect else []), *([lambda state: evaluate(work.ema)] if evaluate else [])]
    if patience is not None:
        every = [stop_on_plateau(every, patience, monitor, lambda: parallel.mean(work.latest, work.device))]
    run_to_end(state, work.update, settings.steps, batch_size=settings.batch_size, callbacks=every, **fit_options)
    return Distilled(run.generator.eval(), work.ema, state.history, run.teacher, run.fake, run.ratio)
