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
    device: torch.device | str | None = None, label: Tensor | None = None, sigma_max: float = 80.0,
    solver: str = "heun", progress: bool = True,
) -> Samples:
    """n samples of a denoiser from sigma_max on `levels` noise levels, by Heun's method (Karras 2022, algorithm 1).

    Args:
        teacher: D(x, sigma, label) with a `shape`, and `n_classes` if it has classes.
        levels: noise levels; 2 * levels - 1 calls of the network with Heun.
        seed: of the noise, drawn on the CPU: neither the device nor the batch size matters (but for rounding).
        batch_size: samples a batch.
        device: where the model is, for it is not moved; default: where its parameters are, or the CPU without any.
        label: (n,) classes; default: 0, 1, 2, ... in turn if the teacher has classes.
        solver: another of `samplers.SOLVERS`, with calls of its own; the noise of a stochastic one is the seed's.
        progress: a tqdm bar over network calls.
    Returns:
        images (n, *shape) and labels (n,) or None, both on the CPU.
    Raises:
        ValueError: bad counts, an unknown solver, a label that does not fit the teacher.
    """
    _validate.whole("levels", levels)
    _validate.choose("solver", solver, samplers.SOLVERS)
    sigmas = samplers.karras_sigmas(levels, sigma_max=sigma_max)

    def solve(z: Tensor, label: Tensor | None, call: Callable[..., Tensor]) -> Tensor:
        rng = training.generator_on(z.device, seed)
        return samplers.sample(call, sigmas[0] * z, sigmas, solver, label=label, generator=rng)

    calls = 2 * levels - 1 if solver == "heun" else None  # None: a bar that counts without an end
    return _sample(teacher, solve, n, calls, "teacher", seed, batch_size, device, label, progress)


def sample_student(
    student: Model, n: int, *, seed: int = 0, batch_size: int = 500, device: torch.device | str | None = None,
    label: Tensor | None = None, progress: bool = True,
) -> Samples:
    """n samples G(z, label) of a one-step student, one network call each; all else as in `sample_teacher`, the noise
    too: with one seed, teacher and student start from the same z."""
    def solve(z: Tensor, label: Tensor | None, call: Callable[..., Tensor]) -> Tensor:
        return call(z, label)

    return _sample(student, solve, n, 1, "student", seed, batch_size, device, label, progress)


@torch.no_grad()
def _sample(
    model: Model, solve: Callable[..., Tensor], n: int, calls: int | None, name: str, seed: int,
    batch_size: int, device: torch.device | str | None, label: Tensor | None, progress: bool,
) -> Samples:
    _validate.whole("n", n)
    _validate.whole("batch_size", batch_size)
    label = _asked(model, n, label)
    place = _device(model) if device is None else torch.device(device)
    z = torch.randn(n, *_shape(model), generator=training.generator_on("cpu", seed))
    parts: list[Tensor] = []
    starts = range(0, n, batch_size)
    with tqdm(total=calls and calls * len(starts), disable=not progress, desc=f"sampling: {name}", unit="call",
              **training.bar_options) as bar:

        def call(*arguments: Any) -> Tensor:
            out = model(*arguments)
            bar.update()
            return out

        for start in starts:
            part = slice(start, start + batch_size)
            classes = None if label is None else label[part].to(place)
            parts.append(solve(z[part].to(place), classes, call).cpu())
    return torch.cat(parts), label


def _asked(model: Model, n: int, label: Tensor | None) -> Tensor | None:
    """The classes to draw, (n,) on the CPU, checked: those given, or all in turn."""
    n_classes = _n_classes(model)
    if label is None:
        return torch.arange(n) % n_classes if n_classes else None
    if not n_classes:
        raise ValueError("label: this model has no classes; wanted None")
    return _validate.labels("label", label, n, n_classes).cpu()


def _shape(model: Model) -> tuple[int, ...]:
    if not hasattr(model, "shape"):
        raise TypeError(f"{type(model).__name__} has no `shape`; wanted a model that says what one sample's is")
    return tuple(model.shape)


def _n_classes(model: Model) -> int:
    return int(getattr(model, "n_classes", 0))


def _device(model: Model) -> torch.device:
    """Where the model's weights are; the CPU for a callable without any."""
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return torch.device("cpu") if first is None else first.device


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
    n: int = 10_000, seed: int = 0, features: Extractor, levels: int = 18, sigma_max: float = 80.0,
    solver: str = "heun", batch_size: int = 500, device: torch.device | str | None = None, k: int = 3,
    progress: bool = True,
) -> Comparison:
    """The teacher, whose sampler takes 2 * levels - 1 network calls if it is Heun's, and its students at one, measured
    alike: same n, noise, classes, features and reference.

    Args:
        teacher: as in `sample_teacher`.
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
    _validate.whole("levels", levels)  # the Karras schedule would call it n
    _validate.choose("solver", solver, samplers.SOLVERS)
    _validate.whole("batch_size", batch_size)
    _validate.seed("seed", seed)
    samplers.karras_sigmas(levels, sigma_max=sigma_max)  # checks sigma_max
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "device": device, "progress": progress}
    real = features(reference, progress=progress)
    rows: list[dict[str, Any]] = []
    samples: dict[str, Tensor] = {}
    labels: Tensor | None = None
    for name in ("teacher", *named):
        model = _Counted(named.get(name, teacher))
        if name == "teacher":
            images, labels = sample_teacher(model, n, levels=levels, solver=solver, sigma_max=sigma_max, **options)
        else:
            images, labels = sample_student(model, n, **options)
        row = measure(name, images, real, features, label=labels, k=k, seed=seed, progress=progress)
        row |= {"calls": round(model.calls / -(-n // batch_size)), "seed": seed}
        best = rows[0]["frechet"] if rows else row["frechet"]
        row["frechet_ratio"] = row["frechet"] / best if best > 0 else None
        rows.append(row)
        samples[name] = images
    return Comparison(rows, samples, labels)


class _Counted:
    """A model that counts its calls, of which there are as many for each batch."""

    def __init__(self, model: Model) -> None:
        self.model, self.calls = model, 0

    def __call__(self, *arguments: Any) -> Tensor:
        self.calls += 1
        return self.model(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def _check(
    teacher: Model, students: Mapping[str, Model], reference: Tensor, features: Extractor, n: int, k: int
) -> None:
    """Raise ValueError unless everything that `compare` takes goes together."""
    _validate.whole("k", k)
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
        cells = (cell(row, "calls", "d"), cell(row, "frechet", ".4g"), ratio if ratio == "-" else f"{ratio} x",
                 cell(row, "precision", ".3f"), cell(row, "recall", ".3f"), cell(row, "recognised", ".1%"))
        lines.append(f"{row['model']:<{wide}} " + " ".join(f"{text:>11}" for text in cells))
    first = rows[0]
    seed = f", seed {first['seed']}" if "seed" in first else ""
    lines.append(f"n = {first['n']:,} against {first['n_reference']:,} real, features: {first['features']}{seed}")
    return "\n".join(lines)
