"""What every sampler shares: the walk down the noise levels, in chunks, with its network calls counted.

A solver is its step from sigma to the next level. A step that remembers (a multistep method) is made afresh for every
chunk, so `integrate` takes the maker of a step; for a step without memory that is `lambda: step`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from tqdm.auto import tqdm

from minidistill import _validate

__all__ = [
    "Advance", "Denoise", "Denoiser", "Report", "Step", "check_label", "check_levels", "in_chunks", "integrate",
    "scale_of", "slope",
]

Denoiser = Callable[..., Tensor]  # D(x, sigma, label)
Denoise = Callable[[Tensor, Tensor], Tensor]  # D(x, sigma), the label already bound and the calls counted
Step = Callable[[Denoise, Tensor, Tensor, Tensor, "torch.Generator | None"], Tensor]  # (D, x, sigma, after, rng)
Advance = Callable[[float], object]  # moves the progress bar on


@dataclass
class Report:
    """What a run did; pass one as `report=` and read it afterwards. Each run overwrites it.

    Attributes:
        calls: network calls per sample; a mean where an adaptive sampler spent them unevenly. 0 for no samples.
        levels: the noise levels that x stood at, in order; of the first chunk, and of its first sample, if they differ.
        attempts, rejected: steps tried and steps refused, per sample, by an adaptive sampler; 0 for all others.
    """

    calls: float = 0.0
    levels: list[float] = field(default_factory=list)
    attempts: float = 0.0
    rejected: float = 0.0


def integrate(
    make_step: Callable[[], Step],
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    generator: torch.Generator | None = None,
    *,
    label: Tensor | None = None,
    trajectory: bool = False,
    progress: bool = False,
    batch_size: int | None = None,
    early_stop: bool = False,
    report: Report | None = None,
) -> Tensor:
    """Walk x down the levels, one step between neighbours. Arguments, result and errors as in `samplers.sample`."""
    sigmas = check_levels(x, sigmas)
    sigmas = sigmas[:-1] if early_stop else sigmas
    report = Report() if report is None else report

    def solve(denoise: Denoise, x: Tensor, advance: Advance) -> Tensor:
        step, path = make_step(), [x]
        for sigma, after in pairwise(sigmas):
            x = step(denoise, x, sigma, after, generator)
            if trajectory:
                path.append(x)
            advance(1)
        return torch.stack(path) if trajectory else x

    out = in_chunks(solve, denoiser, x, len(sigmas) - 1, label, progress, batch_size, report, dim=int(trajectory))
    report.levels = sigmas.tolist()
    return out


@torch.no_grad()
def in_chunks(
    solve: Callable[[Denoise, Tensor, Advance], Tensor],
    denoiser: Denoiser,
    x: Tensor,
    total: float,
    label: Tensor | None,
    progress: bool,
    batch_size: int | None,
    report: Report,
    dim: int = 0,
) -> Tensor:
    """`solve(denoise, x, advance)` on batch_size samples at a time, the results joined along `dim`; the bar runs to
    `total` for each chunk. Starts the report anew and counts the calls. In half precision, which large levels leave, is
    only what the denoiser gets; the walk is in float32."""
    _validate.samples("x", x, least=0)
    batch_size = None if batch_size is None else _validate.whole("batch_size", batch_size)
    check_label(x, label)
    evaluated, kind, (x,) = 0, x.dtype, _validate.precise(x)
    report.calls, report.levels, report.attempts, report.rejected = 0.0, [], 0.0, 0.0
    parts = x.split(batch_size or max(len(x), 1))
    labels: Sequence[Tensor | None] = [None] * len(parts) if label is None else label.split(len(parts[0]) or 1)

    def bind(label: Tensor | None) -> Denoise:
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal evaluated
            evaluated += len(x)
            given, levels = x.to(kind), sigma.to(kind).expand(len(x))  # one shape for every denoiser: (n,)
            out = denoiser(given, levels) if label is None else denoiser(given, levels, label)
            return _validate.denoised(out, given).to(x.dtype)

        return denoise

    with tqdm(total=total * len(parts), disable=not progress, desc="sampling") as bar:
        out = [solve(bind(label), part, bar.update) for part, label in zip(parts, labels, strict=True)]
    report.calls = evaluated / max(len(x), 1)
    samples = torch.cat(out, dim) if len(out) > 1 else out[0]
    if not bool(samples.isfinite().all()):
        raise FloatingPointError("samples are not finite: the denoiser gave a NaN, or the solver's steps grew")
    return samples.to(kind)


def check_label(x: Tensor, label: Tensor | None) -> None:
    """Raise unless the label is None or a tensor (n, ...): what a denoiser is told need not be a class."""
    if label is not None and not (isinstance(label, Tensor) and label.shape[:1] == x.shape[:1]):
        _validate.labels("label", label, len(x))


def check_levels(x: Tensor, sigmas: Tensor) -> Tensor:
    """The levels in x's dtype, float32 at least, and on its device, (m+1,), checked to descend to 0. Their squares must
    not leave the range of numbers: scores divide by them."""
    _validate.samples("x", x, least=0)
    (like_x,) = _validate.precise(x[:0])
    sigmas = _validate.tensor("sigmas", sigmas).to(like_x)
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas.diff() < 0).all()) or sigmas[-1] != 0 or (
            not bool(sigmas.isfinite().all())):
        given = sigmas.tolist() if sigmas.numel() < 10 else f"{sigmas[:4].tolist()} and {sigmas.numel() - 4} more"
        raise ValueError(f"sigmas={given}: wanted at least one level > 0, descending, and then 0")
    lowest, highest = float(sigmas[-2]), float(sigmas[0])
    limits = torch.finfo(sigmas.dtype)
    if lowest < limits.tiny**0.5 or highest > limits.max**0.5:
        bad = lowest if lowest < limits.tiny**0.5 else highest
        raise ValueError(f"sigmas holds {bad:g}, whose square is beyond {sigmas.dtype}; wanted levels from "
                         f"{limits.tiny**0.5:.2g} to {limits.max**0.5:.2g}" + (
                             ", or float64" if sigmas.dtype != torch.float64 else ""))
    return sigmas


def scale_of(denoiser: Denoiser) -> float:
    """The data's standard deviation as the denoiser tells it; EDM's 0.5, for which the usual constants were found, of
    one that does not."""
    own = getattr(denoiser, "sigma_data", None)
    return 0.5 if own is None else float(_validate.positive("the denoiser's sigma_data", own))


def slope(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    """dx / dsigma of the probability flow: (x - D) / sigma, the predicted noise (Karras 2022, equation 3)."""
    return (x - denoise(x, sigma)) / sigma
