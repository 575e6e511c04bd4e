"""The long experiments of notebooks 09 to 11, over several seeds: `minidistill sweep --out figures/sweep`.

A study is a set of trials, ways to distill that differ in one thing. How rows are kept is in `rows.py`; a sweep that
was stopped goes on where it was. The notebooks draw what is there.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidistill import _validate, divergences, metrics, training
from minidistill._random import seeded
from minidistill.distillation import (
    DMD,
    DMD2,
    OBJECTIVES,
    Batch,
    Consistency,
    ConsistencyTrajectory,
    ContinuousConsistency,
    Distilled,
    DistributionMatching,
    EasyConsistency,
    MeanFlow,
    Needs,
    Objective,
    ScoreIdentity,
    ScoreImplicitMatching,
    distill,
    draw,
)
from minidistill.distributions import GaussianMixture, grid, ring
from minidistill.metrics import evaluation
from minidistill.networks import MLP, Denoiser, Discriminator, Generator
from minidistill.networks.jumps import TOP
from minidistill.studies import rows
from minidistill.studies.trajectories import quality
from minidistill.teachers import train_denoiser
from minidistill.teachers.closed_form import EmpiricalTeacher

__all__ = [
    "BARE_L2", "FROM_SIM", "KEPT", "N", "RADIUS", "STEPS", "STUDIES", "TARGETS", "UNMEASURED", "WAY_STEPS", "Learned",
    "RatioQuality", "Trial", "collapsed", "command", "critic_gap", "displaced", "distills_own", "every_objective",
    "from_the_teacher", "learn", "learn_ratio", "measure", "narrow", "no_fake", "options", "ratio_quality", "read",
    "run", "sharp", "student", "sweep", "trajectories", "without",
]

#: Equal Gaussians on a ring; the same, the first four times as heavy; 25 on a lattice, the heaviest of which weigh four
#: times as much as the lightest.
TARGETS: dict[str, GaussianMixture] = {
    "ring": ring(8),
    "uneven ring": ring(8, weights=[4.0] + 7 * [1.0]),
    "lattice": grid(5, weights=[1.0 + 3 * i % 4 for i in range(25)]),
}
N, KEPT = 10_000, 1000  # samples that are measured, and of those kept for pictures
STEPS = 1500
RADIUS = 2.0  # of the ring


# ---------------------------------------------------------------------------------- students

def student(target: GaussianMixture, seed: int, *, hidden: int = 128, depth: int = 6, gain: float = 4.0) -> Generator:
    """A new student for a mixture of many modes: deeper than `distill`'s own, and sharper from the start."""
    with seeded(seed):
        network = MLP(target.shape, hidden=hidden, depth=depth, activation="relu", gain=gain)
    return Generator(Denoiser(network, target.sigma_data), 0.5 * target.sigma_data)


def narrow(target: GaussianMixture, seed: int) -> Generator:
    """A student with 16 units a layer for 128."""
    return student(target, seed, hidden=16)


def sharp(target: GaussianMixture, seed: int) -> Generator:
    """As `student`, its noise embedding in four octaves: for consistency functions, which have to tear their input like
    any generator, and whose derivative in the noise level counts."""
    with seeded(seed):
        network = MLP(target.shape, hidden=128, depth=6, activation="relu", gain=4.0, octaves=4)
    return Generator(Denoiser(network, target.sigma_data), TOP * target.sigma_data)


def distills_own(target: GaussianMixture, seed: int) -> None:
    """None: `distill` makes the student that its objective wants."""


def displaced(target: GaussianMixture, seed: int) -> Generator:
    """A new student whose samples all lie three radii of the ring off."""
    generator = student(target, seed)
    network: Any = generator.denoiser.network
    c_out = generator.sigma_init / (generator.sigma_init**2 / target.sigma_data**2 + 1) ** 0.5
    with torch.no_grad():
        network.outward.bias[0] += 3 * RADIUS / c_out
    return generator


def collapsed(target: GaussianMixture, seed: int) -> Generator:
    """A student of one mode alone, by reverse KL to that mode."""
    one = GaussianMixture(target.means[:1], target.covs[:1])
    generator = student(target, seed)
    distill(one, generator, steps=300, sigma_max=5 * target.sigma_data, seed=seed, progress=False)
    return generator


# ---------------------------------------------------------------------------------- trials

@dataclass(frozen=True)
class Trial:
    """One way to distill. What is not said is as in `distill`."""

    objective: str | Objective
    teacher: str = "ring"  # one of TARGETS
    truth: str = ""  # what the student is measured against, and where real samples come from; "": the teacher's
    steps: int = STEPS
    sim: int = 0  # so many of the steps are SIM's, first
    start: Callable[[GaussianMixture, int], Generator | None] | None = student  # None: a copy of the learned teacher
    learned: int = 0  # steps that a denoiser is trained for, on samples of the teacher, to take its place
    rounds: int = 1  # distillations one after the other, each one's student the next one's teacher
    options: dict[str, Any] = field(default_factory=dict)


def every_objective(teacher: str) -> dict[str, Trial]:
    """Every one with a fake network. All have the same settings but two, which take 5/3 of the steps, since they are
    cheap or slow.

    dmd: more pairs and a heavier regression than by default.
    sid: the paper's alpha = 1.2, which the name stands for on images only. It needs a student that is near the data
        already, as one is that starts from a teacher's weights; so the first quarter of its run is SIM's.
    """
    longer = STEPS * 5 // 3
    trials = {name: Trial(name, teacher) for name, rule in OBJECTIVES.items()
              if Needs.of(rule).fake and name not in UNMEASURED}
    trials["dmd"] = Trial(DMD(weight=4.0, needs_pairs=8192), teacher, steps=longer)
    trials["sid"] = Trial(ScoreIdentity(alpha=1.2), teacher, steps=longer, sim=longer // 4,
                          options={"learning_rate": 1e-3})
    return trials


def no_fake(teacher: str) -> dict[str, Trial]:
    """Those without a fake network: drifting on large batches of fresh real samples, and the teacher's map learned."""
    longer, large = STEPS * 5 // 3, {"batch_size": 512, "ema_halflife": 50_000}
    return {"drifting": Trial("drifting", teacher, steps=longer, options=large),
            "regression": Trial("regression", teacher, steps=longer)}


def from_the_teacher(teacher: str) -> dict[str, Trial]:
    """The score-implicit family where its papers have it: a trained teacher, and students that start from its weights.
    All with the same five critic steps and rate, those of `sid`."""
    rules: dict[str, str | Objective] = {"sim": "sim", "sid, alpha 0.5": ScoreIdentity(0.5)}
    rules |= {"sid, alpha 1": ScoreIdentity(1.0), "sid, alpha 1.2": ScoreIdentity(1.2)}
    slow = {"critic_steps": 5, "learning_rate": 5e-4}
    return {name: Trial(rule, teacher, steps=500, start=None, learned=3000, options=slow)
            for name, rule in (rules | {"sida": "sida", "uni_instruct": "uni_instruct"}).items()}


def trajectories(teacher: str) -> dict[str, Trial]:
    """Those that learn a way down. The levels of the consistency family begin at 20 standard deviations of the data for
    all, rather than at EDM's 160: 20 are high enough, and the climb is shorter. Students that know ends alone are
    `sharp`; those told where to jump are `distill`'s own."""
    grid: dict[str, Any] = {"lognormal": False, "huber": None, "sigma_init": TOP}
    rules: dict[str, str | Objective] = {
        "consistency_distillation": Consistency(18, 18, teacher_step=True, scattered=True, **grid),
        "consistency_training": Consistency(2, 150, **grid),
        "ict": Consistency(sigma_init=TOP),
        "ect": EasyConsistency(sigma_init=TOP),
        "ctm": ConsistencyTrajectory(landing=1.0),
    }
    told = {name for name in WAY_STEPS if Needs.of(OBJECTIVES[name]).route == "jump"}
    return {name: Trial(rules.get(name, name), teacher, steps=steps, start=distills_own if name in told else sharp)
            for name, steps in WAY_STEPS.items()}


def without(**off: Any) -> Trial:
    """Forward KL, its weight h = r the most in need of them, with stabilisers switched off."""
    return Trial(DistributionMatching(divergences.F["forward_kl"], **off))


FROM_SIM: dict[str, Any] = {"sim": STEPS // 4, "options": {"learning_rate": 1e-3, "critic_steps": 5}}
BARE_L2 = ScoreImplicitMatching(divergences.squared_l2(), normalise=True)
#: Of trajectory objectives, by name: cheap ones get more, for all to take about as long.
WAY_STEPS = {
    "consistency_distillation": 3000, "consistency_training": 3000, "ict": 3000, "ect": 3000, "scm": 2000, "ctm": 1500,
    "mean_flow": 1500, "improved_mean_flow": 1500, "alpha_flow": 1500, "flow_map": 1500, "progressive": 2500,
    "reflow": 3000,
}
#: Objectives by name that have no stored run on ring and lattice yet.
UNMEASURED = (
    "sinkhorn", "mmd", "energy_score", "embedding_loss", "moment_matching",
    "class_ratio", "gan", "score_mismatching", "score_of_mixture_training", "real_uid",
    "wasserstein_flow", "sds", "asd", "score_forgetting",
)
#: Below "lattice", trials to be compared with those of "ring", which are not repeated.
STUDIES: dict[str, dict[str, Trial]] = {
    "ring": every_objective("ring"),
    "lattice": every_objective("lattice"),
    "no fake": no_fake("ring"), "no fake, lattice": no_fake("lattice"),
    # What is left of the error where the fake network has none.
    "exact fake": {name: Trial(name, options={"fake": "empirical"}) for name in ("reverse_kl", "sim")},
    # DMD's regression, from a student of one mode alone.
    "collapsed": {
        "diff_instruct": Trial("diff_instruct", start=collapsed), "reverse_kl": Trial("reverse_kl", start=collapsed),
        "dmd": Trial(DMD(weight=4.0, needs_pairs=8192), start=collapsed),
    },
    # DMD2's two time scales, with a critic that learns at a tenth of its usual rate.
    "slow critic": {
        f"{k} critic steps": Trial("reverse_kl", options={"critic_steps": k, "critic_learning_rate": 5e-4})
        for k in (1, 3, 5)
    },
    # Adversarial terms and real samples, under a teacher with one mode too heavy.
    "wrong teacher": {
        "reverse_kl": Trial("reverse_kl", "uneven ring", "ring"),
        "dmd2, weight 0.1": Trial(DMD2(weight=0.1), "uneven ring", "ring"),
        "dmd2, weight 1": Trial("dmd2", "uneven ring", "ring"),
        "sid, alpha 1": Trial("sim_l2", "uneven ring", "ring"),
        "sida": Trial("sida", "uneven ring", "ring"),
    },
    "stabilisers": {
        "no scale": without(scale=False), "no clip": without(clip=None), "no level means": without(levels=0),
        "no unit mean": without(unit_mean=False), "none": without(normalise=False),
    },
    "alpha": {f"{alpha:g}": Trial(ScoreIdentity(alpha), **FROM_SIM) for alpha in (0.0, 0.5, 1.0, 1.2)},
    # `sid` as `distill` has it for points, from a new student.
    "sid, alpha 1": {target: Trial("sid", target) for target in ("ring", "lattice")},
    # Started far from the data; sim_l2 also without its warm-up and clip, from the usual start.
    "displaced": {name: Trial(name, start=displaced) for name in
                  ("reverse_kl", "forward_kl", "jensen_shannon", "sim", "sim_l2", "fisher")},
    "bare": {"sim_l2": Trial(BARE_L2)},
    "from the teacher, ring": from_the_teacher("ring"), "from the teacher, lattice": from_the_teacher("lattice"),
    "learned teacher": {name: Trial(name, learned=3000) for name in ("reverse_kl", "jensen_shannon", "sim")},
    "capacity": {"16 units": Trial("reverse_kl", start=narrow)},
    "trajectories": trajectories("ring"), "trajectories, lattice": trajectories("lattice"),
    # Mean flow has the teacher's velocity here, and needs no share of its batch for that.
    "trajectories, longer": {
        "ctm": Trial(ConsistencyTrajectory(landing=1.0), start=distills_own, steps=5000),
        "mean_flow": Trial(MeanFlow(diagonal=0.0), start=distills_own, steps=5000),
    },
    # iCT's lower answer from the student itself, as there, or from an average with the rate 0.99 a step, as before it.
    "ict, average": {"0.99": Trial(Consistency(sigma_init=TOP, needs_target=17_700.0), start=sharp, steps=3000)},
    # ECT by the stage it ends with, from a learned teacher's weights, and from a new student.
    "ect": {
        **{f"{k}": Trial(EasyConsistency(stages=k, sigma_init=TOP), start=None, learned=3000) for k in (1, 2, 4, 8)},
        "new student": Trial(EasyConsistency(sigma_init=TOP), start=sharp, learned=3000),
    },
    "scm stability": {
        "both": Trial("scm", start=sharp),
        "no normalisation": Trial(ContinuousConsistency(normalise=None), start=sharp),
        "no rise": Trial(ContinuousConsistency(rise=0.0), start=sharp),
        "neither": Trial(ContinuousConsistency(normalise=None, rise=0.0), start=sharp),
    },
    # The share of the batch on which mean flow is flow matching; 1 is nothing but that.
    "mean flow, diagonal": {f"{share:g}": Trial(MeanFlow(diagonal=share), start=distills_own)
                            for share in (0.0, 0.25, 0.5, 0.75, 1.0)},
    "reflow rounds": {f"{k}": Trial("reflow", start=sharp, rounds=k) for k in (1, 2)},
    "calls": {"2": Trial("reverse_kl", options={"student_levels": (0.4,)}),
              "4": Trial("reverse_kl", options={"student_levels": (0.5, 0.3, 0.15)})},
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
    if trial.sim:
        distill(teacher, generator, "sim", steps=trial.sim, **options)
    steps = max(1, trial.steps - trial.sim)
    made = distill(teacher, generator, trial.objective, steps=steps, **(options | trial.options))
    for _ in range(1, trial.rounds):
        made = distill(made.ema.denoiser, None, trial.objective, steps=steps, **(options | trial.options))
    seconds = time.process_time() - start  # of one thread, whatever else runs beside it
    return {"study": study, "name": name, "seed": seed, "steps": trial.steps, "n": N, "seconds": round(seconds, 1),
            **more, **measure(made, truth, seed)}


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


def learn_ratio(loss: Callable[[Batch], Tensor], p: GaussianMixture, q: GaussianMixture, steps: int) -> Discriminator:
    """log p / q of two fixed laws at noise levels 0.1 to 4, by `matching.ratio_loss` or `ScoreOfMixture().critic_loss`;
    q stands for the student and, as a denoiser, for the critic."""
    with seeded(0):
        ratio = Discriminator(MLP(p.shape, hidden=64, out_features=1), p.sigma_data)
    rng = torch.Generator().manual_seed(1)
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
