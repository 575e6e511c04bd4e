"""Every objective on real 8x8 digits, from one teacher: `minidistill digits --out figures/digits`.

Each student starts as a copy of the same trained teacher and gets the same steps, batches, rates and noise levels;
nothing is tuned for any. Critic steps are the objective's own where it asks for some, else two. Those that learn a way
down are tried again for longer, from a teacher whose noise embedding they can differentiate. Fréchet distance,
precision and recall are measured as everywhere (`metrics.evaluation`), and stored as those of `sweep.py` are.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from minidistill import _validate, data
from minidistill._random import seeded
from minidistill.distillation import (
    GAN,
    OBJECTIVES,
    Consistency,
    ConsistencyTrajectory,
    ContinuousConsistency,
    Drifting,
    Needs,
    Objective,
    Reflow,
    diagnose,
    distill,
    draw,
)
from minidistill.metrics import evaluation, features, frechet_distance
from minidistill.networks import MLP, Denoiser, Generator
from minidistill.networks.jumps import HIGHEST
from minidistill.studies import rows
from minidistill.studies.trajectories import CALLS
from minidistill.studies.variants import PartlyFrozen
from minidistill.teachers import train_denoiser
from minidistill.training import checkpoints

__all__ = [
    "LONGER", "N", "SMOOTH", "STEPS", "STUDIES", "TEACHER_STEPS", "TRAJECTORIES", "command", "digits", "options",
    "read", "run", "settings", "teacher_of",
]

TEACHER_STEPS, STEPS = 2500, 1000
N, KEPT = 4000, 100  # samples that are measured, and of those kept for pictures: ten of each class


#: What learns a way down, for so many times the steps. All from EDM's highest level: at 20 standard deviations of the
#: data, enough for laws about the origin, noise does not hide yet that an image's mean is not 0, and even the teacher's
#: samples from there are twice as far from the data.
LONGER = 8
TRAJECTORIES: dict[str, str | Objective | None] = {
    "consistency_distillation": Consistency(18, 18, lognormal=False, huber=None, teacher_step=True, scattered=True,
                                            weight=0.5),
    "scm": ContinuousConsistency(sigma_init=HIGHEST, log_mean=1.0, log_std=1.8),
    "ctm": ConsistencyTrajectory(longest=3, landing=1.0, whole=0.5, sigma_init=HIGHEST),
    "reflow": Reflow(sigma_init=HIGHEST),
}
#: Octaves of their teacher's noise embedding in place of its eight: the derivative in the noise level that they learn
#: from grows with the highest of them.
SMOOTH = 4
#: "start" is what every student is before its first step, one call of the teacher.
STUDIES: dict[str, dict[str, str | Objective | None]] = {
    "objectives": {"start": None, **{name: name for name in OBJECTIVES}},
    "frozen": {f"only {part} frozen": PartlyFrozen(part) for part in ("y", "D_q")},
    "trajectories": TRAJECTORIES,
    # What needs no scores: seen through the teacher's features, with most of its weights held, from other starts.
    "no scores": {
        "drifting, features": Drifting(features_at=1.0), "gan, frozen": GAN(frozen=True),
        "class_ratio, new student": "class_ratio", "class_ratio, teacher's features": "class_ratio",
    },
}


def teacher_of(folder: str | Path, steps: int = TEACHER_STEPS, smooth: bool = False) -> Denoiser:
    """The teacher of the digits in a folder, by class; trained if it is not there yet (half a minute), and kept.
    smooth: one with `SMOOTH` octaves, in a file of its own."""
    file = _validate.path("folder", folder) / ("teacher_smooth.safetensors" if smooth else "teacher.safetensors")
    if not file.exists():
        images, labels = data.digits()
        with seeded(0):
            network = MLP((1, 8, 8), hidden=256, depth=4, n_classes=10, octaves=SMOOTH if smooth else 8)
        made = train_denoiser(images, network, labels=labels, steps=steps, seed=0, progress=False)
        checkpoints.save_model(file, made, half=True, data="digits", steps=steps, seed=0)
    teacher = checkpoints.load_model(file)[0]
    if not isinstance(teacher, Denoiser):
        raise ValueError(f"{file} is a student; wanted a teacher there, or nothing")
    return teacher


def start_of(teacher: Denoiser, name: str, seed: int) -> Generator | None:
    """The student that a trial begins with, if its name says so: a new one, or one that has the teacher's inner layers,
    its features, but neither the layer that reads samples nor the one that writes them. None: a copy of the teacher."""
    if "new student" not in name and "teacher's features" not in name:
        return None
    with seeded(seed):
        fresh = MLP((1, 8, 8), hidden=256, depth=4, n_classes=10)
    if "teacher's features" in name:
        inner = {key: value for key, value in teacher.network.state_dict().items()
                 if not key.startswith(("inward", "outward"))}
        fresh.load_state_dict(inner, strict=False)
    return Generator(Denoiser(fresh, teacher.sigma_data), 1.5 * teacher.sigma_data)


def settings(teacher: Denoiser, objective: str | Objective, steps: int = STEPS) -> dict[str, Any]:
    """What `distill` is given besides teacher and objective."""
    images, labels = data.digits()
    rule = OBJECTIVES[objective] if isinstance(objective, str) else objective
    return {
        "steps": steps, "batch_size": 128, "data": images, "labels": labels,
        "critic_steps": Needs.of(rule).critic_steps or 2, "learning_rate": 5e-4, "critic_learning_rate": 1e-3,
        "sigma_max": 3.5 * teacher.sigma_data, "ema_halflife": 50_000, "evaluate_every": max(1, steps // 8),
    }


@lru_cache(maxsize=1)
def _judge() -> tuple[features.Extractor, Tensor]:
    """What looks at the images, and its features of the real ones."""
    judge = features.extractor("digits_classifier")
    return judge, judge(data.digits()[0])


def run(study: str, name: str, seed: int, folder: str, steps: int = STEPS) -> dict[str, Any]:
    """Distill the folder's teacher by one objective, and measure the student beside it, both on the same noise."""
    way = study == "trajectories"
    teacher, rule, (images, _) = teacher_of(folder, smooth=way), STUDIES[study][name], data.digits()
    steps = LONGER * steps if way else steps
    (judge, reference), start = _judge(), time.process_time()
    row: dict[str, Any] = {"study": study, "name": name, "seed": seed, "steps": steps if rule else 0}
    if rule is None:
        student = Generator(copy.deepcopy(teacher), 1.5 * teacher.sigma_data)
    else:
        made = distill(
            teacher, start_of(teacher, name, seed), rule, seed=seed, progress=False, **settings(teacher, rule, steps),
            evaluate=lambda now: {"frechet": frechet_distance(judge(draw(now, N // 4)), reference)},
        )
        student, row["seconds"] = made.ema, round(time.process_time() - start, 1)  # of one thread
        row["curve"] = [[past["step"], past["frechet"]] for past in made.history if "frechet" in past]
        if made.fake is not None:
            row["score_gap"] = diagnose(student, teacher, made.fake, sigma_data=teacher.sigma_data).score_gap
    found = evaluation.compare(teacher, {name: student}, images, n=N, seed=1, features=judge, progress=False)
    if way:
        of_teacher = found.rows[0]["frechet"]
        row["calls_ratio"] = [round(frechet_distance(judge(draw(student, N, seed=1, steps=calls)), reference)
                                    / of_teacher, 4) for calls in CALLS]
    return row | found.rows[1] | {"seed": seed, "samples": found.samples[name][:KEPT].clamp(-1, 1).numpy()}


def read(folder: str | Path) -> rows.Stored:
    """The rows and samples in a folder. FileNotFoundError, which says where to get them, if they are not there."""
    return rows.read(folder, "digits")


def digits(
    out: str | Path, studies: Sequence[str], seeds: int, steps: int = STEPS, workers: int = 2, first: int = 0
) -> None:
    """All runs, with the seeds `first`, `first` + 1, ..., that `out` does not have yet."""
    out = _validate.path("out", out)
    checkpoints.writable(out / "results.json")
    for smooth in {study == "trajectories" for study in studies}:
        teacher_of(out, min(TEACHER_STEPS, 2 * steps), smooth)
    one, names = partial(run, folder=str(out), steps=steps), {study: list(trials) for study, trials in STUDIES.items()}
    rows.collect(out, one, names, studies, range(first, first + seeds), workers)


def options(parser: argparse.ArgumentParser) -> None:
    """What may be asked of it on the command line, besides --out, --seed and --device."""
    add = parser.add_argument
    add("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="NAME",
        help=f"{', '.join(STUDIES)} (default all)")
    add("--seeds", type=int, default=3, help="runs of each objective, with seeds --seed, --seed + 1, ...")
    add("--steps", type=int, default=STEPS, help="of every run")
    add("--workers", type=int, default=2, help="processes that share the runs, of one thread each")


def command(a: argparse.Namespace) -> None:
    """`minidistill digits`."""
    if a.device != "cpu":
        raise ValueError(f"--device {a.device}: its small networks run on the CPU; wanted the command without it")
    seeds, steps, workers = (_validate.whole(f"--{name}", getattr(a, name)) for name in ("seeds", "steps", "workers"))
    digits(a.out, a.studies, seeds, steps, workers, first=a.seed)
