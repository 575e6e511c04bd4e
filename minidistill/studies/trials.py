"""The trials of the long experiments in notebooks 09 to 13: what is distilled, from which start, with what changed.

A study is a set of trials, ways to distill that differ in one thing. `sweep.py` runs and measures them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from minidistill import divergences
from minidistill._random import seeded
from minidistill.distillation import (
    DMD,
    DMD2,
    OBJECTIVES,
    Consistency,
    ConsistencyTrajectory,
    ContinuousConsistency,
    DistributionMatching,
    EasyConsistency,
    MeanFlow,
    Needs,
    Objective,
    ScoreIdentity,
    ScoreImplicitMatching,
    distill,
)
from minidistill.distributions import GaussianMixture, grid, ring
from minidistill.networks import MLP, Denoiser, Generator
from minidistill.networks.jumps import TOP

__all__ = [
    "BARE_L2", "FROM_SIM", "RADIUS", "STEPS", "STUDIES", "TARGETS", "WAY_STEPS", "Trial", "collapsed",
    "displaced", "distills_own", "every_objective", "from_the_teacher", "narrow", "no_fake", "sharp", "student",
    "trajectories", "without",
]

#: Equal Gaussians on a ring; the same, the first four times as heavy; 25 on a lattice, the heaviest of which weigh four
#: times as much as the lightest.
TARGETS: dict[str, GaussianMixture] = {
    "ring": ring(8),
    "uneven ring": ring(8, weights=[4.0] + 7 * [1.0]),
    "lattice": grid(5, weights=[1.0 + 3 * i % 4 for i in range(25)]),
}
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
    watch: int = 0  # steps from one measurement of the way to the next; 0 for none
    options: dict[str, Any] = field(default_factory=dict)


def every_objective(teacher: str) -> dict[str, Trial]:
    """Every one with a fake network, but those of notebooks 12 and 13. All have the same settings but two, which take
    5/3 of the steps, since they are cheap or slow.

    dmd: more pairs and a heavier regression than by default.
    sid: the paper's alpha = 1.2, which the name stands for on images only. It needs a student that is near the data
        already, as one is that starts from a teacher's weights; so the first quarter of its run is SIM's.
    """
    longer = STEPS * 5 // 3
    trials = {name: Trial(name, teacher) for name, rule in OBJECTIVES.items()
              if Needs.of(rule).fake and name not in ("real_uid", "score_forgetting")}
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
