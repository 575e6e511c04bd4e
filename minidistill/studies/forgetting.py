"""Forgetting a class of a mixture, against the same student that was told to keep all: part of `minidistill sweep`."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from minidistill import metrics
from minidistill._random import seeded
from minidistill.distillation import OBJECTIVES, Distilled, Objective, ScoreForgetting, ScoreIdentity, distill
from minidistill.distributions import GaussianMixture, ring
from minidistill.networks import MLP, Denoiser, Generator

__all__ = ["FORGET", "SAFE", "STEPS", "TRIALS", "ByClass", "measure", "run", "student"]

FORGET, SAFE, STEPS = 0, 1, 1500


class ByClass:
    """An exact class-conditional teacher: a ring of eight Gaussians, two of them opposite each other to each of four
    classes."""

    shape, n_classes = (2,), 4

    def __init__(self) -> None:
        whole = ring(8)
        self.sigma_data = whole.sigma_data
        self.laws = [GaussianMixture(whole.means[k::4], whole.covs[k::4]) for k in range(self.n_classes)]

    def __call__(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """D(x, sigma, label), (n, 2)."""
        if label is None:
            raise ValueError("label is None: this teacher is asked for a class; wanted (n,) classes")
        each = torch.stack([law(x, sigma) for law in self.laws])
        return each[label, torch.arange(len(x), device=x.device)]


#: Objectives as they are, and around them the one that forgets.
TRIALS: dict[str, Objective] = {
    name + more: rule if not more else ScoreForgetting(rule, FORGET, SAFE)
    for name, rule in (("sid", ScoreIdentity()), ("reverse_kl", OBJECTIVES["reverse_kl"]))
    for more in ("", ", forgets")
}


def student(teacher: ByClass, seed: int) -> Generator:
    """As `trials.student`, and told a class."""
    with seeded(seed):
        network = MLP(teacher.shape, hidden=128, depth=6, n_classes=teacher.n_classes, activation="relu", gain=4.0)
    return Generator(Denoiser(network, teacher.sigma_data), 0.5 * teacher.sigma_data)


def run(name: str, seed: int, steps: int, n: int, kept: int) -> dict[str, Any]:
    """A row of `sweep`: distilled as a trial says, and measured class by class."""
    teacher, start = ByClass(), time.process_time()
    made = distill(teacher, student(teacher, seed), TRIALS[name], steps=steps, seed=seed, progress=False)
    seconds = time.process_time() - start
    return {"study": "forgetting", "name": name, "seed": seed, "steps": steps, "n": n, "seconds": round(seconds, 1),
            **measure(made, teacher, seed, n, kept)}


def measure(made: Distilled, teacher: ByClass, seed: int, n: int, kept: int) -> dict[str, Any]:
    """Which share of the requests for the forgotten class lands on its old modes, and which on the safe class's, by the
    nearest mean; the sliced W2 over its floor of every other class."""
    asked = [made.sample(n // 4, seed=1000 + seed, label=torch.full((n // 4,), k)) for k in range(teacher.n_classes)]
    means = torch.cat([law.means for law in teacher.laws])
    owner = torch.cdist(asked[FORGET], means).argmin(1) // 2  # two means each, in order of classes
    floors = [metrics.over_floor(law, x, seed) for law, x in zip(teacher.laws, asked, strict=True)]
    return {
        "on_old_modes": float((owner == FORGET).float().mean()), "on_safe_modes": float((owner == SAFE).float().mean()),
        "kept_over_floor": [floor for k, floor in enumerate(floors) if k != FORGET],
        "samples": torch.cat([x[:kept // 4] for x in asked]).clamp(-1e4, 1e4).numpy(),  # a quarter of each class
    }
