"""The long experiments of notebooks 09 to 13, over several seeds: `minidistill sweep --out figures/sweep`.

What is tried is in `trials.py`, `without_scores.py`, `forgetting.py` and `jko.py`, how rows are kept in `rows.py`; a
sweep that was stopped goes on where it was. The notebooks draw what is there.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidistill import _validate, metrics, training
from minidistill._random import seeded
from minidistill.distillation import OBJECTIVES, Batch, Distilled, Needs, distill, draw
from minidistill.distributions import GaussianMixture
from minidistill.metrics import evaluation
from minidistill.networks import MLP, Denoiser, Discriminator, Generator
from minidistill.studies import forgetting, jko, rows, trials, without_scores
from minidistill.studies.trajectories import quality
from minidistill.studies.trials import (
    BARE_L2,
    RADIUS,
    TARGETS,
    Trial,
    collapsed,
    displaced,
    narrow,
    student,
)
from minidistill.teachers import train_denoiser
from minidistill.teachers.closed_form import EmpiricalTeacher

__all__ = [
    "BARE_L2", "KEPT", "N", "RADIUS", "STUDIES", "TARGETS", "Learned", "RatioQuality", "Trial", "collapsed", "command",
    "critic_gap", "displaced", "learn", "learn_ratio", "measure", "narrow", "options", "ratio_quality",
    "read", "run", "student", "sweep",
]

N, KEPT = 10_000, 1000  # samples that are measured, and of those kept for pictures
STUDIES: dict[str, dict[str, Trial]] = {
    **trials.STUDIES, **without_scores.STUDIES,
    # These two have a run and numbers of their own.
    "forgetting": {name: Trial(rule, steps=forgetting.STEPS) for name, rule in forgetting.TRIALS.items()},
    "jko": {name: Trial(name, steps=jko.STEPS) for name in jko.TRIALS},
}


# ---------------------------------------------------------------------------------- one run and its numbers

class Learned(NamedTuple):
    teacher: Denoiser
    kl: float  # of its samples in 35 calls


@lru_cache(maxsize=1)
def learn(target: str, steps: int, seed: int) -> Learned:
    """A denoiser of the students' size, but smooth, trained on 20,000 samples of a target."""
    exact = TARGETS[target]
    with seeded(seed):
        network = MLP(exact.shape, hidden=128, depth=6)
    data = exact.sample(20_000, torch.Generator().manual_seed(seed))
    teacher = train_denoiser(data, network, steps=steps, seed=seed, progress=False)
    samples, _ = evaluation.sample_teacher(teacher, N, seed=1000 + seed, progress=False)
    return Learned(teacher, metrics.kl_on_grid(exact, samples))


def run(study: str, name: str, seed: int, at_most: int | None = None) -> dict[str, Any]:
    """Distill as a trial says, and measure the student; `at_most` bounds the steps of every part."""
    trial = STUDIES[study][name]
    if study in ("forgetting", "jko"):
        steps = min(at_most or trial.steps, trial.steps)
        return jko.run(name, seed, steps, KEPT) if study == "jko" else forgetting.run(name, seed, steps, N, KEPT)
    if at_most is not None:
        trial = replace(trial, **{part: min(getattr(trial, part), at_most) for part in ("steps", "sim", "learned")})
    exact, truth = TARGETS[trial.teacher], TARGETS[trial.truth or trial.teacher]
    teacher: Any = exact
    more: dict[str, float] = {}
    if trial.start is None:
        teacher, more["teacher_kl"] = learn(trial.teacher, trial.learned, seed)
    elif trial.learned:
        data = exact.sample(20_000, torch.Generator().manual_seed(seed))
        teacher = train_denoiser(data, steps=trial.learned, seed=seed, progress=False)
    generator = _first(trial, teacher, seed)
    start = time.process_time()
    options: dict[str, Any] = {"seed": seed, "progress": False}
    if trial.truth or trial.learned:
        options["data"] = truth.sample(100_000, torch.Generator().manual_seed(seed))
    if trial.watch:
        options |= {"evaluate_every": trial.watch, "evaluate": lambda now: {"over_floor": metrics.over_floor(
            truth, draw(now, N // 5, seed=1000 + seed), seed)}}
    if trial.sim:
        distill(teacher, generator, "sim", steps=trial.sim, **options)
    steps = max(1, trial.steps - trial.sim)
    made = distill(teacher, generator, trial.objective, steps=steps, **(options | trial.options))
    for _ in range(1, trial.rounds):
        made = distill(made.ema.denoiser, None, trial.objective, steps=steps, **(options | trial.options))
    seconds = time.process_time() - start  # of one thread, whatever else runs beside it
    curve = [[past["step"], past["over_floor"]] for past in made.history if "over_floor" in past]
    return {"study": study, "name": name, "seed": seed, "steps": trial.steps, "n": N, "seconds": round(seconds, 1),
            **more, **({"curve": curve} if trial.watch else {}), **measure(made, truth, seed)}


def _first(trial: Trial, teacher: Any, seed: int) -> Generator | None:
    """The student before training; None for the one that `distill` makes."""
    if trial.start is not None:
        return trial.start(TARGETS[trial.teacher], seed)
    rule = OBJECTIVES[trial.objective] if isinstance(trial.objective, str) else trial.objective
    level = Needs.of(rule).sigma_init or 1.5
    return Generator(copy.deepcopy(teacher), level * teacher.sigma_data)


def measure(made: Distilled, truth: GaussianMixture, seed: int) -> dict[str, Any]:
    """Both KLs, the modes, sliced W2 over its floor, how far the critic is from the student's own denoiser; of one that
    knows a way down also what `quality` measures."""
    samples = made.sample(N, seed=1000 + seed)
    kl, coverage = metrics.kl_both_ways(truth, samples), metrics.mode_coverage(truth, samples)
    return {
        "kl": kl.kl, "reverse_kl": kl.reverse_kl, "outside": kl.outside, "modes": coverage.covered,
        "worst": coverage.worst, "high_quality": coverage.high_quality,
        "off_weights": float((coverage.shares - truth.weights).abs().sum() / 2),  # total variation
        "over_floor": metrics.over_floor(truth, samples, seed),
        **({} if made.ema.route == "call" else quality(made, truth, seed, len(samples))),
        "critic_gap": None if made.fake is None else critic_gap(made, truth.sigma_data, N // 10),
        "samples": samples[:KEPT].clamp(-1e4, 1e4).numpy(),  # a lost student's are beyond what float16 holds
    }


@torch.no_grad()
def critic_gap(made: Distilled, sigma_data: float, n: int = 1000) -> float:
    """Root mean square of D_fake - D_q in standard deviations of the data, at noise levels 0.1 to 2 of them. D_q is of
    the student as last trained, estimated from 20 n other samples of it."""
    x0, points = (draw(made.generator, m, seed=seed) for m, seed in ((n, 1), (20 * n, 2)))
    own, rng = EmpiricalTeacher(points), torch.Generator().manual_seed(0)
    sigma = sigma_data * torch.logspace(-1, 0.3, n)
    xt = x0 + sigma[:, None] * torch.randn(x0.shape, generator=rng)
    gap: Tensor = made.fake(xt, sigma) - own(xt, sigma)
    return float(gap.square().mean().sqrt()) / sigma_data


class RatioQuality(NamedTuple):
    """In nats, root mean squares over noised samples of the student."""

    error: float  # of learned - exact log p / q
    size: float  # of the exact one itself: an error of that size says nothing was learned


@torch.no_grad()
def ratio_quality(generator: Generator, ratio: Any, truth: GaussianMixture, sigma: float, n: int = 500) -> RatioQuality:
    """A learned log p / q against the exact one at n noised samples of the student; q is estimated from 8 n others, a
    kernel density whose kernel is the noise itself."""
    points, x0 = (draw(generator, m, seed=seed) for m, seed in ((8 * n, 1), (n, 2)))
    x = x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    exact = truth.noised(sigma).log_prob(x) - GaussianMixture(points, sigma).log_prob(x)
    error = ratio(x, sigma) - exact
    return RatioQuality(float(error.square().mean().sqrt()), float(exact.square().mean().sqrt()))


def learn_ratio(
    loss: Callable[[Batch], Tensor], p: GaussianMixture, q: GaussianMixture, steps: int, seed: int = 0
) -> Discriminator:
    """log p / q of two fixed laws at noise levels 0.1 to 4, by `matching.ratio_loss` or `ScoreOfMixture().critic_loss`;
    q stands for the student and, as a denoiser, for the critic."""
    with seeded(seed):
        ratio = Discriminator(MLP(p.shape, hidden=64, out_features=1), p.sigma_data)
    rng = torch.Generator().manual_seed(1 + seed)
    optimizer = torch.optim.Adam(ratio.parameters(), 3e-3)
    for step in range(steps):
        training.set_learning_rate(optimizer, 3e-3 * (1 - step / steps))
        sigma, alpha = 0.1 * 40 ** torch.rand(512, generator=rng), torch.rand(512, generator=rng)
        made, real, noise = q.sample(512, rng), p.sample(512, rng), torch.randn(512, *p.shape, generator=rng)
        batch = Batch(made, sigma, noise, p, q, ratio=ratio, real=real, uniform=alpha)
        training.optimizer_step(loss(batch).mean(), optimizer)
    return ratio.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------- all of them

def read(folder: str | Path) -> rows.Stored:
    """The rows and samples in a folder. FileNotFoundError, which says where to get them, if they are not there."""
    return rows.read(folder, "sweep")


def sweep(
    out: str | Path, studies: Sequence[str], seeds: int, at_most: int | None = None, workers: int = 2, first: int = 0
) -> None:
    """All runs, with the seeds `first`, `first` + 1, ..., that `out` does not have yet, its rows and samples being kept
    after each."""
    names = {study: list(trials) for study, trials in STUDIES.items()}
    rows.collect(out, partial(run, at_most=at_most), names, studies, range(first, first + seeds), workers)


def options(parser: argparse.ArgumentParser) -> None:
    """What may be asked of it on the command line, besides --out, --seed and --device."""
    add = parser.add_argument
    add("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="NAME",
        help=f"{', '.join(STUDIES)} (default all)")
    add("--seeds", type=int, default=5, help="runs of each trial, with seeds --seed, --seed + 1, ...")
    add("--at-most", type=int, metavar="STEPS", help="a bound on the steps of a run, for a first try (default none)")
    add("--workers", type=int, default=2, help="processes that share the runs, of one thread each")


def command(a: argparse.Namespace) -> None:
    """`minidistill sweep`."""
    if a.device != "cpu":
        raise ValueError(f"--device {a.device}: its small networks run on the CPU; wanted the command without it")
    sweep(a.out, a.studies, a.seeds, a.at_most, first=a.seed, workers=_validate.whole("--workers", a.workers))
