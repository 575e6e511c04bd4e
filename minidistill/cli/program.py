"""The command line: what may be asked of `minidistill`, and how an error is told. The work is in `commands.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from minidistill import _validate, bench, samplers
from minidistill.cli import commands
from minidistill.cli.commands import DATA, IMAGES
from minidistill.distillation import OBJECTIVES
from minidistill.distributions import MIXTURES
from minidistill.metrics import features
from minidistill.networks import unet
from minidistill.studies import cifar10, classifier, sweep
from minidistill.training import Terminated, files, parallel

__all__ = ["RUNS", "main", "run"]

RUNS = ("quickstart", "train", "distill", "cifar10", "sweep")  # each has its --out, a folder, to itself


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for a bad request or a run that failed, 130 after Ctrl-C, 143 after
    SIGTERM, 129 after SIGHUP."""
    arguments = _parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)

    def command() -> None:
        arguments.device = _device(arguments.device)
        _validate.whole("--seed", arguments.seed, least=0)
        arguments.device = str(parallel.start(arguments.device))
        with ExitStack() as stack:
            if arguments.program in RUNS and parallel.rank() == 0:
                stack.enter_context(files.hold(arguments.out))
            arguments.command(arguments)

    return run("minidistill", command)


def run(program: str, command: Callable[[], None]) -> int:
    """The exit code of a command, its error told in one line that begins with the program's name."""
    try:
        command()
    except KeyboardInterrupt as stop:
        print(f"{program}: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130
    except Terminated as stop:
        print(f"{program}: {stop}", file=sys.stderr)
        return int(stop.code or 0)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        parallel.stop()
    return 0


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
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str, example: str, out: str | None) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=about, description=about, epilog=f"example: minidistill {example}")
        sub.set_defaults(command=run, program=name)
        sub.add_argument("--out", default=out, help=f"where to write (default {out or 'nowhere'})")
        sub.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
        sub.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
        return sub

    about = "A ring of Gaussians and real digits, distilled to one step: figures and numbers."
    sub = command("quickstart", commands.quickstart, about, "quickstart --only ring", "runs/quickstart")
    sub.add_argument("--only", choices=("ring", "digits"), help="one half of it")
    sub.add_argument("--steps", type=int, help="distillation steps of every run, for a shorter or longer one")

    example = "train --data digits --steps 3000 --out runs/teacher"
    sub = command("train", commands.train, "Train a diffusion teacher.", example, "runs/teacher")
    sub.add_argument("--data", default="digits", help=", ".join(DATA))
    sub.add_argument("--preset", choices=sorted(unet.PRESETS), help="a U-Net (default: an MLP; for cifar10 tiny)")
    _training_options(sub)

    sub = command("distill", commands.distil, "Distil a teacher to one step.",
                  "distill --teacher ring --objective forward_kl --out runs/student", "runs/student")
    sub.add_argument("--teacher", required=True, help=f"a .safetensors file, or {', '.join(MIXTURES)}")
    sub.add_argument("--objective", default="reverse_kl", help=", ".join(OBJECTIVES))
    sub.add_argument("--critic-steps", type=int, help="updates of the fake network for each of the student")
    sub.add_argument("--critic-learning-rate", type=float)
    sub.add_argument("--sigma-init", type=float, help="noise level at which the student reads its input")
    sub.add_argument("--sigma-max", type=float, help="highest noise level at which student and teacher are compared")
    _training_options(sub)

    for name, run, text, line, out in (
        ("sample", commands.sample, "Draw samples: one call of a student, a solver's run of a teacher.",
         "sample runs/student/student.safetensors --n 2000 --out samples.png", "runs/samples.png"),
        ("evaluate", commands.evaluate, "Measure a model against its target; --out keeps the numbers as JSON.",
         "evaluate runs/student/student.safetensors --target ring", None),
    ):
        sub = command(name, run, text, line, out)
        sub.add_argument("model", help=f"a .safetensors file, or {', '.join(MIXTURES)}")
        sub.add_argument("--n", type=int, default=4000 if name == "evaluate" else 100)
        sub.add_argument("--levels", type=int, default=18, help="noise levels of a teacher's sampler (default 18)")
        sub.add_argument("--solver", default="heun", help=", ".join(samplers.SOLVERS))
    sub.add_argument("--target", help=f"{', '.join((*MIXTURES, *IMAGES))}; default: what the model was trained on")
    sub.add_argument("--teacher", help="of an image student: its file, if it is not where it was; both are measured")
    sub.add_argument("--features", help=f"{', '.join(features.EXTRACTORS)}; default: the data's classifier")
    sub.add_argument("--root", help="folder or archive of CIFAR-10 (default $MINIDISTILL_CIFAR10)")
    sub.add_argument("--json", action="store_true", help="one JSON object instead of a table")

    for study, run, text, line, out in (
        (cifar10, cifar10.cifar10, "CIFAR-10 in one step, stage by stage within given minutes.",
         "cifar10 --stage teacher --minutes 9", "runs/cifar10"),
        (sweep, sweep.command, "The long experiments of notebooks 09 and 10, over several seeds.",
         "sweep --studies ring --seeds 2", "runs/sweep"),
        (classifier, classifier.command, "Train the CIFAR-10 classifier that judges images.", "classifier --steps 100",
         None),
    ):
        study.options(command(study.__name__.rsplit(".", 1)[1], run, text, line, out))

    sub = command("bench", commands.benchmark, "Time ours against a peer's, in one run.", "bench unet --json", None)
    sub.add_argument("name", metavar="NAME", help=", ".join(bench.BENCHES))
    sub.add_argument("--short", action="store_true", help="a few seconds, to see that it runs")
    sub.add_argument("--json", action="store_true", help="a JSON list of rows instead of a table")
    return parser


def _training_options(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    length = sub.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=3000)
    length.add_argument("--images", type=int, help="samples to see, instead of --steps")
    add("--batch-size", type=int, default=256, help="of all processes together (default 256)")
    add("--accumulate", type=int, default=1, help="pieces a batch is computed in, where memory is short")
    add("--learning-rate", type=float)
    add("--ema-halflife", type=float, default=100_000, help="of the weights' average, in samples (default 100000)")
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    add("--compile", nargs="?", const=True, default=False, choices=(True, "cuda_graphs"), metavar="cuda_graphs",
        help="torch.compile, if wanted with CUDA graphs")
    add("--root", help="folder or archive of CIFAR-10 (default $MINIDISTILL_CIFAR10)")
    add("--subset", type=int, help="use so many CIFAR-10 images only, the same number of each class")
    add("--log-every", type=int, default=50, help="steps between records of the loss in history.json")
    add("--checkpoint-every", type=int, default=500, help="steps between checkpoints")
    earlier = sub.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    earlier.add_argument("--force", action="store_true", help="begin anew, over the run that is in --out")

