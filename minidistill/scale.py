"""How much work a notebook does: `MINIDISTILL_SCALE` = smoke (seconds, for CI) | cpu (minutes) | gpu."""

from __future__ import annotations

import os
from typing import TypeVar

import torch

from minidistill import _validate

__all__ = ["NAMES", "T", "VARIABLE", "announce", "name", "pick"]

T = TypeVar("T")
VARIABLE = "MINIDISTILL_SCALE"
NAMES = ("smoke", "cpu", "gpu")


def name() -> str:
    """The scale in force: the environment's, else gpu where there is one, else cpu. ValueError if unknown."""
    default = "gpu" if torch.cuda.is_available() else "cpu"
    return _validate.choose(VARIABLE, os.environ.get(VARIABLE) or default, {known: known for known in NAMES})


def pick(smoke: T, cpu: T, gpu: T | None = None) -> T:
    """The value for the scale in force; without a `gpu` value, gpu gets cpu's."""
    return {"smoke": smoke, "cpu": cpu, "gpu": cpu if gpu is None else gpu}[name()]


def announce(smoke: str, cpu: str, gpu: str | None = None) -> None:
    """Print the scale in force and how long the notebook takes at it, and seed torch, so that networks start from the
    same weights in every run. Not for a cell whose output is compared."""
    torch.manual_seed(0)
    print(f"{VARIABLE}={name()} ({' | '.join(NAMES)}): this notebook takes about {pick(smoke, cpu, gpu)}")
    if name() == "smoke":
        print("Numbers in the text are of the scale cpu; this one is for a quick look, and trains too little for them.")
