"""The command line: what may be asked of `minidistill`, and how an error is told. The work is in `commands.py`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from minidistill import __version__, _validate, bench, samplers
from minidistill.cli import commands
from minidistill.cli.commands import DATA, IMAGES, LEVELS, SOLVER
from minidistill.distillation import OBJECTIVES
from minidistill.distributions import MIXTURES
from minidistill.metrics import features
from minidistill.metrics.classifier import CIFAR10_WEIGHTS
from minidistill.networks import unet
from minidistill.studies import cifar10, classifier, digits, quickstart, sweep
from minidistill.training import Terminated, files, parallel

__all__ = ["PLACES", "RUNS", "main", "run"]

PLACES = ("out", "root", "data", "target", "teacher", "model")  # options that are paths, or may be
RUNS = ("quickstart", "train", "distill", "cifar10", "sweep", "digits")  # each has its --out, a folder, to itself


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for a bad request or a run that failed, 130 after Ctrl-C, 143 after
    SIGTERM, 129 after SIGHUP."""
    arguments = _parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)

    def command() -> None:
        _look_at_places(arguments)
        arguments.device = _device(arguments.device)
        _validate.seed("--seed", arguments.seed)
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
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError, MemoryError) as error:
        print(f"{program}: {_in_one_line(error)}", file=sys.stderr)
        return 2
    finally:
        parallel.stop()
    return 0


def _in_one_line(error: BaseException) -> str:
    """An error's text. Of torch's own errors, which may go on with a stack of C++, the first line."""
    lines = str(error).splitlines() or [type(error).__name__]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in lines[0]:
        return f"out of memory: {lines[0]}; fewer at once (--batch-size, --n) or --accumulate need less"
    return lines[0] if isinstance(error, RuntimeError) else " ".join(" ".join(lines).split())


def _device(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is not known; wanted cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):  # others lack what training needs, such as float64
        raise ValueError(f"--device {name}: not supported; wanted cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if device.type == "cuda" and torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        there = f"the last one here is cuda:{count - 1}" if count else "no CUDA device here"
        raise ValueError(f"--device {name}: {there}")
    return name


def _look_at_places(arguments: argparse.Namespace) -> None:
    """A ~ in a path becomes the home folder, even where the shell left it; NotADirectoryError, before any work, where a
    file is in the place of a folder that is to be written to."""
    for name in PLACES:
        if isinstance(value := getattr(arguments, name, None), str):
            setattr(arguments, name, os.path.expanduser(value))
    if arguments.out is not None:
        out = Path(arguments.out)
        for place in (out, *out.parents) if arguments.program in RUNS else out.parents:
            if place.exists() and not place.is_dir():
                raise NotADirectoryError(f"--out {arguments.out}: {place} is a file; wanted a folder there")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names every default that an option's help does not name itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        return action.help if nothing or "default" in (action.help or "") else f"{action.help} (default %(default)s)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minidistill", description="One-step diffusion distillation, small enough to read in an afternoon."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str, example: str, out: str | None) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=about, description=about, epilog=f"example: minidistill {example}",
                                    formatter_class=_Help)
        sub.set_defaults(command=run, program=name)
        sub.add_argument("--out", default=out, help=f"where to write{'' if out else ' (default nowhere)'}")
        sub.add_argument("--seed", type=int, default=0, help="of everything random")
        sub.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
        return sub

    about = "A ring of Gaussians and real digits, distilled to one step: figures and numbers."
    sub = command("quickstart", commands.quickstart, about, "quickstart --only ring", "runs/quickstart")
    sub.add_argument("--only", choices=("ring", "digits"), help="one half of it (default both)")
    sub.add_argument("--steps", type=int, help="distillation steps of every run (default "
                     f"{quickstart.RING_STEPS} on the ring, {quickstart.DIGITS_STEPS} on digits)")

    example = "train --data digits --steps 3000 --out runs/teacher"
    sub = command("train", commands.train, "Train a diffusion teacher.", example, "runs/teacher")
    sub.add_argument("--data", default="digits", help=f"{', '.join(DATA)}; or your own: a folder of PNG, JPEG or WebP "
                     "images, one subfolder a class if there are classes, or an .npz file")
    sub.add_argument("--size", type=int, metavar="N", help="make images N x N: of cifar10 (16, 8, ...) and your own "
                     "(default as they are)")
    sub.add_argument("--preset", choices=sorted(unet.PRESETS),
                     help="a U-Net (default tiny for cifar10 and your own images, else an MLP)")
    _training_options(sub, "1e-3 for a U-Net, 2e-3 for an MLP")

    sub = command("distill", commands.distil, "Distill a teacher to one step.",
                  "distill --teacher ring --objective forward_kl --out runs/student", "runs/student")
    sub.add_argument("--teacher", required=True, help=f"a .safetensors file, or {', '.join(MIXTURES)}")
    sub.add_argument("--objective", default="reverse_kl", help=", ".join(OBJECTIVES))
    sub.add_argument("--data", help="real samples, for objectives that look at them (default what the teacher was "
                     "trained on, where it was)")
    sub.add_argument("--critic-steps", type=int, help="updates of the fake network for each of the student (default "
                     "the objective's own number, else 2 for images and 3 for points)")
    sub.add_argument("--critic-learning-rate", type=float, help="of the fake network and the ratio (default 1e-3 for "
                     "images, 5e-3 for points)")
    sub.add_argument("--sigma-init", type=float, help="noise level at which the student reads its input (default 1.5 "
                     "standard deviations of the data, 0.5 with an exact teacher)")
    sub.add_argument("--sigma-max", type=float, help="highest noise level at which student and teacher are compared "
                     "(default 5 standard deviations of the data)")
    _training_options(sub, "3e-4 for images; for points the objective's own, else 2e-3")

    for name, run, text, line, out in (
        ("sample", commands.sample, "Draw samples: one call of a student, a solver's run of a teacher.",
         "sample runs/student/student.safetensors --n 2000 --out samples.png", "runs/samples.png"),
        ("evaluate", commands.evaluate, "Measure a model against its target; --out keeps the numbers as JSON.",
         "evaluate runs/student/student.safetensors --target ring", None),
    ):
        sub = command(name, run, text, line, out)
        sub.add_argument("model", help=f"a .safetensors file, or {', '.join(MIXTURES)}")
        sub.add_argument("--n", type=int, default=4000 if name == "evaluate" else 100,
                         help="samples of each model")
        exact = "; of an exact mixture exact samples, if neither is given"
        sub.add_argument("--levels", type=int, help=f"noise levels of a teacher's sampler (default {LEVELS}{exact})")
        sub.add_argument("--solver", help=f"of a teacher: {', '.join(samplers.SOLVERS)} (default {SOLVER}{exact})")
        if name == "sample":
            sub.add_argument("--steps", type=int, help="calls of a student of several steps; of one of a trajectory "
                             "objective, such as ict or ctm, any number (default all that it has, else 1)")
            sub.add_argument("--gamma", type=float, help="of one that can stop on its way: the share of each next "
                             "level's noise that is new, 0 to 1 (default 0)")
    sub.add_argument("--target", help=f"{', '.join((*MIXTURES, *IMAGES))}, or a folder or .npz file of your own images "
                     "(default what the model was trained on, where it was)")
    sub.add_argument("--teacher", help="of a student of images: its file; both are measured (default where it was)")
    sub.add_argument("--features", help=f"of images: {', '.join(features.EXTRACTORS)} (default the data's classifier; "
                     "for your own images CIFAR-10's, at 32x32 pixels)")
    sub.add_argument("--root", help="folder or archive of CIFAR-10 (default $MINIDISTILL_CIFAR10)")
    sub.add_argument("--json", action="store_true", help="one JSON object instead of a table")

    for study, run, text, line, out in (
        (cifar10, cifar10.cifar10, "CIFAR-10 in one step, stage by stage within given minutes.",
         "cifar10 --stage teacher --minutes 9", "runs/cifar10"),
        (sweep, sweep.command, "The long experiments of notebooks 09 and 10, over several seeds.",
         "sweep --studies ring --seeds 2", "runs/sweep"),
        (digits, digits.command, "Every objective on 8x8 digits, over several seeds: the table of notebook 15.",
         "digits --seeds 1", "runs/digits"),
        (classifier, classifier.command, "Train the CIFAR-10 classifier that judges images.", "classifier --steps 100",
         str(CIFAR10_WEIGHTS)),
    ):
        study.options(command(study.__name__.rsplit(".", 1)[1], run, text, line, out))

    sub = command("bench", commands.benchmark, "Time ours against a peer's, in one run; --out keeps the rows as JSON.",
                  "bench unet --json", None)
    sub.add_argument("name", metavar="NAME", help=", ".join(bench.BENCHES))
    sub.add_argument("--short", action="store_true", help="a few seconds, to see that it runs")
    sub.add_argument("--json", action="store_true", help="a JSON list of rows instead of a table")
    return parser


def _training_options(sub: argparse.ArgumentParser, rates: str) -> None:
    add = sub.add_argument
    length = sub.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=3000, help="updates of the network")
    length.add_argument("--images", type=int, help="samples to see, instead of --steps (default by --steps)")
    add("--batch-size", type=int, default=256, help="of all processes together")
    add("--accumulate", type=int, default=1, help="pieces a batch is computed in, where memory is short")
    add("--learning-rate", type=float, help=f"of Adam (default {rates})")
    add("--ema-halflife", type=float, default=100_000, help="of the weights' average, in samples")
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="in which the network computes")
    add("--compile", nargs="?", const=True, default=False, choices=(True, "cuda_graphs"), metavar="cuda_graphs",
        help="torch.compile, if wanted with CUDA graphs (default not compiled)")
    add("--root", help="folder or archive of CIFAR-10 (default $MINIDISTILL_CIFAR10)")
    add("--subset", type=int, help="so many CIFAR-10 images only, the same number of each class (default all)")
    add("--log-every", type=int, default=50, help="steps between records of the loss in history.json")
    add("--checkpoint-every", type=int, default=500, help="steps between checkpoints")
    earlier = sub.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    earlier.add_argument("--force", action="store_true", help="begin anew, over the run that is in --out")

