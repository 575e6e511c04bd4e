"""CIFAR-10 on one GPU in commands of a few minutes: `minidistill cifar10 --minutes 9 --out DIR`.

Every call carries on from what the last one left in DIR, and leaves there, whatever happens: the full training state
(to go on exactly), the averaged weights in float16 (to keep, and to go on from when the state was too large to
bring home), a grid of samples, and a line in results.json with hardware, images
seen, throughput and metrics. The same command runs on a CPU, with `--preset tiny --subset 5000`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidistill import data, plotting, teachers, training
from minidistill.distillation import OBJECTIVES, Diagnosis, Needs, distill
from minidistill.metrics import evaluation, features
from minidistill.networks import Denoiser, Generator, unet
from minidistill.score_matching import denoising_loss, edm_weight, log_normal_sigma
from minidistill.training import Speed, checkpoints

__all__ = ["ENDLESS", "SPEEDS", "cifar10", "hardware", "options", "throughput"]

ENDLESS = 10**9  # images: the learning rate stays constant, and the average of the weights does the annealing
SPEEDS = {
    "float32": Speed(),
    "bfloat16": Speed("bfloat16"),
    "bfloat16, channels last": Speed("bfloat16", channels_last=True),
    "bfloat16, channels last, compiled": Speed("bfloat16", channels_last=True, compile=True),
}


def cifar10(a: argparse.Namespace) -> None:
    """Train the teacher, or distil a student from it, until the minutes are nearly over; then measure and record."""
    began, out = time.monotonic(), Path(a.out)
    if a.critic_steps is None:
        a.critic_steps = Needs.of(OBJECTIVES[a.objective]).critic_steps or 1
    if a.learning_rate is None:
        a.learning_rate = 1e-3 if a.stage == "teacher" else 1e-4
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    checkpoints.writable(out / "results.json")
    images, labels = data.digits_as_rgb() if a.data == "digits" else data.cifar10(a.data, "train", n=a.subset)
    speed = _fastest(a, images, labels, out) if a.speed == "try" else SPEEDS[a.speed]
    budget = a.minutes - a.reserve - (time.monotonic() - began) / 60
    if budget <= 0:
        raise ValueError(f"--minutes {a.minutes:g}: nothing is left after loading and {a.reserve:g} for measuring")
    start = time.monotonic()
    stage = _teacher if a.stage == "teacher" else _student
    record = stage(a, images, labels, speed, budget, out)
    seconds = time.monotonic() - start
    record |= {
        "stage": a.stage, "command": _command(a.argv), "torch": torch.__version__,
        "hardware": hardware(a.device), "preset": a.preset, "batch_size": a.batch_size, "training_images": len(images),
        "minutes": seconds / 60, "images_per_second": record["images"] / seconds, "seed": a.seed,
        "speed": next(name for name, value in SPEEDS.items() if value == speed),
    }
    _keep(out, record)  # before measuring, which may run out of time
    record |= _measure(a, images, out)
    _keep(out, record)
    print(json.dumps(record, indent=1))


def _teacher(
    a: argparse.Namespace, images: Tensor, labels: Tensor, speed: Speed, minutes: float, out: Path
) -> dict[str, Any]:
    file, state = out / "teacher.safetensors", out / "state" / "teacher.safetensors"
    kept, before = _kept(file)
    torch.manual_seed(a.seed)  # the network's first weights
    # Where the full state stayed elsewhere, go on from the averaged weights, with a fresh optimizer.
    network = kept.network if isinstance(kept, Denoiser) else unet.preset(a.preset, n_classes=10)
    first = training.progress_of(state)["step"]
    every = max(1, a.checkpoint_images // a.batch_size)

    def export(now: training.State) -> dict[str, float]:
        total = before + (now.step - first) * a.batch_size
        checkpoints.save_model(file, now.modules["ema"], half=True, data="cifar10", images=total)  # type: ignore[arg-type]
        return {"images_total": total}

    teachers.train_denoiser(
        images, network, labels=labels, steps=ENDLESS // a.batch_size, batch_size=a.batch_size, hold=1.0, flip=True,
        learning_rate=a.learning_rate, warmup=max(1, 100_000 // a.batch_size), ema_halflife=a.ema_halflife,
        speed=speed, seed=a.seed, device=a.device, minutes=minutes, callbacks=[export], callback_every=every,
        checkpoint=state, resume=True, checkpoint_every=every,
    )
    return _record(state, first, a.batch_size, "loss")


def _student(
    a: argparse.Namespace, images: Tensor, labels: Tensor, speed: Speed, minutes: float, out: Path
) -> dict[str, Any]:
    teacher, _ = _kept(out / "teacher.safetensors")
    if not isinstance(teacher, Denoiser):
        raise FileNotFoundError(f"{out / 'teacher.safetensors'}: no teacher there; run --stage teacher first")
    name = f"student_{a.objective}"
    file, state = out / f"{name}.safetensors", out / "state" / f"{name}.safetensors"
    kept, before = _kept(file)
    first = training.progress_of(state)["step"]
    every = max(1, a.checkpoint_images // a.batch_size)

    def export(now: training.State) -> dict[str, float]:
        total = before + (now.step - first) * a.batch_size
        checkpoints.save_model(file, now.modules["ema"], half=True, data="cifar10",  # type: ignore[arg-type]
                               objective=a.objective, images=total)
        return {"images_total": total}

    def draw_panel(seen: Diagnosis) -> None:
        plotting.save(plotting.panel(seen).figure, out / f"{name}_panel.png")  # type: ignore[arg-type]

    distill(
        teacher, kept if isinstance(kept, Generator) else None, a.objective, steps=ENDLESS // a.batch_size, data=images,
        labels=labels, batch_size=a.batch_size, critic_steps=a.critic_steps, learning_rate=a.learning_rate,
        critic_learning_rate=a.critic_learning_rate, sigma_init=a.sigma_init, sigma_max=a.sigma_max, hold=1.0,
        flip=True, ema_halflife=a.ema_halflife, speed=speed, seed=a.seed, device=a.device, minutes=minutes,
        inspect=draw_panel, evaluate_every=every, callbacks=[export], checkpoint=state, resume=True,
        checkpoint_every=every,
    )
    return {"objective": a.objective, "critic_steps": a.critic_steps} | _record(state, first, a.batch_size, "score_gap")


def _kept(file: Path) -> tuple[Denoiser | Generator | None, int]:
    """The averaged model that an earlier call left, and how many images it has seen."""
    if not checkpoints.exists(file):
        return None, 0
    model, info = checkpoints.load_model(file)
    return model, int(info["images"])


def _record(state: Path, first: int, batch_size: int, number: str) -> dict[str, Any]:
    done = training.progress_of(state)
    latest = {key: value for record in done["history"] for key, value in record.items()}
    return {"images": (done["step"] - first) * batch_size, "images_total": int(latest["images_total"]),
            number: latest.get(number), "skipped": done["skipped"]}


def _measure(a: argparse.Namespace, images: Tensor, out: Path) -> dict[str, Any]:
    """The teacher (35 calls) and this call's student, measured in one run, and their grids of samples."""
    teacher, _ = checkpoints.load_model(out / "teacher.safetensors")
    students = {}
    if a.stage == "student":
        students[a.objective] = checkpoints.load_model(out / f"student_{a.objective}.safetensors")[0]
    speed = Speed("bfloat16" if a.device.startswith("cuda") else "float32")
    for model in (teacher, *students.values()):
        speed.apply(model.to(a.device))
    judge = features.extractor("cifar10_classifier", device=a.device)
    result = evaluation.compare(teacher, students, images, n=a.n, seed=a.seed, features=judge)
    plotting.use_theme()
    for name, samples in result.samples.items():
        plotting.save(plotting.image_grid(samples[:100].cpu(), title=name).figure, out / f"grid_{name}.png")  # type: ignore[arg-type]
    print(evaluation.table(result.rows))
    return {"metrics": result.rows}


def _fastest(a: argparse.Namespace, images: Tensor, labels: Tensor, out: Path) -> Speed:
    """Try each way to run one training step for a few seconds; throughput.json keeps what was found."""
    file = out / "throughput.json"
    if file.exists():
        found = json.loads(file.read_text())
    else:
        found = {
            name: throughput(a.preset, speed, a.batch_size, images, labels, a.device) for name, speed in SPEEDS.items()
        }
        with checkpoints.atomic(file) as path:
            path.write_text(json.dumps(found, indent=1) + "\n")
    print("images/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in found.items()), flush=True)
    # A student has three networks to compile, which takes minutes of the few there are.
    usable = [name for name in found if a.stage == "teacher" or not SPEEDS[name].compile]
    return SPEEDS[max(usable, key=lambda name: found[name])]


def throughput(
    preset: str, speed: Speed, batch_size: int, images: Tensor, labels: Tensor, device: str, seconds: float = 4.0
) -> float:
    """Images per second of the teacher's training step (forward, backward, Adam), after a warm-up."""
    model = Denoiser(unet.preset(preset, n_classes=10).to(device), 0.5)
    speed.apply(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    rng = training.generator_on(device, 0)
    x0, label = data.to_float(images[:batch_size].to(device)), labels[:batch_size].to(device)

    def step() -> None:
        sigma = log_normal_sigma(len(x0), -1.2, 1.2, rng, device)
        noise = torch.randn(x0.shape, generator=rng, device=device)
        loss = denoising_loss(model, x0, sigma, noise, label, edm_weight(sigma, 0.5)).mean()
        training.optimizer_step(loss, optimizer, 1.0)

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        wait()
        count += 1
    return count * len(x0) / (time.perf_counter() - start)


def _command(argv: Sequence[str]) -> str:
    """The command without where its files are, which says nothing about the result."""
    places = {i + k for i, word in enumerate(argv) if word in ("--out", "--data") for k in (0, 1)}
    return " ".join(["minidistill", *(word for i, word in enumerate(argv) if i not in places)])


def hardware(device: str) -> str:
    """The device in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} x {platform.machine()} CPU cores"


def _keep(out: Path, record: dict[str, Any]) -> None:
    """Append the record to results.json, or replace the last one if it is the same call's."""
    file = out / "results.json"
    records = json.loads(file.read_text()) if file.exists() else []
    same = records and all(records[-1].get(key) == record[key] for key in ("stage", "command", "images_total"))
    with checkpoints.atomic(file) as path:
        path.write_text(json.dumps([*(records[:-1] if same else records), record], indent=1) + "\n")


def options(parser: argparse.ArgumentParser) -> None:
    """What may be asked of it on the command line, besides --out, --seed and --device."""
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--stage", choices=["teacher", "student"], default="teacher", help="train the teacher, or distil it")
    add("--minutes", type=float, default=9.0, help="for everything: loading, training, measuring")
    add("--reserve", type=float, default=1.5 if gpu else 1.0, help="of them, minutes kept for measuring")
    add("--data", help="folder or archive of CIFAR-10 (else $MINIDISTILL_CIFAR10), or 'digits' to try the recipe out")
    add("--subset", type=int, help="train on so many images only, the same number of each class")
    add("--preset", choices=sorted(unet.PRESETS), default="small" if gpu else "tiny", help="the U-Net's size")
    add("--objective", choices=sorted(OBJECTIVES), default="sid", help="of the student")
    add("--critic-steps", type=int,
        help="updates of the fake network for each of the student; if not given the objective's own number, or 1")
    add("--batch-size", type=int, default=512 if gpu else 64, help="of all processes together")
    add("--learning-rate", type=float, help="1e-3 for a teacher, 1e-4 for a student, if not given")
    add("--critic-learning-rate", type=float, default=1e-4, help="of the student's fake network and ratio")
    add("--sigma-init", type=float, default=2.5, help="noise level at which the student reads its input")
    add("--sigma-max", type=float, default=20.0, help="highest noise level at which student and teacher are compared")
    add("--ema-halflife", type=float, default=500_000 if gpu else 5_000, help="in images")
    add("--checkpoint-images", type=int, default=500_000 if gpu else 2_000, help="save whenever so many were seen")
    add("--speed", choices=["try", *SPEEDS], default="try" if gpu else "float32", help="'try' takes the fastest")
    add("--n", type=int, default=10_000 if gpu else 200, help="samples to measure")
