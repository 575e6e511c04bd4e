"""What each command does with its options: quickstart, train, distill, sample, evaluate, bench.

The options' names, defaults and help are in `program.py`, which also tells errors in one line. An option that would
change nothing is refused: whoever gave it expects something of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from minidistill import _validate, bench, data, metrics, plotting, samplers, teachers, training
from minidistill.distillation import OBJECTIVES, Diagnosis, Needs, distill
from minidistill.distributions import MIXTURES, SHAPES, GaussianMixture
from minidistill.metrics import evaluation, features
from minidistill.networks import Denoiser, Generator, unet
from minidistill.training import checkpoints, parallel

__all__ = [
    "DATA", "IMAGES", "LEVELS", "N_TRAIN", "SOLVER", "benchmark", "distil", "evaluate", "quickstart", "sample", "train",
]

T = TypeVar("T")
N_TRAIN = 20_000  # samples drawn from a named 2-D target to train a teacher on
IMAGES = ("digits", "cifar10")
DATA = (*MIXTURES, *SHAPES, *IMAGES)
LEVELS, SOLVER = 18, "heun"  # of a teacher's sampler
SHOWN = 100  # images in one picture


def quickstart(a: argparse.Namespace) -> None:
    from minidistill.studies.quickstart import quickstart as start  # it alone needs worker processes

    if a.steps is not None:
        _validate.whole("--steps", a.steps)
    start(a.out, only=a.only, steps=a.steps, seed=a.seed, device=a.device)


def train(a: argparse.Namespace) -> None:
    name, cifar, own = _place(a.data), a.data == "cifar10", a.data not in DATA
    if not (cifar or own):
        _refuse(a, ("size",), f"only for cifar10 and your own images, not for {name}")
    samples, labels = _dataset("--data", name, a, a.size)
    network = None
    if a.preset or cifar or own:
        torch.manual_seed(a.seed)  # the network's first weights
        shape, n_classes = tuple(samples.shape[1:]), 0 if labels is None else int(labels.max()) + 1
        try:
            network = unet.preset(_or(a.preset, "tiny"), shape, n_classes)
        except ValueError as error:
            raise ValueError(f"{error}{'; --size N makes images N x N' if own else ''}") from error
    out = Path(a.out)
    model = _begin(a, "teacher.safetensors")
    steps = _steps(a)
    teacher = teachers.train_denoiser(
        samples, network, labels=labels, steps=steps, batch_size=a.batch_size, flip=cifar, accumulate=a.accumulate,
        learning_rate=_or(a.learning_rate, 1e-3 if network else 2e-3), ema_halflife=a.ema_halflife, speed=_speed(a),
        seed=a.seed, device=a.device, log_every=a.log_every, checkpoint=out / "training.safetensors",
        checkpoint_every=a.checkpoint_every, resume=a.resume,
    )
    if parallel.rank() == 0:
        checkpoints.save_model(model, teacher, data=name, steps=steps, images=steps * a.batch_size, seed=a.seed,
                               **_size(a.size))
        print(f"teacher in {model}")
        _close(out, steps)


def distil(a: argparse.Namespace) -> None:
    _validate.choose("--objective", a.objective, OBJECTIVES)
    teacher, info = _teacher("--teacher", a.teacher)
    name, size, checksum = _place(_or(a.data, info["data"])), info.get("size"), training.fingerprint(teacher)
    samples = labels = None
    if isinstance(teacher, GaussianMixture):
        _refuse(a, ("data", "root", "subset"), f"real samples come from {a.teacher} itself")
        teacher = teacher.to(torch.device(a.device))
    elif Needs.of(OBJECTIVES[a.objective]).data:
        samples, labels = _dataset("--data", name, a, size)
    else:
        _refuse(a, ("data", "root", "subset"), f"{a.objective} looks at no real samples")
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
        critic_steps=_or(a.critic_steps, critic_steps), learning_rate=_or(a.learning_rate, rate),
        critic_learning_rate=_or(a.critic_learning_rate, critic_rate), sigma_init=a.sigma_init, sigma_max=a.sigma_max,
        flip=name == "cifar10", accumulate=a.accumulate, ema_halflife=a.ema_halflife, speed=_speed(a), seed=a.seed,
        device=a.device, inspect=draw_panel if images else None, log_every=a.log_every,
        checkpoint=out / "training.safetensors", checkpoint_every=a.checkpoint_every, resume=a.resume,
    )
    if parallel.rank() == 0:
        checkpoints.save_model(
            model, student.ema, data=name, objective=a.objective, steps=steps, images=steps * a.batch_size, seed=a.seed,
            teacher=str(Path(a.teacher).resolve()) if Path(a.teacher).exists() else a.teacher,
            teacher_checksum=checksum, **_size(size),
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
    model, _ = _model(a.model)
    _check_sampler(model, a)
    out = checkpoints.writable(a.out)
    if out.suffix not in (".png", ".safetensors"):
        raise ValueError(f"--out {out}: wanted a name that ends in .png or .safetensors")
    samples, _ = _draw(model, a)
    shown = samples[:SHOWN] if samples.ndim == 4 and out.suffix == ".png" else samples
    if out.suffix == ".safetensors":
        checkpoints.write(out, {"samples": samples}, {"kind": "samples"})
    else:
        plotting.use_theme()
        if samples.ndim == 4:
            ax = plotting.image_grid(shown)
        else:
            target = model if isinstance(model, GaussianMixture) else None
            ax = plotting.scatter(samples, target=target, n=len(samples))
        plotting.save(ax.figure, out)  # type: ignore[arg-type]
    which = f"the first {len(shown)} of " if len(shown) < len(samples) else ""
    print(f"{which}{len(samples)} samples in {out}")


def evaluate(a: argparse.Namespace) -> None:
    _validate.whole("--n", a.n, least=2)
    model, info = _model(a.model)
    name = _or(a.target, info["data"])
    if name in SHAPES:
        raise ValueError(_validate.closest("--target", name, (*MIXTURES, *IMAGES)))
    student = isinstance(model, Generator)
    if name in MIXTURES:
        _refuse(a, ("features", "teacher", "root"), f"{name} is no set of images")
        _validate.samples("the model's samples", torch.zeros(1, *model.shape), MIXTURES[name]().shape)
        _check_sampler(model, a)
    elif not student:
        _refuse(a, ("teacher",), f"{a.model} is no student")
    if a.out:
        checkpoints.writable(a.out)
    row: dict[str, Any] = {"model": a.model, "target": name, "n": a.n, "seed": a.seed}
    if name not in MIXTURES:
        result = _compare(model, name, info, a)
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
    elif name not in MIXTURES:
        print(evaluation.table(row["rows"]))
    else:
        for key, value in row.items():
            print(f"{key:<20} {value:.4g}" if isinstance(value, float) else f"{key:<20} {value}")


def _compare(model: Any, name: str, info: dict[str, Any], a: argparse.Namespace) -> evaluation.Comparison:
    """A teacher alone, or a student beside its teacher, against real images."""
    images, _ = _dataset("--target", name, a, info.get("size"))
    _validate.samples("the model's samples", torch.zeros(1, *model.shape), tuple(images.shape[1:]))
    if isinstance(model, Generator):
        recorded = str(info.get("teacher", ""))
        if not a.teacher and not checkpoints.exists(recorded):
            raise ValueError(f"--teacher: wanted the teacher's file, to measure both in one run (not {recorded!r})")
        place = _or(a.teacher, recorded)
        teacher, students = _teacher("--teacher", place)[0], {"student": model}
        if info.get("teacher_checksum", now := training.fingerprint(teacher)) != now:
            print(f"minidistill: {place} is not the teacher that {a.model} was distilled from: their checksums are "
                  f"{now} and {info['teacher_checksum']}", file=sys.stderr)
    else:
        teacher, students = model, {}
    _check_sampler(teacher, a)
    judge = _judge(name, tuple(images.shape[1:]), a)
    for each in (teacher, *students.values()):
        each.to(a.device)
    return evaluation.compare(teacher, students, images, n=a.n, seed=a.seed, levels=_or(a.levels, LEVELS),
                              solver=_or(a.solver, SOLVER), features=judge)


def _judge(name: str, shape: tuple[int, ...], a: argparse.Namespace) -> features.Extractor:
    """What looks at the images: what was asked for, the data's own classifier, or for images of other kinds and sizes
    the CIFAR-10 classifier, which is shown them at 32x32 pixels and whose ten classes then say nothing."""
    own = f"{name}_classifier" if (name, *shape) in (("digits", 1, 8, 8), ("cifar10", 3, 32, 32)) else None
    if (asked := _or(a.features, own)) is not None:
        return features.extractor(asked, device=a.device)

    def scaled(images: Tensor) -> Tensor:
        images = images.clamp(-1, 1).expand(-1, 3, -1, -1)
        return interpolate(images, (32, 32), mode="bilinear", align_corners=False, antialias=True)

    judge = features.extractor("cifar10_classifier", device=a.device)
    return replace(judge, name="cifar10_classifier at 32x32", shape=shape, prepare=scaled, judge=None)


def _save_grids(result: evaluation.Comparison, path: Path) -> None:
    plotting.use_theme()
    figure, axes = plotting.plt.subplots(1, len(result.samples), figsize=(4.5 * len(result.samples), 4.8),
                                         layout="constrained", squeeze=False)
    for ax, row in zip(axes[0], result.rows, strict=True):
        calls = f"{row['calls']} call{'s' if row['calls'] > 1 else ''}"
        title = f"{row['model']}, {calls}\nFréchet distance {row['frechet']:.3g}"
        plotting.image_grid(result.samples[row["model"]][:SHOWN].cpu(), ax, title=title)
    plotting.save(figure, path)


def benchmark(a: argparse.Namespace) -> None:
    _validate.choose("NAME", a.name, bench.BENCHES)
    if a.seed:
        raise ValueError(f"--seed {a.seed}: a bench times the same work in every run; wanted 0")
    if a.out is not None:
        checkpoints.writable(a.out)
    rows = bench.run(a.name, short=a.short, **({} if a.device == "cpu" else {"device": a.device}))
    if a.out is not None:
        with checkpoints.atomic(a.out) as path:
            path.write_text(json.dumps(rows) + "\n")
    print(json.dumps(rows) if a.json else bench.table(rows))


def _check_sampler(model: GaussianMixture | Denoiser | Generator, a: argparse.Namespace) -> None:
    """ValueError for a solver or levels that are none, or that a student has no use for."""
    if isinstance(model, Generator):
        _refuse(a, ("solver", "levels"), f"{a.model} is a student, which is called without a solver")
    elif hasattr(a, "steps"):
        _refuse(a, ("steps", "gamma"), f"{a.model} is no student; --levels says how many of its solver's there are")
    if a.levels is not None:
        _validate.whole("--levels", a.levels)
    if a.solver is not None:
        _validate.choose("--solver", a.solver, samplers.SOLVERS)


def _draw(model: GaussianMixture | Denoiser | Generator, a: argparse.Namespace) -> tuple[Tensor, Tensor | None]:
    """a.n samples and the classes asked for: one call of a generator, a solver's run of a denoiser; of a mixture exact
    ones, unless a solver is asked for."""
    device = torch.device(a.device)
    model = model.to(device)
    if isinstance(model, GaussianMixture) and a.solver is None and a.levels is None:
        return model.sample(a.n, training.generator_on("cpu", a.seed)).cpu(), None
    if isinstance(model, Generator):
        more = {"steps": a.steps, "gamma": a.gamma} if hasattr(a, "steps") else {}  # `evaluate` has neither
        return evaluation.sample_student(model, a.n, seed=a.seed, device=device, **more)
    levels, solver = _or(a.levels, LEVELS), _or(a.solver, SOLVER)
    return evaluation.sample_teacher(model, a.n, seed=a.seed, levels=levels, solver=solver, device=device)


def _place(name: str) -> str:
    """A data set's name, or where it is from wherever one looks."""
    return str(Path(name).resolve()) if name and name not in DATA and Path(name).exists() else name


def _size(size: int | None) -> dict[str, Any]:
    """What a model's file says of the size that images were brought to: nothing if they were not."""
    return {} if size is None else {"size": size}


def _dataset(option: str, name: str, a: argparse.Namespace, size: int | None) -> tuple[Tensor, Tensor | None]:
    """Samples and classes of a data set by its name or place, CIFAR-10 and your own images brought to `size`; `option`
    is where another can be named."""
    if not name:
        raise ValueError(f"{option}: the model's file does not say what it was trained on; wanted a data set")
    if name != "cifar10":
        _refuse(a, ("root", "subset"), f"only for cifar10, not for {name}")
    if name == "digits":
        return data.digits()
    if name == "cifar10":
        return data.cifar10(a.root, "train", n=getattr(a, "subset", None), size=_or(size, 32))
    rng = training.generator_on("cpu", a.seed)
    if name in MIXTURES:
        return MIXTURES[name]().sample(N_TRAIN, rng), None
    if name in SHAPES:
        return SHAPES[name](N_TRAIN, rng), None
    if Path(name).exists():
        return data.images(name, size)
    if Path(name).is_absolute():
        raise FileNotFoundError(f"{name} is not there (any more); wanted {option} FOLDER, where the images are now")
    raise ValueError(_validate.closest(option, name, DATA) + ", or a folder of images, or an .npz file of them")


def _model(name: str) -> tuple[Any, dict[str, Any]]:
    """A named mixture, or a saved model, and what is known of it: "data", what it was trained on, and more."""
    if name in MIXTURES:
        return MIXTURES[name](), {"data": name}
    if not Path(name).exists() and not name.endswith(".safetensors"):
        raise ValueError(_validate.closest("model", name, MIXTURES) + ", or a .safetensors file")
    model, info = checkpoints.load_model(name)
    return model, {"data": ""} | info


def _teacher(option: str, name: str) -> tuple[Any, dict[str, Any]]:
    """A model, as `_model` gives it, that can teach."""
    model, info = _model(name)
    if isinstance(model, Generator):
        raise ValueError(f"{option} {name} is a student; wanted a teacher, such as `minidistill train` writes")
    return model, info


def _or(value: T | None, default: T) -> T:
    """The option's value, be it 0, or the default if it was not given."""
    return default if value is None else value


def _refuse(a: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """ValueError if one of the options was given."""
    for name in names:
        if getattr(a, name, None) is not None:
            raise ValueError(f"--{name} {getattr(a, name)}: {why}; wanted the command without it")
