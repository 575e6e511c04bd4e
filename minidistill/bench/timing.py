"""Fair timing on a machine that does other work too: take turns, and compare medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypedDict

import torch
from tqdm.auto import tqdm

__all__ = ["Row", "alternate"]


class Row(TypedDict):
    """One comparison; ratio = ours / peer."""

    name: str
    ours: float
    peer: float
    peer_version: str
    ratio: float
    unit: str


def alternate(
    ours: Callable[[], object], peer: Callable[[], object], repeats: int, warmup: int = 1, *,
    device: str | torch.device = "cpu", progress: bool = True, description: str = "bench",
) -> tuple[float, float]:
    """Median seconds of a call of each, called in turns `repeats` times after `warmup` calls that don't count.
    On CUDA each call's time includes the device's work."""
    cuda = torch.device(device).type == "cuda"
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in tqdm(range(warmup + repeats), desc=description, disable=not progress):
        for call, times in zip((ours, peer), seconds, strict=True):
            start = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize(device)
            if i >= warmup:
                times.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])
