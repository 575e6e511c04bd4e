"""What `minidistill cifar10` may be asked for, and what one call was."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from minidistill import _validate
from minidistill.distillation import OBJECTIVES, Drifting, Objective, ScoreIdentity
from minidistill.networks import unet
from minidistill.studies.cifar10_speed import SPEEDS

__all__ = ["STUDENTS", "Settings", "options", "refuse_what_is_dropped"]

#: What a student may be trained by: every objective, SiD at the alpha that needs no luck, drifting in features too.
STUDENTS: dict[str, Objective] = {
    **OBJECTIVES, "sid_alpha_1": ScoreIdentity(alpha=1.0), "drifting_features": Drifting(features_at=1.0),
}


@dataclass(frozen=True)
class Settings:
    """One call's options, as `options` describes them."""

    stage: str
    minutes: float
    reserve: float
    share: float
    out: Path
    weights: Path
    data: str | None
    size: int
    batches: tuple[int, ...] | None
    subset: int | None
    preset: str
    patch: int
    grow: str | None
    objective: str
    critic_steps: int | None
    batch_size: int
    learning_rate: float | None
    critic_learning_rate: float
    sigma_init: float
    sigma_max: float
    ema_halflife: float
    checkpoint_images: int
    speed: str
    n: int
    reference: int
    track: int
    seed: int
    device: str
    command: str

    @classmethod
    def of(cls, a: argparse.Namespace) -> Settings:
        given = {f.name: getattr(a, f.name) for f in fields(cls) if f.name != "command"}
        batches = None if a.batches is None else tuple(int(number) for number in a.batches.split(","))
        folders = {name: _validate.path(f"--{name}", given[name]) for name in ("out", "weights")}
        patch = a.patch or (2 if a.size == 32 and a.preset == "tiny" else 1)
        return cls(**{**given, **folders, "batches": batches, "patch": patch, "command": _command(a.argv)})

    @property
    def dataset(self) -> str:
        return "digits" if self.data == "digits" else "cifar10"

    @property
    def every(self) -> int:
        """Steps between exports."""
        return max(1, self.checkpoint_images // self.batch_size)

    def network(self) -> unet.UNet:
        """A new one, of the preset."""
        return unet.preset(self.preset, (3, self.size, self.size), n_classes=10, patch=self.patch)

    def file(self, name: str) -> Path:
        return self.out / f"{name}.safetensors"

    def state(self, name: str) -> Path:
        return self.out / "state" / f"{name}.safetensors"


def refuse_what_is_dropped(s: Settings) -> None:
    """ValueError for an option that this call has no use for."""
    digits, idle = s.dataset == "digits", f"--stage {s.stage} trains no student"
    for option, dropped, why in (
        ("subset", digits, "the digits are few"), ("subset", s.batches is not None, "--batches are whole files"),
        ("batches", digits, "only of cifar10"), ("critic_steps", s.stage in ("teacher", "evaluate"), idle),
        ("learning_rate", s.stage == "evaluate", "--stage evaluate trains nothing"),
    ):
        if dropped and (given := getattr(s, option)) is not None:
            raise ValueError(f"--{option.replace('_', '-')} {given}: {why}; wanted the command without it")


def _command(argv: Sequence[str]) -> str:
    """The command without where its files are, which says nothing about the result."""
    hidden = ("--out", "--data", "--weights")
    places = {i + k for i, word in enumerate(argv) if word in hidden for k in (0, 1)}
    words = [Path(word).name if argv[i - 1] == "--grow" else word for i, word in enumerate(argv)]
    return " ".join(["minidistill", *(word for i, word in enumerate(words) if i not in places)])


def options(parser: argparse.ArgumentParser) -> None:
    """What may be asked of it on the command line, besides --out, --seed and --device."""
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--stage", choices=["teacher", "student", "evaluate", "all"], default="teacher",
        help="train the teacher, distill it, measure everything in --out, or all of that")
    add("--minutes", type=float, default=9.0, help="for everything: loading, training, measuring")
    add("--reserve", type=float, default=2.0 if gpu else 1.0, help="of them, minutes kept for measuring")
    add("--share", type=float, default=0.67,
        help="of --stage all's training time, the teacher's part; 0 leaves the teacher as it is")
    add("--data", help="folder or archive of CIFAR-10 (else $MINIDISTILL_CIFAR10), or 'digits' to try the recipe out")
    add("--size", type=int, choices=[16, 32], default=32, help="32, or 16: images averaged over 2x2 pixels")
    add("--batches", help="only these of the five files of training images, such as 1,2,3")
    add("--subset", type=int, help="train on so many images only, the same number of each class")
    add("--weights", default="tutorials/checkpoints", help="folder of committed weights to go on from")
    add("--preset", choices=sorted(unet.PRESETS), default="small" if gpu else "tiny", help="the U-Net's size")
    add("--patch", type=int, choices=[1, 2],
        help="2 makes 2x2 pixels one position of the network: a third of the time. If not given 2 for tiny at 32x32")
    add("--grow", metavar="FILE",
        help="a teacher of 16x16; where there is none of 32x32 yet, it starts from these weights (with --patch 2)")
    add("--objective", choices=sorted(STUDENTS), default="sim", help="of the student")
    add("--critic-steps", type=int,
        help="updates of the fake network for each of the student; if not given the objective's own number, or 1")
    add("--batch-size", type=int, default=512 if gpu else 64, help="images in each update")
    add("--learning-rate", type=float, help="1e-3 for a teacher, 3e-4 for a student, if not given")
    add("--critic-learning-rate", type=float, default=3e-4, help="of the fake network and the ratio")
    add("--sigma-init", type=float, default=2.5, help="noise level at which the student reads its input")
    add("--sigma-max", type=float, default=20.0, help="highest noise level at which student and teacher are compared")
    add("--ema-halflife", type=float, default=500_000 if gpu else 50_000, help="in images")
    add("--checkpoint-images", type=int, default=500_000 if gpu else 6_400, help="save whenever so many were seen")
    add("--speed", choices=["try", *SPEEDS], default="try", help="'try' takes the fastest")
    add("--n", type=int, default=10_000, help="samples to measure, or as many as there is time for; 0 for none")
    add("--reference", type=int, default=50_000 if gpu else 20_000, help="real images to measure them against")
    add("--track", type=int, default=1000, help="samples by which a student's course is followed; 0 for not at all")
