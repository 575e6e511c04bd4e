"""CIFAR-10 in one step, in stages of a few minutes: `minidistill cifar10 --stage all --minutes 9 --out DIR`.

Every call carries on from what the last one left in DIR, and leaves there, whatever happens: the full training state
(to go on exactly), the averaged weights in float16 (to keep, and to go on from where the state is gone; those that are
committed serve too), grids of samples, and a line in results.json. With `--size 16`, images averaged over 2x2 pixels,
the same command runs in the background of a laptop.

Here are the stages (teacher, student, evaluate, or all of them), and how they go on from a state or from weights.

    cifar10_settings.py   what may be asked for            cifar10_quality.py   what is measured, and on what
    cifar10_records.py    a line for each stage            cifar10_speed.py     which way to run a step is the fastest
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minidistill import data, plotting, teachers, training
from minidistill.distillation import OBJECTIVES, Diagnosis, Needs, ScoreIdentity, distill
from minidistill.metrics import evaluation
from minidistill.networks import Denoiser, Generator, unet
from minidistill.studies import cifar10_quality as quality
from minidistill.studies.cifar10_records import keep_measured, recorded
from minidistill.studies.cifar10_settings import STUDENTS, Settings, options, refuse_what_is_dropped
from minidistill.studies.cifar10_speed import SPEEDS, fastest, hardware, throughput, without_compiling
from minidistill.training import Speed, checkpoints

__all__ = [
    "ENDLESS", "SPEEDS", "STUDENTS", "Settings", "cifar10", "hardware", "milestones", "options", "throughput",
]

ENDLESS = 10**9  # images: the learning rate stays constant, and the average of the weights does the annealing


def cifar10(a: argparse.Namespace) -> None:
    """Run the stages asked for, and end when the minutes do; each stage's results are on disk before the next."""
    began = time.monotonic()
    s = Settings.of(a)
    refuse_what_is_dropped(s)
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

    with recorded(s, "teacher", first, before, len(images), speed):
        teachers.train_denoiser(
            images, network, labels=labels, steps=ENDLESS // s.batch_size, batch_size=s.batch_size, hold=1.0,
            flip=s.dataset == "cifar10", learning_rate=s.learning_rate or 1e-3,
            warmup=max(1, 100_000 // s.batch_size) if s.device.startswith("cuda") else 100, ema_halflife=s.ema_halflife,
            speed=speed, seed=s.seed + before, device=s.device, minutes=_minutes(until), callbacks=[export],
            callback_every=s.every, checkpoint=s.state("teacher"), resume=True, checkpoint_every=s.every,
        )


def _stage_of_student(s: Settings, images: Tensor, labels: Tensor, speed: Speed, until: float) -> None:
    """Distill a student on, from the teacher's weights or from where the last call left it."""
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
    with recorded(s, name, first, before, len(images), speed, **about):
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
    keep_measured(s, {"metrics": found.rows, "copies": found.copies})
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
