"""The trials of notebooks 12 and 13: no critic of scores, the way back from a far start, what makes runs run away."""

from __future__ import annotations

from typing import Any

from minidistill import divergences
from minidistill.distillation import (
    DMD,
    OBJECTIVES,
    BoundedPull,
    ClassRatio,
    Drifting,
    EmbeddingLoss,
    EnergyScore,
    Objective,
    ScoreIdentity,
    backtracking,
)
from minidistill.studies.trials import STEPS, Trial, displaced, distills_own
from minidistill.studies.variants import LargeLevelsFirst, PartlyFrozen, SmoothFake

__all__ = ["LARGE", "RUNAWAY_STEPS", "STUDIES", "without_scores"]

#: For objectives that know samples alone: the more of them at once, the better they tell two laws apart.
LARGE: dict[str, Any] = {"batch_size": 512, "ema_halflife": 50_000}
RUNAWAY_STEPS = 800  # of runs that only have to show whether they stay


def without_scores(teacher: str) -> dict[str, Trial]:
    """Those that train no denoiser of the student's samples, and RealUID, whose fake network sees data; but `drifting`,
    which is in "no fake", of notebook 09."""
    longer = STEPS * 5 // 3
    trials = {
        "sinkhorn": Trial("sinkhorn", teacher, steps=STEPS // 3, options=LARGE),  # a step is two transport problems
        "mmd": Trial("mmd", teacher, steps=longer, options=LARGE),
        "energy_score": Trial("energy_score", teacher, steps=longer, options=LARGE),
        "embedding_loss": Trial("embedding_loss", teacher, options=LARGE),
        "moment_matching": Trial("moment_matching", teacher, start=distills_own),
        # A JKO step is a twentieth of the run, and the average is not to reach back farther.
        "wasserstein_flow": Trial("wasserstein_flow", teacher, options={"ema_halflife": 10_000}),
    }
    trials |= {name: Trial(name, teacher) for name in
               ("class_ratio", "gan", "score_mismatching", "score_of_mixture_training", "real_uid", "sds", "asd")}
    return trials


def way_back(stages: int, degrading: int, share: float, critic_steps: int = 3) -> Trial:
    """Reverse KL from a far start on the way back, with as many updates in all as without: the way is paid for in
    steps."""
    rule = backtracking("reverse_kl", stages=stages, degrading=degrading, share=share)
    return Trial(rule, start=displaced, steps=STEPS - degrading // (1 + critic_steps), watch=25)


def runaway(objective: str | Objective = "sim_l2", **options: Any) -> Trial:
    return Trial(objective, "lattice", steps=RUNAWAY_STEPS, options=options)


def bounded(name: str, teacher: str = "lattice", **more: Any) -> Trial:
    rule = ScoreIdentity(1.2) if name == "sid" else OBJECTIVES[name]
    return Trial(BoundedPull(rule), teacher, **more)


SQUARED = OBJECTIVES["sim_l2"]
STUDIES: dict[str, dict[str, Trial]] = {
    "no scores": without_scores("ring"), "no scores, lattice": without_scores("lattice"),
    "laplace": {teacher: Trial(Drifting(kernel="laplace"), teacher, steps=STEPS * 5 // 3, options=LARGE)
                for teacher in ("ring", "lattice")},
    # At 2 the score knows the mean alone.
    "energy": {f"{alpha:g}": Trial(EnergyScore(alpha), steps=STEPS * 5 // 3, options=LARGE)
               for alpha in (0.5, 1.5, 2.0)},
    # More of what was best in a first look.
    "no scores, longer": {
        "drifting, ring": Trial("drifting", "ring", steps=5000, options=LARGE),
        "drifting, lattice": Trial("drifting", "lattice", steps=5000, options=LARGE),
        "mmd, ring": Trial("mmd", "ring", steps=5000, options=LARGE),
        "mmd, lattice": Trial("mmd", "lattice", steps=5000, options=LARGE),
    },
    # With scores, to be held against them; and the embedding loss as a term beside reverse KL.
    "longer": {
        "dmd, lattice": Trial(DMD(weight=4.0, needs_pairs=8192), "lattice", steps=5000),
        "regression, lattice": Trial("regression", "lattice", steps=5000),
    },
    "embedding, joined": {teacher: Trial(EmbeddingLoss(OBJECTIVES["reverse_kl"]), teacher)
                          for teacher in ("ring", "lattice")},
    "class ratio": {
        **{name: Trial(ClassRatio(divergences.F[name])) for name in ("forward_kl", "jensen_shannon")},
        "teacher's weights": Trial("class_ratio", start=None, learned=3000),
    },
    "way back": {"plain": Trial("reverse_kl", start=displaced, watch=25), "4 stages, short": way_back(4, 20, 0.1),
                 "5 stages": way_back(5, 400, 0.5)},
    "runaway": {
        "as it is": runaway(),
        "exact fake": runaway(fake="empirical"),
        "y frozen": runaway(PartlyFrozen("y"), warmup=100, clip=1.0),
        "D_q frozen": runaway(PartlyFrozen("D_q"), warmup=100, clip=1.0),
        "small rate": runaway(critic_steps=5, learning_rate=5e-4),
        "smooth fake": runaway(SmoothFake(SQUARED)),
        "large levels first": runaway(LargeLevelsFirst(SQUARED)),
        "bounded pull": runaway(BoundedPull(SQUARED)),
    },
    # The cure at full length, of all that were lost there.
    "bounded, lattice": {
        "sim": bounded("sim"), "sim_l2": bounded("sim_l2"), "uni_instruct": bounded("uni_instruct"),
        "sida": bounded("sida"), "sida, warm-up": bounded("sida", options={"warmup": 100}),
        "sid": bounded("sid", steps=STEPS * 5 // 3, sim=STEPS * 5 // 12, options={"learning_rate": 1e-3}),
        "sid, no SIM": bounded("sid", steps=STEPS * 5 // 3, options={"learning_rate": 1e-3}),
    },
    "bounded, ring": {"sim_l2": bounded("sim_l2", "ring")},
}
