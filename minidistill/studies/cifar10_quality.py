"""How good are a CIFAR-10 teacher and its students? Grids to look at first, then distances in two feature sets.

The stored classifier's features know the classes; those of a network with random weights see colours and textures.
Where the two disagree about a student, the class can be told and something finer is off (or the other way round).
Whether a model copies is asked of its samples' nearest training images.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from minidistill import data, plotting, training
from minidistill.metrics import evaluation, features, frechet_distance
from minidistill.metrics.features import Extractor
from minidistill.networks import Denoiser, Generator

__all__ = [
    "CALLS", "Measured", "Nearest", "TimeUp", "best_student", "draw", "judges", "measure", "nearest", "picture_of",
    "sample", "side_by_side", "tracker", "until",
]

LEVELS = 18
CALLS = 2 * LEVELS - 1  # of the network, for a sample of a teacher
FIRST_SHOWN, SHOWN = 20, 100  # samples on a grid
COPIES = 500  # samples whose nearest training images are sought
LEAST = 10  # fewer samples are not worth a number
TRACK_REFERENCE = 5000


@dataclass(frozen=True)
class Nearest:
    """Some samples and, for each feature set by name, the training image nearest to each: (m, 3, h, w) floats."""

    model: str
    samples: Tensor
    found: dict[str, Tensor]


@dataclass
class Measured:
    """What there was time for. Rows are as `evaluation.measure` gives them, one for each model and feature set."""

    shown: dict[str, Tensor] = field(default_factory=dict)  # by model, at most (SHOWN, 3, h, w), classes in turn
    rows: list[dict[str, Any]] = field(default_factory=list)
    copies: list[dict[str, Any]] = field(default_factory=list)
    nearest: Nearest | None = None


class TimeUp(BaseException):
    """The time for a piece of work is over; not an `Exception`, which some code in between may catch."""


@contextmanager
def until(end: float) -> Iterator[None]:
    """Leave the block, in silence, when `time.monotonic()` reaches `end`. Only what is in Python can be interrupted, in
    the main thread, where the system has such an alarm; elsewhere the block runs to its end."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise TimeUp

    before, graphs = signal.signal(signal.SIGALRM, stop), torch.is_grad_enabled()
    try:
        signal.setitimer(signal.ITIMER_REAL, max(end - time.monotonic(), 1e-3))
        yield
    except TimeUp:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        torch.set_grad_enabled(graphs)  # the alarm may ring while `no_grad` is being entered, which then never ends


def judges(size: int, device: torch.device | str = "cpu") -> list[Extractor]:
    """The two feature sets for images of that size."""
    smaller = None if size == 32 else size
    return [features.extractor("cifar10_classifier", size=smaller, device=device),
            features.extractor("random_conv", device=device)]


def sample(model: Denoiser | Generator, n: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """n samples and their classes: 35 calls of a teacher, one of a student, from the same noise."""
    draw_from = evaluation.sample_student if isinstance(model, Generator) else evaluation.sample_teacher
    return draw_from(model, n, seed=seed, progress=False)


def tracker(images: Tensor, size: int, n: int, device: str) -> Callable[[Any], dict[str, float]]:
    """A function that gives a student's Frechet distance by n samples: too few for a result (it is biased upwards), and
    enough to see a course."""
    judge = judges(size, device)[0]
    real = judge(_some(images, TRACK_REFERENCE, 0))

    def follow(student: Any) -> dict[str, float]:
        return {"frechet": frechet_distance(judge(sample(student, n)[0]), real)}

    return follow


# ---------------------------------------------------------------------------------- measuring


def measure(
    models: Mapping[str, Denoiser | Generator], images: Tensor, held: Tensor | None, *, n: int, n_reference: int,
    seed: int = 0, device: str = "cpu", end: float = float("inf"),
) -> Measured:
    """Sample the models from the same noise and compare them with training images (m, 3, size, size).

    Args:
        models: by name; the first is the one that the others' distances are put in relation to.
        images: bytes; `n_reference` of them, drawn by the seed, are the reference.
        held: images that no model was trained on, if there are any: a row of their own, "real".
        n: samples of each model; fewer where the time until `end` (of `time.monotonic()`) does not suffice.
    """
    out = Measured()
    with until(min(end - 2, time.monotonic() + 10**6)):
        for count in (FIRST_SHOWN, SHOWN):  # a small grid of each first: something to look at, whatever comes later
            start = time.monotonic()
            for name, model in models.items():
                out.shown[name] = sample(model, count, seed)[0]
        each = (time.monotonic() - start) / SHOWN  # all models together
        n = min(n, int(0.4 * (end - time.monotonic()) / each)) if end < float("inf") else n
        if n < LEAST:
            return out
        drawn = {name: sample(model, n, seed) for name, model in models.items()}
        reference = _some(images, n_reference, seed)
        for judge in judges(images.shape[-1], device):
            _measure_by(judge, out, models, drawn, reference, None if held is None else _some(held, n, seed), seed)
        shown = best_student(out.rows) or next(iter(models))
        out.nearest = nearest(shown, drawn[shown][0][:20], reference, judges(images.shape[-1], device))
    return out


def _measure_by(
    judge: Extractor, out: Measured, models: Mapping[str, Any], drawn: dict[str, Any], reference: Tensor,
    held: Tensor | None, seed: int,
) -> None:
    """Rows of all models in one feature set; and how near their samples are to training images, in units of how near
    the held-out ones are."""
    real = judge(reference)
    options: dict[str, Any] = {"seed": seed, "progress": False}
    if held is not None:
        out.rows.append(evaluation.measure("real", held, real, judge, **options) | {"seed": seed})
        apart = _to_nearest(judge(held[:COPIES]), real)[0].median()
    first: float | None = None
    for name, (samples, labels) in drawn.items():
        row = evaluation.measure(name, samples, real, judge, label=labels, **options)
        first = row["frechet"] if first is None else first
        row |= {"calls": 1 if isinstance(models[name], Generator) else CALLS, "seed": seed}
        row["frechet_ratio"] = row["frechet"] / first if first > 0 else None
        out.rows.append(row)
        if held is not None:
            ratio = float(_to_nearest(judge(samples[:COPIES]), real)[0].median() / apart)
            out.copies.append({"model": name, "features": judge.name, "nearest_ratio": ratio,
                               "n": min(COPIES, len(samples)), "n_reference": len(real)})


def best_student(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The model of one call with the smallest Frechet distance in the first feature set; None if there is none."""
    judged = [row for row in rows if row.get("calls") == 1 and row["features"] == rows[0]["features"]]
    return min(judged, key=lambda row: row["frechet"])["model"] if judged else None


def nearest(name: str, samples: Tensor, reference: Tensor, by: list[Extractor]) -> Nearest:
    """The training images that lie nearest to samples (m, 3, h, w), one for each sample and feature set."""
    found = {}
    for judge in by:
        index = _to_nearest(judge(samples), judge(reference))[1]
        found[judge.name] = data.to_float(reference[index])
    return Nearest(name, samples, found)


def _to_nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of x (n, d) the distance to the nearest row of y, and which it is."""
    smallest = torch.cdist(x, y).min(1)
    return smallest.values, smallest.indices


def _some(images: Tensor, n: int, seed: int) -> Tensor:
    """At most n of the images, drawn at random: files may be sorted by class."""
    if len(images) <= n:
        return images
    return images[torch.randperm(len(images), generator=training.generator_on("cpu", seed))[:n]]


# ---------------------------------------------------------------------------------- pictures


def draw(found: Measured, images: Tensor, folder: Path, seen: Mapping[str, int]) -> None:
    """A grid for each model, `grid_NAME.png`, and what lies nearest to the samples of one, `nearest.png`."""
    plotting.use_theme()
    names = data.CIFAR10_CLASSES
    for name, samples in found.shown.items():
        calls = f"{CALLS} calls" if name == "teacher" or name.startswith("teacher_at") else "1 call"
        made = "images seen" if name.startswith("teacher") else "images made in training"
        title = f"{name.replace('_', ' ')}: {calls}, {seen.get(name, 0):,} {made}"
        ax = plotting.class_grid(samples.cpu(), names, title=title)
        plotting.save(ax.figure, folder / f"grid_{name}.png")  # type: ignore[arg-type]
    if best := best_student(found.rows):
        titles = {"teacher": f"teacher: {CALLS} network calls", best: f"student ({best.replace('_', ' ')}): one call"}
        figure = side_by_side({title: found.shown[name].cpu() for name, title in titles.items()})
        plotting.save(figure, folder / "teacher_and_student.png")
    if found.nearest is not None:
        plotting.save(picture_of(found.nearest).figure, folder / "nearest.png")


def side_by_side(grids: Mapping[str, Tensor], rows: int = 6) -> Figure:
    """Grids of samples (n, 3, h, w), classes in turn, each below its title; a column for each class, `rows` of each."""
    figure, axes = plt.subplots(1, len(grids), figsize=(6.1 * len(grids), 0.55 * rows + 0.9), layout="constrained")
    names = ["plane", "car", *data.CIFAR10_CLASSES[2:]]  # there is no room for the two long ones
    for ax, (title, samples) in zip(np.atleast_1d(axes), grids.items(), strict=True):
        plotting.class_grid(samples[: 10 * rows], names, ax, title=title)
        ax.set_title(title, fontsize=14)
    return figure


def picture_of(found: Nearest, ax: Any = None, count: int = 10) -> Any:
    """Rows of samples, each above its nearest training images in each of the feature sets."""
    rows = {f"{found.model.replace('_', ' ')}, 1 call" if found.model != "teacher" else "teacher": found.samples}
    rows |= {f"nearest by\n{name.split(' of ')[0].replace('_', ' ')}": x for name, x in found.found.items()}
    blocks = [x[k : k + count].cpu() for k in range(0, len(found.samples), count) for x in rows.values()]
    labels = [*rows] * (len(blocks) // len(rows))
    return plotting.labelled_rows(dict(enumerate(blocks)), ax, labels=labels, title="Does it copy?")
