"""How good are the teacher and its one-step students? Samples of all, measured against real images in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from minidistill import _validate, data, samplers, training
from minidistill.metrics.features import Extractor
from minidistill.metrics.fidelity import frechet_distance, precision_recall
from minidistill.networks import calls_of, device_of, draw

__all__ = [
    "MANIFOLD_N", "Comparison", "Model", "Samples", "compare", "measure", "sample_student", "sample_teacher", "table",
]

MANIFOLD_N = 10_000  # precision and recall compare every pair, so at most this many of each
Model = Callable[..., Tensor]  # with a `shape`, and `n_classes` if it has classes
Samples = tuple[Tensor, "Tensor | None"]  # images (n, *shape), labels (n,)


@dataclass
class Comparison:
    """`rows`, one for each model in the order given, the teacher first; the images that each made by its name; and
    the classes asked for, the same for all (None without classes)."""

    rows: list[dict[str, Any]]
    samples: dict[str, Tensor]
    labels: Tensor | None

    def __str__(self) -> str:
        return table(self.rows)


def sample_teacher(
    teacher: Model, n: int, *, levels: int = 18, seed: int = 0, batch_size: int = 500,
    device: torch.device | str | None = None, label: Tensor | None = None, sigma_min: float | None = None,
    sigma_max: float | None = None, solver: str = "heun", progress: bool = True, report: samplers.Report | None = None,
) -> Samples:
    """n samples of a denoiser from sigma_max on `levels` noise levels, by Heun's method (Karras 2022, algorithm 1).

    Args:
        teacher: D(x, sigma, label) with a `shape`, and `n_classes` if it has classes.
        levels: noise levels; 2 * levels - 1 calls of the network with Heun.
        seed: of all noise, drawn on the CPU: the device does not matter, nor (but for rounding) the batch size, except
            that the batches of a stochastic solver draw their noise one after the other.
        batch_size: samples a batch.
        device: where the model is, for it is not moved; default: where its parameters are, or the CPU without any.
        label: (n,) classes; default: 0, 1, 2, ... in turn if the teacher has classes.
        sigma_min, sigma_max: the ends of Karras's levels; None for 0.004 and 160 of the teacher's `sigma_data`, which
            are EDM's 0.002 and 80 for data of 0.5 (and for a teacher that does not tell its scale).
        solver: another of `samplers.SOLVERS`, with calls of its own.
        progress: a tqdm bar over network calls.
        report: filled in with the network calls per sample, and the levels.
    Returns:
        images (n, *shape) and labels (n,) or None, both on the CPU.
    Raises:
        ValueError: bad counts, an unknown solver, a label that does not fit the teacher. TypeError: no `shape`.
        FloatingPointError: samples that are not finite.
    """
    levels = _validate.whole("levels", levels)
    _validate.choose("solver", solver, samplers.SOLVERS)
    sigmas = samplers.levels_of(teacher, levels, sigma_min, sigma_max)
    n, batch_size, label, place = _asked(teacher, n, batch_size, label, device)
    report, seed = samplers.Report() if report is None else report, _validate.whole("seed", seed, least=0)
    rng = training.generator_on("cpu", seed)  # the one generator of the call: the first noise, and then a chain's
    z = torch.randn(n, *_shape(teacher), generator=rng)
    calls = -(-n // batch_size) * (2 * levels - 1) if solver == "heun" else None  # None: a bar without an end
    parts, evaluated = [], 0.0
    with _bar(calls, "teacher", progress) as bar:
        counted = _counted(teacher, bar)
        for start in range(0, n, batch_size):
            part = slice(start, start + batch_size)
            mine = None if label is None else label[part].to(place)
            x = sigmas[0] * z[part].to(place)
            part_report = samplers.Report()
            parts.append(samplers.sample(counted, x, sigmas, solver, label=mine, generator=rng,
                                         report=part_report).cpu())
            evaluated += part_report.calls * len(x)
    report.calls, report.levels = evaluated / n, part_report.levels
    return torch.cat(parts), label


def sample_student(
    student: Model, n: int, *, seed: int = 0, batch_size: int = 500, device: torch.device | str | None = None,
    label: Tensor | None = None, steps: int | None = None, gamma: float | None = None, progress: bool = True,
    report: samplers.Report | None = None,
) -> Samples:
    """n samples G(z, label) of a student, as `networks.draw` makes them: in one network call, or in as many as it has
    levels, at most `steps`; one of a trajectory objective in any number, with `gamma` as there. All else as in
    `sample_teacher`, the first noise too: with one seed, teacher and student start from the same z."""
    n, batch_size, label, place = _asked(student, n, batch_size, label, device)
    calls = calls_of(student, steps)
    _shape(student)
    with _bar(-(-n // batch_size) * calls, "student", progress) as bar:
        images = draw(student, n, label=label, seed=seed, steps=steps, gamma=gamma, batch_size=batch_size, device=place,
                      after_call=bar.update).cpu()
    if not bool(images.isfinite().all()):
        raise FloatingPointError("the student's samples are not finite")
    if report is not None:
        report.calls, report.levels = float(calls), []
    return images, label


def _asked(
    model: Model, n: int, batch_size: int, label: Tensor | None, device: torch.device | str | None
) -> tuple[int, int, Tensor | None, torch.device]:
    """Counts, classes to draw, (n,) on the CPU (those given, or all in turn), and the place, checked."""
    n, batch_size = _validate.whole("n", n), _validate.whole("batch_size", batch_size)
    place = device_of(model) if device is None else _validate.device("device", device)
    n_classes = _n_classes(model)
    if label is None:
        label = torch.arange(n) % n_classes if n_classes else None
    elif not n_classes:
        raise ValueError("label: this model has no classes; wanted None")
    else:
        label = _validate.labels("label", label, n, n_classes).cpu()
    return n, batch_size, label, place


def _bar(calls: int | None, name: str, progress: bool) -> Any:
    return tqdm(total=calls, disable=not progress, desc=f"sampling: {name}", unit="call", **training.bar_options)


def _counted(model: Model, bar: Any) -> Model:
    """The model, moving the bar on at each call; it tells its scale as before."""
    def call(*arguments: Any) -> Tensor:
        out = model(*arguments)
        bar.update()
        return out

    call.sigma_data = getattr(model, "sigma_data", None)  # type: ignore[attr-defined]
    return call


def _shape(model: Model) -> tuple[int, ...]:
    if not hasattr(model, "shape"):
        raise TypeError(f"{type(model).__name__} has no `shape`; wanted a model that says what one sample's is")
    return tuple(model.shape)


def _n_classes(model: Model) -> int:
    return int(getattr(model, "n_classes", 0))


def measure(
    name: str, images: Tensor, reference: Tensor, features: Extractor, *, label: Tensor | None = None, k: int = 3,
    seed: int = 0, progress: bool = True,
) -> dict[str, Any]:
    """The quality of samples against the features (m, dim) of reference images, as one row of a table.

    Keys: model, n, features (the extractor's name), n_reference, frechet (in the features' squared units), precision
    and recall (with k neighbours, on at most 10,000 of each, drawn by the seed), and recognised: the share of images
    that the extractor's classifier takes for their label (n,), None without labels or classifier. Floating point
    samples with NaNs, and fewer than k + 1 samples, raise ValueError.
    """
    if images.is_floating_point():
        _validate.finite(f"{name}'s samples", images)
    x = features(images, progress=progress)
    rng = training.generator_on("cpu", seed)
    found = precision_recall(_some(x, rng), _some(reference, rng), k)
    return {
        "model": name, "n": len(x), "features": features.name, "n_reference": len(reference),
        "frechet": frechet_distance(x, reference),
        "precision": found.precision, "recall": found.recall, "k": k,
        "recognised": None if label is None else features.recognised(images, label),
    }


def _some(x: Tensor, rng: torch.Generator) -> Tensor:
    """At most MANIFOLD_N rows, drawn at random: images may be sorted by class."""
    return x if len(x) <= MANIFOLD_N else x[torch.randperm(len(x), generator=rng)[:MANIFOLD_N]]


def compare(
    teacher: Model, students: Model | Mapping[str, Model], reference: Tensor, *,
    n: int = 10_000, seed: int = 0, features: Extractor, levels: int = 18, sigma_min: float | None = None,
    sigma_max: float | None = None, solver: str = "heun", batch_size: int = 500,
    device: torch.device | str | None = None, k: int = 3, progress: bool = True,
) -> Comparison:
    """The teacher by a solver on its levels and its students at their own few network calls, measured alike: same n,
    noise, classes, features and reference.

    Args:
        teacher, levels, sigma_min, sigma_max, solver: as in `sample_teacher`.
        students: one, or several by name; {} for the teacher alone.
        reference: real images (m, *shape), uint8 or floats in [-1, 1]; the Frechet distance uses all of them.
        n: samples of each model. The Frechet distance is biased upwards for few, so compare at equal n only.
        seed: of the noise, and of the subsets for precision and recall.
        features: what to compare by, from `features.extractor`.
        levels, solver: of the teacher's sampler, as in `sample_teacher`.
        device: where the models are, as in `sample_teacher`.
        k: neighbours of precision and recall.
    Returns:
        a `Comparison`; a row has the keys of `measure` with calls, seed and frechet_ratio (to the teacher's).
    Raises:
        ValueError: before any work, for bad counts or for models, images and features that do not go together;
            later for a model whose samples are not finite.
    """
    named = dict(students) if isinstance(students, Mapping) else {"student": students}
    _check(teacher, named, reference, features, n, k)
    levels = _validate.whole("levels", levels)  # the Karras schedule would call it n
    batch_size, seed = _validate.whole("batch_size", batch_size), _validate.seed("seed", seed)
    _validate.choose("solver", solver, samplers.SOLVERS)
    samplers.levels_of(teacher, levels, sigma_min, sigma_max)  # checks their ends
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "device": device, "progress": progress}
    real = features(reference, progress=progress)
    rows: list[dict[str, Any]] = []
    samples: dict[str, Tensor] = {}
    labels: Tensor | None = None
    for name in ("teacher", *named):
        report = samplers.Report()
        if name == "teacher":
            images, labels = sample_teacher(teacher, n, levels=levels, sigma_min=sigma_min, sigma_max=sigma_max,
                                            solver=solver, report=report, **options)
        else:
            images, labels = sample_student(named[name], n, report=report, **options)
        row = measure(name, images, real, features, label=labels, k=k, seed=seed, progress=progress)
        calls = int(report.calls) if report.calls == int(report.calls) else round(report.calls, 1)
        row |= {"calls": calls, "seed": seed} | ({"solver": solver} if name == "teacher" and solver != "heun" else {})
        best = rows[0]["frechet"] if rows else row["frechet"]
        row["frechet_ratio"] = row["frechet"] / best if best > 0 else None
        rows.append(row)
        samples[name] = images
    return Comparison(rows, samples, labels)


def _check(
    teacher: Model, students: Mapping[str, Model], reference: Tensor, features: Extractor, n: int, k: int
) -> None:
    """Raise ValueError unless everything that `compare` takes goes together."""
    k = _validate.whole("k", k)
    _validate.whole("n", n, least=max(2, k + 1))
    if "teacher" in students:
        raise ValueError("students: the name 'teacher' is taken; wanted another")
    shape, n_classes = _shape(teacher), _n_classes(teacher)
    for name, student in students.items():
        if (_shape(student), _n_classes(student)) != (shape, n_classes):
            raise ValueError(f"{name} makes samples {_shape(student)} of {_n_classes(student)} classes; "
                             f"wanted the teacher's {shape} of {n_classes}")
    features.check_shape("teacher", shape)
    if reference.dtype == torch.uint8:
        reference = data.to_float(reference[:1]).expand(len(reference), *reference.shape[1:])
    _validate.samples("reference", reference, shape, least=k + 1)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of `compare` or `measure` as text, a line each, with what they were measured on below."""
    def cell(row: dict[str, Any], key: str, form: str) -> str:
        return "-" if row.get(key) is None else format(row[key], form)

    if not rows:
        return "no rows"
    wide = max(7, *(len(row["model"]) for row in rows))
    head = ("calls", "Frechet", "to teacher", "precision", "recall", "recognised")
    lines = [f"{'':<{wide}} " + " ".join(f"{title:>11}" for title in head)]
    for row in rows:
        ratio = cell(row, "frechet_ratio", ".2f")
        cells = (cell(row, "calls", "g"), cell(row, "frechet", ".4g"), ratio if ratio == "-" else f"{ratio} x",
                 cell(row, "precision", ".3f"), cell(row, "recall", ".3f"), cell(row, "recognised", ".1%"))
        lines.append(f"{row['model']:<{wide}} " + " ".join(f"{text:>11}" for text in cells))
    first = rows[0]
    seed = f", seed {first['seed']}" if "seed" in first else ""
    lines.append(f"n = {first['n']:,} against {first['n_reference']:,} real, features: {first['features']}{seed}")
    return "\n".join(lines)
