"""A line in results.json for each stage of `minidistill cifar10`: what was asked, on what, how far it came."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from minidistill import training
from minidistill.studies.cifar10_settings import Settings
from minidistill.studies.cifar10_speed import SPEEDS, hardware
from minidistill.training import Speed, checkpoints

__all__ = ["keep_measured", "recorded"]


@contextmanager
def recorded(
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


def keep_measured(s: Settings, found: dict[str, Any]) -> None:
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
