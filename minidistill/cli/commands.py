"""What each command does with its options: quickstart, train, distill, sample, evaluate, bench.

The options' names, defaults and help are in `cli.py`, which also tells errors in one line.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidistill import _validate, bench, data, metrics, plotting, samplers, teachers, training
from minidistill.distillation import OBJECTIVES, Diagnosis, Needs, distill
from minidistill.distributions import MIXTURES, SHAPES, GaussianMixture
from minidistill.metrics import evaluation, features
from minidistill.networks import Denoiser, Generator, unet
from minidistill.training import checkpoints, parallel

__all__ = [
    "DATA", "IMAGES", "N_TRAIN", "benchmark", "distil", "evaluate", "quickstart", "sample", "train",
]

N_TRAIN = 20_000  # samples drawn from a named 2-D target to train a teacher on
IMAGES = ("digits", "cifar10")
DATA = (*MIXTURES, *SHAPES, *IMAGES)


def quickstart(a: argparse.Namespace) -> None:
    from minidistill.studies.quickstart import quickstart as start  # it alone needs worker processes

    if a.steps is not None:
        _validate.whole("--steps", a.steps)
    start(a.out, only=a.only, steps=a.steps, seed=a.seed, device=a.device)


def train(a: argparse.Namespace) -> None:
    samples, labels = _dataset(a.data, a.seed, a.root, a.subset)
    cifar = a.data == "cifar10"
    network = None
    if a.preset or cifar:
        torch.manual_seed(a.seed)  # the network's first weights
        shape, n_classes = tuple(samples.shape[1:]), 0 if labels is None else int(labels.max()) + 1
        network = unet.preset(a.preset or "tiny", shape, n_classes)
    out = Path(a.out)
    model = _begin(a, "teacher.safetensors")
    steps = _steps(a)
    teacher = teachers.train_denoiser(
        samples, network, labels=labels, steps=steps, batch_size=a.batch_size, flip=cifar, accumulate=a.accumulate,
        learning_rate=a.learning_rate or (1e-3 if network else 2e-3), ema_halflife=a.ema_halflife, speed=_speed(a),
        seed=a.seed, device=a.device, log_every=a.log_every, checkpoint=out / "training.safetensors",
        checkpoint_every=a.checkpoint_every, resume=a.resume,
    )
    if parallel.rank() == 0:
        checkpoints.save_model(model, teacher, data=a.data, steps=steps, images=steps * a.batch_size, seed=a.seed)
        print(f"teacher in {model}")
        _close(out, steps)


def distil(a: argparse.Namespace) -> None:
    _validate.choose("--objective", a.objective, OBJECTIVES)
    teacher, name = _teacher(a.teacher)
    checksum = training.fingerprint(teacher)
    samples = labels = None
    if isinstance(teacher, GaussianMixture):
        teacher = teacher.to(torch.device(a.device))
    elif Needs.of(OBJECTIVES[a.objective]).data:
        samples, labels = _dataset(name, a.seed, a.root, a.subset)
    out = Path(a.out)
    model = _begin(a, "student.safetensors")
    images = len(teacher.shape) == 3
    rate, critic_rate, critic_steps = (3e-4, 1e-3, 2) if images else (None, 5e-3, None)
    critic_steps = Needs.of(OBJECTIVES[a.objective]).critic_steps or critic_steps  # some need many

    def draw_panel(seen: Diagnosis) -> None:
        try:
            plotting.save(plotting.panel(seen).figure, out / "panel.png")  # type: ignore[arg-type]
        except OSError as error:  # a picture is not worth a run
            warnings.warn(f"{out / 'panel.png'} could not be written ({error})", stacklevel=2)

    steps = _steps(a)
    plotting.use_theme()
    student = distill(
        teacher, objective=a.objective, steps=steps, data=samples, labels=labels, batch_size=a.batch_size,
        critic_steps=a.critic_steps or critic_steps, learning_rate=a.learning_rate or rate,
        critic_learning_rate=a.critic_learning_rate or critic_rate, sigma_init=a.sigma_init, sigma_max=a.sigma_max,
        flip=name == "cifar10", accumulate=a.accumulate, ema_halflife=a.ema_halflife, speed=_speed(a), seed=a.seed,
        device=a.device, inspect=draw_panel if images else None, log_every=a.log_every,
        checkpoint=out / "training.safetensors", checkpoint_every=a.checkpoint_every, resume=a.resume,
    )
    if parallel.rank() == 0:
        checkpoints.save_model(
            model, student.ema, data=name, objective=a.objective, steps=steps, images=steps * a.batch_size, seed=a.seed,
            teacher=str(Path(a.teacher).resolve()) if Path(a.teacher).exists() else a.teacher,
            teacher_checksum=checksum,
        )
        print(f"student in {model}")
        _close(out, steps)


def _begin(a: argparse.Namespace, name: str) -> Path:
    """The file in --out that the model will have. ValueError if an earlier run is there and nothing was said of it."""
    model, state = Path(a.out) / name, Path(a.out) / "training.safetensors"
    there = [path.name for path in (model, state) if path.exists()]
    goes_on = a.resume and (state.exists() or not there)
    if there and not a.force and not goes_on:
        what = "a finished run" if model.exists() else "a run that is not finished"
        wanted = "--force to replace it" if a.resume else "--resume to go on with it, --force to replace it"
        raise ValueError(f"--out {a.out} holds {what} ({', '.join(there)}); wanted {wanted}, or another folder")
    if a.resume and not there and parallel.rank() == 0:
        print(f"minidistill: --resume: no {state.name} in {a.out}; a new run begins", file=sys.stderr)
    return checkpoints.writable(model)


def _close(out: Path, steps: int) -> None:
    """Write history.json; then, the model being safe, say what went wrong: an error."""
    state = out / "training.safetensors"
    progress = training.progress_of(state)
    with checkpoints.atomic(out / "history.json") as path:
        path.write_text(json.dumps(progress["history"]) + "\n")
    if progress["step"] < steps:
        raise OSError(f"{state} is of step {progress['step']} of {steps}: it could not be written at the end")
    if problem := training.mostly_skipped(progress["step"], progress["skipped"]):
        raise FloatingPointError(problem)


def _steps(a: argparse.Namespace) -> int:
    """--steps, or as many as --images need."""
    _validate.whole("--batch-size", a.batch_size)
    if a.images is None:
        return a.steps
    _validate.whole("--images", a.images)
    return -(-a.images // a.batch_size)


def _speed(a: argparse.Namespace) -> training.Speed:
    return training.Speed(a.precision, channels_last=a.device.startswith("cuda"), compile=a.compile)


def sample(a: argparse.Namespace) -> None:
    _validate.whole("--n", a.n)
    _validate.whole("--levels", a.levels)
    _validate.choose("--solver", a.solver, samplers.SOLVERS)
    model, _ = _teacher(a.model)
    out = checkpoints.writable(a.out)
    if out.suffix not in (".png", ".safetensors"):
        raise ValueError(f"--out {out}: wanted a name that ends in .png or .safetensors")
    samples, _ = _draw(model, a)
    if out.suffix == ".safetensors":
        checkpoints.write(out, {"samples": samples}, {"kind": "samples"})
    else:
        plotting.use_theme()
        if samples.ndim == 4:
            ax = plotting.image_grid(samples[:100])
        else:
            ax = plotting.scatter(samples, target=model if isinstance(model, GaussianMixture) else None)
        plotting.save(ax.figure, out)  # type: ignore[arg-type]
    print(f"{len(samples)} samples in {out}")


def evaluate(a: argparse.Namespace) -> None:
    _validate.whole("--n", a.n, least=2)
    model, name = _teacher(a.model)
    name = a.target or name
    if name not in (*MIXTURES, *IMAGES):
        raise ValueError(_validate.closest("--target", name, (*MIXTURES, *IMAGES)))
    if a.out:
        checkpoints.writable(a.out)
    row: dict[str, Any] = {"model": a.model, "target": name, "n": a.n, "seed": a.seed}
    if name in IMAGES:
        result = _compare(model, name, a)
        row["rows"] = result.rows
        if a.out:
            _save_grids(result, Path(a.out).with_suffix(".png"))
    else:
        samples, _ = _draw(model, a)
        mixture = MIXTURES[name]()
        kl, coverage = metrics.kl_both_ways(mixture, samples), metrics.mode_coverage(mixture, samples)
        row |= {"kl": kl.kl, "reverse_kl": kl.reverse_kl, "outside_grid": kl.outside, "smoothing_sigma": kl.sigma,
                "modes": f"{coverage.covered}/{coverage.total}", "worst_mode_error": coverage.worst}
    if a.out:
        with checkpoints.atomic(a.out) as path:
            path.write_text(json.dumps(row) + "\n")
    if a.json:
        print(json.dumps(row))
    elif name in IMAGES:
        print(evaluation.table(row["rows"]))
    else:
        for key, value in row.items():
            print(f"{key:<20} {value:.4g}" if isinstance(value, float) else f"{key:<20} {value}")


def _compare(model: Any, name: str, a: argparse.Namespace) -> evaluation.Comparison:
    """A teacher alone, or a student beside its teacher, against real images."""
    images, _ = _dataset(name, a.seed, a.root, None)
    _validate.samples("the model's samples", torch.zeros(1, *model.shape), tuple(images.shape[1:]))
    if isinstance(model, Generator):
        info = checkpoints.load_model(a.model)[1]
        recorded = str(info.get("teacher", ""))
        if not a.teacher and not checkpoints.exists(recorded):
            raise ValueError(f"--teacher: wanted the teacher's file, to measure both in one run (not {recorded!r})")
        teacher, students = _teacher(a.teacher or recorded)[0], {"student": model}
        if info.get("teacher_checksum", now := training.fingerprint(teacher)) != now:
            print(f"minidistill: {a.teacher or recorded} is not the teacher that {a.model} was distilled from: their "
                  f"checksums are {now} and {info['teacher_checksum']}", file=sys.stderr)
    else:
        teacher, students = model, {}
    judge = features.extractor(a.features or f"{name}_classifier", device=a.device)
    for each in (teacher, *students.values()):
        each.to(a.device)
    return evaluation.compare(teacher, students, images, n=a.n, seed=a.seed, levels=a.levels, features=judge)


def _save_grids(result: evaluation.Comparison, path: Path) -> None:
    plotting.use_theme()
    figure, axes = plotting.plt.subplots(1, len(result.samples), figsize=(4.5 * len(result.samples), 4.8),
                                         layout="constrained", squeeze=False)
    for ax, row in zip(axes[0], result.rows, strict=True):
        calls = f"{row['calls']} call{'s' if row['calls'] > 1 else ''}"
        title = f"{row['model']}, {calls}\nFréchet distance {row['frechet']:.3g}"
        plotting.image_grid(result.samples[row["model"]][:100].cpu(), ax, title=title)
    plotting.save(figure, path)


def benchmark(a: argparse.Namespace) -> None:
    _validate.choose("NAME", a.name, bench.BENCHES)
    rows = bench.run(a.name, short=a.short)
    print(json.dumps(rows) if a.json else bench.table(rows))


def _draw(model: GaussianMixture | Denoiser | Generator, a: argparse.Namespace) -> tuple[Tensor, Tensor | None]:
    """a.n samples and the classes asked for: one call of a generator, a solver's run of a denoiser."""
    if isinstance(model, GaussianMixture):
        return model.sample(a.n, training.generator_on("cpu", a.seed)), None
    model = model.to(a.device)
    if isinstance(model, Generator):
        return evaluation.sample_student(model, a.n, seed=a.seed)
    return evaluation.sample_teacher(model, a.n, seed=a.seed, levels=a.levels, solver=a.solver)


def _dataset(name: str, seed: int, root: str | None, subset: int | None) -> tuple[Tensor, Tensor | None]:
    if name == "digits":
        return data.digits()
    if name == "cifar10":
        return data.cifar10(root, "train", n=subset)
    rng = training.generator_on("cpu", seed)
    if name in MIXTURES:
        return MIXTURES[name]().sample(N_TRAIN, rng), None
    if name in SHAPES:
        return SHAPES[name](N_TRAIN, rng), None
    raise ValueError(_validate.closest("data", name, DATA))


def _teacher(name: str) -> tuple[Any, str]:
    """A named mixture, or a saved model and the name of the data it was trained on."""
    if name in MIXTURES:
        return MIXTURES[name](), name
    if not Path(name).exists() and not name.endswith(".safetensors"):
        raise ValueError(_validate.closest("model", name, MIXTURES) + ", or a .safetensors file")
    model, info = checkpoints.load_model(name)
    return model, str(info.get("data", ""))
