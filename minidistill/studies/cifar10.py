"""CIFAR-10 in one step, in stages of a few minutes: `minidistill cifar10 --stage all --minutes 9 --out DIR`.

Every call carries on from what the last one left in DIR, and leaves there, whatever happens: the full training state
(to go on exactly), the averaged weights in float16 (to keep, and to go on from where the state is gone; those that are
committed serve too), grids of samples, and a line in results.json. With `--size 16`, images averaged over 2x2 pixels,
the same command runs in the background of a laptop.

    settings   what was asked for               stages    teacher, student, evaluate, or all of them
    going on   from a state, or from weights    records   a line in results.json for each stage

What is measured, and on what, is in `cifar10_quality.py`, and which way to run a step is the fastest in
`cifar10_speed.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidistill import _validate, data, plotting, teachers, training
from minidistill.distillation import OBJECTIVES, Diagnosis, Drifting, Needs, Objective, ScoreIdentity, distill
from minidistill.metrics import evaluation
from minidistill.networks import Denoiser, Generator, unet
from minidistill.studies import cifar10_quality as quality
from minidistill.studies.cifar10_speed import SPEEDS, fastest, hardware, throughput, without_compiling
from minidistill.training import Speed, checkpoints

__all__ = [
    "ENDLESS", "SPEEDS", "STUDENTS", "Settings", "cifar10", "hardware", "milestones", "options", "throughput",
]

ENDLESS = 10**9  # images: the learning rate stays constant, and the average of the weights does the annealing
#: What a student may be trained by: every objective, SiD at the alpha that needs no luck, drifting in features too.
STUDENTS: dict[str, Objective] = {
    **OBJECTIVES, "sid_alpha_1": ScoreIdentity(alpha=1.0), "drifting_features": Drifting(features_at=1.0),
}


# ---------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """One call's options, as `options` describes them."""

    stage: str
    minutes: float
    reserve: float
    share: float
    out: Path
    weights: Path
    data: str | None
    size: int
    batches: tuple[int, ...] | None
    subset: int | None
    preset: str
    patch: int
    grow: str | None
    objective: str
    critic_steps: int | None
    batch_size: int
    learning_rate: float | None
    critic_learning_rate: float
    sigma_init: float
    sigma_max: float
    ema_halflife: float
    checkpoint_images: int
    speed: str
    n: int
    reference: int
    track: int
    seed: int
    device: str
    command: str

    @classmethod
    def of(cls, a: argparse.Namespace) -> Settings:
        given = {f.name: getattr(a, f.name) for f in fields(cls) if f.name != "command"}
        batches = None if a.batches is None else tuple(int(number) for number in a.batches.split(","))
        folders = {name: _validate.path(f"--{name}", given[name]) for name in ("out", "weights")}
        patch = a.patch or (2 if a.size == 32 and a.preset == "tiny" else 1)
        return cls(**{**given, **folders, "batches": batches, "patch": patch, "command": _command(a.argv)})

    @property
    def dataset(self) -> str:
        return "digits" if self.data == "digits" else "cifar10"

    @property
    def every(self) -> int:
        """Steps between exports."""
        return max(1, self.checkpoint_images // self.batch_size)

    def network(self) -> unet.UNet:
        """A new one, of the preset."""
        return unet.preset(self.preset, (3, self.size, self.size), n_classes=10, patch=self.patch)

    def file(self, name: str) -> Path:
        return self.out / f"{name}.safetensors"

    def state(self, name: str) -> Path:
        return self.out / "state" / f"{name}.safetensors"


def cifar10(a: argparse.Namespace) -> None:
    """Run the stages asked for, and end when the minutes do; each stage's results are on disk before the next."""
    began = time.monotonic()
    s = Settings.of(a)
    _refuse_what_is_dropped(s)
    end = began + 60 * s.minutes
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    checkpoints.writable(s.out / "results.json")
    if s.minutes <= s.reserve and s.stage != "evaluate":
        raise ValueError(f"--minutes {s.minutes:g}: nothing is left after {s.reserve:g} for measuring (--reserve)")
    images, labels = _images(s)
    if s.stage in ("student", "evaluate"):
        _teacher_of(s)  # an error now, if there is none
    speed = _speed(s, images, labels) if s.stage != "evaluate" else SPEEDS["float32"]
    training_ends = end - 60 * s.reserve  # each stage makes at least one step
    if s.stage == "teacher":
        _stage_of_teacher(s, images, labels, speed, training_ends)
    if s.stage == "all" and s.share > 0:
        now = time.monotonic()
        _stage_of_teacher(s, images, labels, speed, now + s.share * (training_ends - now))
    if s.stage in ("student", "all"):
        _stage_of_student(s, images, labels, without_compiling(speed), training_ends)
    _stage_of_measuring(s, images, end)


def _refuse_what_is_dropped(s: Settings) -> None:
    """ValueError for an option that this call has no use for."""
    digits, idle = s.dataset == "digits", f"--stage {s.stage} trains no student"
    for option, dropped, why in (
        ("subset", digits, "the digits are few"), ("subset", s.batches is not None, "--batches are whole files"),
        ("batches", digits, "only of cifar10"), ("critic_steps", s.stage in ("teacher", "evaluate"), idle),
        ("learning_rate", s.stage == "evaluate", "--stage evaluate trains nothing"),
    ):
        if dropped and (given := getattr(s, option)) is not None:
            raise ValueError(f"--{option.replace('_', '-')} {given}: {why}; wanted the command without it")


def _speed(s: Settings, images: Tensor, labels: Tensor) -> Speed:
    if s.speed != "try":
        return SPEEDS[s.speed]
    where = f"{s.preset} {s.size} patch {s.patch} {s.batch_size} {hardware(s.device)}"
    return fastest(s.network, where, s.out / "throughput.json", s.batch_size, images, labels, s.device)


def _images(s: Settings) -> tuple[Tensor, Tensor]:
    """The training images (n, 3, size, size) as bytes, and their labels."""
    if s.dataset == "digits":
        return data.digits_as_rgb(s.size)
    if s.batches is None:
        return data.cifar10(s.data, "train", n=s.subset, size=s.size)
    return data.cifar10_batches(s.data, s.batches, s.size)


# ---------------------------------------------------------------------------------- stages


def _stage_of_teacher(s: Settings, images: Tensor, labels: Tensor, speed: Speed, until: float) -> None:
    """Train the teacher on; keep the averaged weights, and those of milestones for good."""
    kept, seen = _kept(s, "teacher")
    torch.manual_seed(s.seed)  # the network's first weights
    # Where the full state stayed elsewhere, go on from the averaged weights, with a fresh optimizer.
    network = kept.network if isinstance(kept, Denoiser) else _grown(s, s.grow) if s.grow else s.network()
    before = _before(s, "teacher", {"images": seen})["images"]
    first = training.progress_of(s.state("teacher"))["step"]
    last = [before + first * s.batch_size]

    def export(now: training.State) -> dict[str, float]:
        total = before + now.step * s.batch_size
        names = ["teacher", *(f"teacher_at_{mark}" for mark in milestones(last[0], total))]
        for name in names:
            _export(s, name, now.modules["ema"], images=total)
        last[0] = total
        return {"images_total": total}

    with _recorded(s, "teacher", first, before, len(images), speed):
        teachers.train_denoiser(
            images, network, labels=labels, steps=ENDLESS // s.batch_size, batch_size=s.batch_size, hold=1.0,
            flip=s.dataset == "cifar10", learning_rate=s.learning_rate or 1e-3,
            warmup=max(1, 100_000 // s.batch_size) if s.device.startswith("cuda") else 100, ema_halflife=s.ema_halflife,
            speed=speed, seed=s.seed + before, device=s.device, minutes=_minutes(until), callbacks=[export],
            callback_every=s.every, checkpoint=s.state("teacher"), resume=True, checkpoint_every=s.every,
        )


def _stage_of_student(s: Settings, images: Tensor, labels: Tensor, speed: Speed, until: float) -> None:
    """Distil a student on, from the teacher's weights or from where the last call left it."""
    teacher, teacher_images = _teacher_of(s)
    name = f"student_{s.objective}"
    kept, seen = _kept(s, name)
    before = _before(s, name, {"images": seen, "teacher_images": teacher_images})["images"]
    first = training.progress_of(s.state(name))["step"]
    rule = STUDENTS[s.objective]
    critic_steps = s.critic_steps or (1 if isinstance(rule, ScoreIdentity) else Needs.of(rule).critic_steps or 1)
    named = s.objective if s.objective in OBJECTIVES else rule  # a name stays the same from call to call
    tracked = quality.tracker(images, s.size, s.track, s.device) if s.track else None

    def export(now: training.State) -> dict[str, float]:
        total, ema = before + now.step * s.batch_size, now.modules["ema"]
        _export(s, name, ema, images=total, objective=s.objective, teacher_images=teacher_images)
        return {"images_total": total} | ({} if tracked is None else tracked(ema))

    def draw_panel(seen: Diagnosis) -> None:
        plotting.save(plotting.panel(seen).figure, s.out / f"{name}_panel.png")  # type: ignore[arg-type]

    about = {"objective": s.objective, "critic_steps": critic_steps, "teacher_images": teacher_images}
    with _recorded(s, name, first, before, len(images), speed, **about):
        distill(
            teacher, kept if isinstance(kept, Generator) else None, named, steps=ENDLESS // s.batch_size, data=images,
            labels=labels, batch_size=s.batch_size, critic_steps=critic_steps, learning_rate=s.learning_rate or 3e-4,
            critic_learning_rate=s.critic_learning_rate, sigma_init=s.sigma_init, sigma_max=s.sigma_max, hold=1.0,
            flip=s.dataset == "cifar10", ema_halflife=s.ema_halflife, speed=speed, seed=s.seed + before,
            device=s.device, minutes=_minutes(until), inspect=draw_panel, evaluate_every=s.every, callbacks=[export],
            checkpoint=s.state(name), resume=True, checkpoint_every=s.every,
        )


def _stage_of_measuring(s: Settings, images: Tensor, end: float) -> None:
    """Measure teacher and students in one run while there is time, and draw their samples; what there was no time for
    is left out."""
    models: dict[str, Denoiser | Generator] = {"teacher": _teacher_of(s)[0]}
    for file in sorted(s.out.glob("student_*.safetensors")):
        name = file.stem.removeprefix("student_")
        if s.stage == "evaluate" or (name == s.objective and s.stage != "teacher"):
            models[name] = checkpoints.load_model(file)[0]
    speed = Speed("bfloat16" if s.device.startswith("cuda") else "float32")
    for model in models.values():
        speed.apply(model.to(s.device))
    held = _held_out(s)
    found = quality.measure(models, images, held, n=s.n, n_reference=s.reference, seed=s.seed, device=s.device, end=end)
    quality.draw(found, images, s.out, seen=_images_seen(s, models))
    _keep_measured(s, {"metrics": found.rows, "copies": found.copies})
    for judge in dict.fromkeys(row["features"] for row in found.rows):
        print(evaluation.table([row for row in found.rows if row["features"] == judge]))
    if not found.rows:
        print("no time was left to measure")


def _held_out(s: Settings) -> Tensor | None:
    """CIFAR-10's test images, where they are at hand: what real images score, the best a model can do."""
    if s.dataset == "digits":
        return None
    try:
        return data.cifar10(s.data, "test", size=s.size)[0]
    except FileNotFoundError:
        return None


def _images_seen(s: Settings, models: dict[str, Denoiser | Generator]) -> dict[str, int]:
    return {name: _kept(s, "teacher" if name == "teacher" else f"student_{name}")[1] for name in models}


def milestones(before: int, total: int) -> Iterator[int]:
    """The numbers of images seen at which a teacher's weights are kept, that lie above `before` and up to `total`."""
    early = (25_000, 50_000, 100_000, 200_000, 400_000, 700_000, 1_000_000)
    for mark in (*early, *range(1_500_000, total + 1, 500_000)):
        if before < mark <= total:
            yield mark


def _minutes(until: float) -> float:
    return max((until - time.monotonic()) / 60, 1e-3)


# ---------------------------------------------------------------------------------- going on


def _kept(s: Settings, name: str) -> tuple[Denoiser | Generator | None, int]:
    """The averaged model that an earlier call left, else the committed one, and how many images it has seen."""
    own = s.file(name)
    committed = s.weights / f"cifar10_{s.size}x{s.size}_{name}.safetensors"
    for file in (own, committed):
        if not file.is_file():
            continue
        model, info = checkpoints.load_model(file)
        denoiser: Any = model.denoiser if isinstance(model, Generator) else model
        same = denoiser.network.config == s.network().config
        if same and info.get("data") == s.dataset:
            return model, int(info["images"])
        if file == own:
            raise ValueError(f"{file} is of another size, preset or data set; wanted those asked for, or another --out")
    return None, 0


def _grown(s: Settings, file: str) -> unet.UNet:
    """A network for images of 32x32 that starts from the weights of a teacher of 16x16."""
    small, info = checkpoints.load_model(file)
    config = s.network().config
    network = unet.grow(small.network) if isinstance(small, Denoiser) and isinstance(small.network, unet.UNet) else None
    if network is None or network.config != config or info.get("data") != s.dataset:
        raise ValueError(f"--grow {file}: wanted a teacher of {s.dataset} at 16x16 of preset {s.preset}, "
                         "and --size 32 --patch 2")
    return network


def _teacher_of(s: Settings) -> tuple[Denoiser, int]:
    teacher, seen = _kept(s, "teacher")
    if not isinstance(teacher, Denoiser):
        raise FileNotFoundError(f"{s.file('teacher')}: no teacher there; run --stage teacher first")
    return teacher, seen


def _before(s: Settings, name: str, start: dict[str, int]) -> dict[str, int]:
    """What the state's first step started from: what an earlier call noted, or, if there is no state yet or the teacher
    has since learned more, `start`. The images seen are then always those, plus the state's steps."""
    note = s.state(name).with_suffix(".json")
    if s.state(name).is_file() and note.is_file():
        noted = json.loads(note.read_text())
        if noted.get("teacher_images") == start.get("teacher_images"):
            return noted
        s.state(name).unlink()  # of a student of the teacher as it was: go on from the averaged student
    elif s.state(name).is_file():  # of before there were notes
        return start | {"images": 0}
    with checkpoints.atomic(note) as path:
        path.write_text(json.dumps(start) + "\n")
    return start


def _export(s: Settings, name: str, model: Any, **about: Any) -> None:
    checkpoints.save_model(s.file(name), model, half=True, data=s.dataset, **about)


# ---------------------------------------------------------------------------------- records


@contextmanager
def _recorded(
    s: Settings, name: str, first: int, before: int, n_images: int, speed: Speed, **about: Any
) -> Iterator[None]:
    """Append a record of the training inside to results.json, if it made a step: interrupted or not, it counts."""
    start = time.monotonic()
    try:
        yield
    finally:
        done, seconds = training.progress_of(s.state(name)), time.monotonic() - start
        images = (done["step"] - first) * s.batch_size
        if images > 0:
            _keep(s, about | {
                "stage": "teacher" if name == "teacher" else "student", "size": s.size, "data": s.dataset,
                "command": s.command, "hardware": hardware(s.device), "torch": torch.__version__, "preset": s.preset,
                "patch": s.patch, "batch_size": s.batch_size, "training_images": n_images, "seconds": seconds,
                "images": images, "images_total": before + done["step"] * s.batch_size,
                "images_per_second": images / seconds,
                "speed": next(key for key, value in SPEEDS.items() if value == speed), "seed": s.seed,
                "skipped": done["skipped"],
                "curve": _curve([row for row in done["history"] if row["step"] > first], before),
            })


def _curve(history: list[dict[str, float]], before: int, points: int = 60) -> list[dict[str, float]]:
    """The training's course in a few points: the mean of what was recorded in each of `points` stretches."""
    size = max(1, -(-len(history) // points))
    curve = []
    for k in range(0, len(history), size):
        part = history[k : k + size]
        names = sorted({name for row in part for name in row} - {"step", "images", "images_total", "skipped"})
        means = {name: float(np.mean([row[name] for row in part if name in row])) for name in names}
        curve.append({"images": before + part[-1]["images"]} | {name: round(v, 5) for name, v in means.items()})
    return curve


def _keep(s: Settings, record: dict[str, Any]) -> None:
    """Append a record to results.json."""
    file = s.out / "results.json"
    records = json.loads(file.read_text()) if file.exists() else []
    with checkpoints.atomic(file) as path:
        path.write_text(json.dumps([*records, record], indent=1) + "\n")


def _keep_measured(s: Settings, found: dict[str, Any]) -> None:
    """Put what was measured into this call's last record; one of its own if it only measured."""
    file = s.out / "results.json"
    if s.stage == "evaluate":
        about = {"stage": "evaluate", "size": s.size, "data": s.dataset, "command": s.command,
                 "hardware": hardware(s.device), "torch": torch.__version__, "seed": s.seed}
        _keep(s, about | found)
        return
    records = json.loads(file.read_text())
    records[-1] |= found
    with checkpoints.atomic(file) as path:
        path.write_text(json.dumps(records, indent=1) + "\n")


def _command(argv: Sequence[str]) -> str:
    """The command without where its files are, which says nothing about the result."""
    hidden = ("--out", "--data", "--weights")
    places = {i + k for i, word in enumerate(argv) if word in hidden for k in (0, 1)}
    words = [Path(word).name if argv[i - 1] == "--grow" else word for i, word in enumerate(argv)]
    return " ".join(["minidistill", *(word for i, word in enumerate(words) if i not in places)])


# ---------------------------------------------------------------------------------- command line


def options(parser: argparse.ArgumentParser) -> None:
    """What may be asked of it on the command line, besides --out, --seed and --device."""
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--stage", choices=["teacher", "student", "evaluate", "all"], default="teacher",
        help="train the teacher, distil it, measure everything in --out, or all of that")
    add("--minutes", type=float, default=9.0, help="for everything: loading, training, measuring")
    add("--reserve", type=float, default=2.0 if gpu else 1.0, help="of them, minutes kept for measuring")
    add("--share", type=float, default=0.67,
        help="of --stage all's training time, the teacher's part; 0 leaves the teacher as it is")
    add("--data", help="folder or archive of CIFAR-10 (else $MINIDISTILL_CIFAR10), or 'digits' to try the recipe out")
    add("--size", type=int, choices=[16, 32], default=32, help="32, or 16: images averaged over 2x2 pixels")
    add("--batches", help="only these of the five files of training images, such as 1,2,3")
    add("--subset", type=int, help="train on so many images only, the same number of each class")
    add("--weights", default="tutorials/checkpoints", help="folder of committed weights to go on from")
    add("--preset", choices=sorted(unet.PRESETS), default="small" if gpu else "tiny", help="the U-Net's size")
    add("--patch", type=int, choices=[1, 2],
        help="2 makes 2x2 pixels one position of the network: a third of the time. If not given 2 for tiny at 32x32")
    add("--grow", metavar="FILE",
        help="a teacher of 16x16; where there is none of 32x32 yet, it starts from these weights (with --patch 2)")
    add("--objective", choices=sorted(STUDENTS), default="sim", help="of the student")
    add("--critic-steps", type=int,
        help="updates of the fake network for each of the student; if not given the objective's own number, or 1")
    add("--batch-size", type=int, default=512 if gpu else 64, help="images in each update")
    add("--learning-rate", type=float, help="1e-3 for a teacher, 3e-4 for a student, if not given")
    add("--critic-learning-rate", type=float, default=3e-4, help="of the fake network and the ratio")
    add("--sigma-init", type=float, default=2.5, help="noise level at which the student reads its input")
    add("--sigma-max", type=float, default=20.0, help="highest noise level at which student and teacher are compared")
    add("--ema-halflife", type=float, default=500_000 if gpu else 50_000, help="in images")
    add("--checkpoint-images", type=int, default=500_000 if gpu else 6_400, help="save whenever so many were seen")
    add("--speed", choices=["try", *SPEEDS], default="try", help="'try' takes the fastest")
    add("--n", type=int, default=10_000, help="samples to measure, or as many as there is time for; 0 for none")
    add("--reference", type=int, default=50_000 if gpu else 20_000, help="real images to measure them against")
    add("--track", type=int, default=1000, help="samples by which a student's course is followed; 0 for not at all")
