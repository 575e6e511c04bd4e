"""Particles on a Wasserstein gradient flow, step by step: part of `minidistill sweep`."""

from __future__ import annotations

import time
from typing import Any

import torch

from minidistill import divergences, metrics
from minidistill.distillation import wasserstein_flow
from minidistill.distributions import ring

__all__ = ["SIZE", "STEPS", "TRIALS", "run"]

STEPS, SIZE = 25, 0.1  # of the flow; a, in variances of the data
#: The f-divergence whose flow it is.
TRIALS = ("jensen_shannon", "squared_hellinger")


def run(name: str, seed: int, steps: int, n: int) -> dict[str, Any]:
    """A row of `sweep`: n particles from N(0, I) to the ring, which is known by four times as many real samples."""
    target, rng, start = ring(8), torch.Generator().manual_seed(seed), time.process_time()
    x, real = torch.randn(n, 2, generator=rng), target.sample(4 * n, rng)
    flow = wasserstein_flow(x, real, divergences.F[name], steps=steps, size=SIZE, seed=seed, progress=False)
    ended = flow.positions[-1]
    return {
        "study": "jko", "name": name, "seed": seed, "steps": steps, "n": n,
        "seconds": round(time.process_time() - start, 1), "energies": flow.energies.tolist(),
        "over_floor": metrics.over_floor(target, ended, seed), "modes": metrics.mode_coverage(target, ended).covered,
        "samples": ended.numpy(),
    }
