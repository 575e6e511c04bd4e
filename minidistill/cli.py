"""The command line: quickstart, train, distill, sample, evaluate."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidistill import _validate, checkpoints, classifier, data, metrics, plotting, samplers, teachers, training
from minidistill.distillation import OBJECTIVES, distill, draw
from minidistill.distributions import MIXTURES, SHAPES, GaussianMixture
from minidistill.networks import Denoiser, Generator

N_TRAIN = 20_000  # samples drawn from a named 2-D target to train a teacher on
DATA = (*MIXTURES, *SHAPES, "digits")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for a bad request, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.device = _device(arguments.device)
        _validate.whole("--seed", arguments.seed, least=0)
        arguments.command(arguments)
    except KeyboardInterrupt as stop:
        print(f"minidistill: {stop or 'stopped'}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"minidistill: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def quickstart(a: argparse.Namespace) -> None:
    from minidistill.quickstart import quickstart as run  # it alone needs worker processes

    if a.steps is not None:
        _validate.whole("--steps", a.steps)
    run(a.out, only=a.only, steps=a.steps, seed=a.seed, device=a.device)


def train(a: argparse.Namespace) -> None:
    samples, labels = _dataset(a.data, a.seed)
    out = Path(a.out)
    model = checkpoints.writable(out / "teacher.safetensors")
    teacher = teachers.train_denoiser(
        samples, labels=labels, steps=a.steps, batch_size=a.batch_size, seed=a.seed, device=a.device,
        checkpoint=out / "training.safetensors", resume=a.resume,
    )
    checkpoints.save_model(model, teacher, data=a.data, steps=a.steps, seed=a.seed)
    print(f"teacher in {model}")


def distil(a: argparse.Namespace) -> None:
    _validate.choose("--objective", a.objective, OBJECTIVES)
    teacher, name = _teacher(a.teacher)
    samples = labels = None
    if isinstance(teacher, GaussianMixture):
        teacher = teacher.to(torch.device(a.device))
    elif getattr(OBJECTIVES[a.objective], "needs_ratio", False):
        samples, labels = _dataset(name, a.seed)
    out = Path(a.out)
    model = checkpoints.writable(out / "student.safetensors")
    images = len(teacher.shape) == 3
    rate, critic_rate, critic_steps = (3e-4, 1e-3, 2) if images else (2e-3, 5e-3, 3)
    student = distill(
        teacher, objective=a.objective, steps=a.steps, data=samples, labels=labels, batch_size=a.batch_size,
        critic_steps=critic_steps, learning_rate=rate, critic_learning_rate=critic_rate, seed=a.seed,
        device=a.device, checkpoint=out / "training.safetensors", resume=a.resume,
    )
    checkpoints.save_model(model, student.ema, data=name, objective=a.objective, steps=a.steps, seed=a.seed)
    with checkpoints.atomic(out / "history.json") as path:
        path.write_text(json.dumps(student.history) + "\n")
    print(f"student in {model}")


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
    if name not in (*MIXTURES, "digits"):
        raise ValueError(_validate.closest("--target", name, (*MIXTURES, "digits")))
    if a.out:
        checkpoints.writable(a.out)
    samples, asked = _draw(model, a)
    row: dict[str, Any] = {"model": a.model, "target": name, "n": a.n, "seed": a.seed}
    if name == "digits":
        images, labels = data.digits()
        _validate.samples("the model's samples", samples, tuple(images.shape[1:]))
        judge = classifier.train_classifier(images, labels)
        row["frechet_32_features"] = metrics.frechet_distance(judge.features(samples), judge.features(images))
        if asked is not None:
            row["recognised"] = judge.recognised(samples, asked)
    else:
        mixture = MIXTURES[name]()
        kl, coverage = metrics.grid_kl(mixture, samples), metrics.mode_coverage(mixture, samples)
        row |= {"kl": kl.kl, "reverse_kl": kl.reverse_kl, "outside_grid": kl.outside, "smoothing_sigma": kl.sigma,
                "modes": f"{coverage.covered}/{coverage.total}", "worst_mode_error": coverage.worst}
    if a.out:
        with checkpoints.atomic(a.out) as path:
            path.write_text(json.dumps(row) + "\n")
    if a.json:
        print(json.dumps(row))
    else:
        for key, value in row.items():
            print(f"{key:<20} {value:.4g}" if isinstance(value, float) else f"{key:<20} {value}")


def _draw(model: GaussianMixture | Denoiser | Generator, a: argparse.Namespace) -> tuple[Tensor, Tensor | None]:
    """a.n samples and the classes asked for: one call of a generator, a solver's run of a denoiser."""
    if isinstance(model, GaussianMixture):
        return model.sample(a.n, training.generator_on("cpu", a.seed)), None
    model = model.to(a.device)
    label = torch.arange(a.n) % model.n_classes if model.n_classes else None
    if isinstance(model, Generator):
        return draw(model, a.n, label=label, seed=a.seed).cpu(), label
    sigmas = samplers.karras_sigmas(a.levels)
    rng = training.generator_on("cpu", a.seed)
    x = (sigmas[0] * torch.randn(a.n, *model.shape, generator=rng)).to(a.device)
    noise = training.generator_on(a.device, a.seed)
    out = samplers.sample(model, x, sigmas, a.solver, label=None if label is None else label.to(a.device),
                          generator=noise, progress=True)
    return out.cpu(), label


def _dataset(name: str, seed: int) -> tuple[Tensor, Tensor | None]:
    if name == "digits":
        return data.digits()
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


def _device(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is not known; wanted cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here")
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minidistill", description="One-step diffusion distillation, small enough to read in an afternoon."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str, example: str, out: str | None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about, epilog=f"example: minidistill {example}")
        sub.set_defaults(command=run)
        sub.add_argument("--out", default=out, help=f"where to write (default {out or 'nowhere'})")
        sub.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
        sub.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
        return sub

    about = "A ring of Gaussians and real digits, distilled to one step: figures and numbers."
    sub = command("quickstart", quickstart, about, "quickstart --only ring", "runs/quickstart")
    sub.add_argument("--only", choices=("ring", "digits"), help="one half of it")
    sub.add_argument("--steps", type=int, help="distillation steps of every run, for a shorter or longer one")

    example = "train --data digits --steps 3000 --out runs/teacher"
    sub = command("train", train, "Train a diffusion teacher.", example, "runs/teacher")
    sub.add_argument("--data", default="digits", help=", ".join(DATA))
    sub.add_argument("--steps", type=int, default=3000)
    sub.add_argument("--batch-size", type=int, default=256)
    sub.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")

    sub = command("distill", distil, "Distil a teacher to one step.",
                  "distill --teacher ring --objective forward_kl --out runs/student", "runs/student")
    sub.add_argument("--teacher", required=True, help=f"a .safetensors file, or {', '.join(MIXTURES)}")
    sub.add_argument("--objective", default="reverse_kl", help=", ".join(OBJECTIVES))
    sub.add_argument("--steps", type=int, default=3000)
    sub.add_argument("--batch-size", type=int, default=256)
    sub.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")

    for name, run, text, line, out in (
        ("sample", sample, "Draw samples: one call of a student, a solver's run of a teacher.",
         "sample runs/student/student.safetensors --n 2000 --out samples.png", "runs/samples.png"),
        ("evaluate", evaluate, "Measure a model against its target; --out keeps the numbers as JSON.",
         "evaluate runs/student/student.safetensors --target ring", None),
    ):
        sub = command(name, run, text, line, out)
        sub.add_argument("model", help=f"a .safetensors file, or {', '.join(MIXTURES)}")
        sub.add_argument("--n", type=int, default=4000 if name == "evaluate" else 100)
        sub.add_argument("--levels", type=int, default=18, help="noise levels of a teacher's sampler (default 18)")
        sub.add_argument("--solver", default="heun", help=", ".join(samplers.SOLVERS))
    sub.add_argument("--target", help=f"{', '.join((*MIXTURES, 'digits'))}; default: what the model was trained on")
    sub.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser

