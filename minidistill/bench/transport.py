"""The entropic plan of `transport.sinkhorn_plan` against POT's `sinkhorn_log`, and the memory of a large problem."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidistill.bench.timing import Row, alternate
from minidistill.transport import sinkhorn_plan

__all__ = ["LARGE", "TOLERANCE", "bench", "cases", "peak_memory", "peer_plan"]

TOLERANCE = 1e-6  # norm of the second marginal's error, looked at every 10 iterations: POT's rule, and ours
LARGE = 20_000  # samples of each in the memory test


def cases(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two Gaussians n x d apart in mean and width; squared distances are about 2.7 d."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, n, d, generator=rng).to(dtype)
    return x, 1.2 * y + 0.5


def peer_plan(x: Any, y: Any, epsilon: float) -> Any:
    """POT's plan by the same number format, cost, weights and stopping rule; x and y NumPy's or torch's arrays."""
    pot = _pot()
    weights = x[:, 0] * 0 + 1 / len(x)
    return pot.bregman.sinkhorn_log(weights, weights, pot.dist(x, y), epsilon, numItermax=1000, stopThr=TOLERANCE)


def bench(short: bool = False, *, n: int | None = None, d: int = 64, progress: bool = True) -> list[Row]:
    """Median seconds of a plan between n samples of each (2,000; 300 if `short`) in d dimensions on the CPU, with the
    cost matrix. POT runs on whichever of its NumPy and torch backends is faster here. Unless `short`, also the memory
    that a loss and its gradient take at 20,000 samples, beside the cost matrix alone (Linux only).

    Raises:
        ImportError: POT is missing. AssertionError: the plans differ.
    """
    version = f"POT {_pot().__version__}"
    n = (300 if short else 2000) if n is None else n
    rows: list[Row] = []
    for dtype, epsilon in ((torch.float32, 20.0), (torch.float32, 5.0), (torch.float64, 5.0)):
        x, y = cases(n, d, dtype)
        ours = partial(sinkhorn_plan, x, y, epsilon, tolerance=TOLERANCE)
        peers = {"torch": partial(peer_plan, x, y, epsilon), "numpy": partial(peer_plan, x.numpy(), y.numpy(), epsilon)}
        # Both stop within the tolerance of the marginals, which leaves the plans that far apart, and some more.
        gap = float(torch.linalg.matrix_norm(ours() - peers["torch"]()))
        assert gap < 100 * TOLERANCE, f"the plans differ by {gap:.1e}"
        trial = {name: _seconds(task) for name, task in peers.items()}
        backend = min(trial, key=trial.__getitem__)
        kind = str(dtype).removeprefix("torch.")
        seconds, theirs = alternate(ours, peers[backend], 3 if short else 5, progress=progress,
                                    description=f"sinkhorn {kind} epsilon {epsilon:g}")
        name = f"sinkhorn plan, n = {n:,}, d = {d}, {kind}, epsilon {epsilon:g}, {torch.get_num_threads()} thread(s)"
        rows.append({"name": name, "ours": seconds, "peer": theirs, "peer_version": f"{version}, {backend}",
                     "ratio": seconds / theirs, "unit": "s"})
    if not short and Path("/proc/self/status").exists():
        matrix = LARGE**2 * 4 / 2**20
        used = peak_memory(LARGE, d)
        rows.append({"name": f"sinkhorn and gradient, peak memory, n = {LARGE:,}, d = {d}, float32", "ours": used,
                     "peer": matrix, "peer_version": "the cost matrix alone", "ratio": used / matrix, "unit": "MiB"})
    return rows


def peak_memory(n: int, d: int, iterations: int = 3) -> float:
    """MiB by which the peak of a fresh process rises for one debiased loss and its gradient, on Linux; all iterations
    need the same memory, so a few will do."""
    script = f"""
import re, torch, warnings
from minidistill.bench.transport import cases
from minidistill.transport import sinkhorn
warnings.simplefilter("ignore")
peak = lambda key: int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
x, y = cases({n}, {d}, torch.float32)
small = cases(50, {d}, torch.float32)[0].requires_grad_(True)
sinkhorn(small, small.detach() + 1, 20.0, max_iterations={iterations}).backward()  # loads what loads late
x.requires_grad_(True)
before = peak("VmRSS")
sinkhorn(x, y, 20.0, max_iterations={iterations}).backward()
print(peak("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _seconds(task: Callable[[], Any]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def _pot() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ot
    except ImportError as error:
        raise ImportError("this benchmark needs Python Optimal Transport: pip install POT") from error
    return ot
