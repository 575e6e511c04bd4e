"""Integrals over noise levels by importance sampling: where the draws go, and how sure the answer is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from minidistill import _validate
from minidistill._random import home, noise_like
from minidistill.divergences.estimators import Estimate
from minidistill.divergences.score_distances import column

__all__ = ["LAWS", "Levels", "integrate", "levels_from", "noised"]


@dataclass(frozen=True)
class Levels:
    """How an integral over noise levels is computed.

    n: draws, one noise level each, or `n_levels` levels shared evenly.
    sigma_min, sigma_max: the range; None for 0.01 and 50 times the samples' standard deviation.
    law: "log_logistic" puts the draws near the data's own scale, where scores differ; "log_uniform" is MINDE's.
    stratified: one draw in each n-th part of the law, which cuts the variance; off, they are independent.
    tail: add the part above sigma_max, where gaps fall as 1 / sigma^2: half of the integrand there.
    batch_size: draws that the denoisers see at once; rounded down to an even number, at least 2, where they share a
        level, as all do in the tail.
    """

    n: int = 20_000
    sigma_min: float | None = None
    sigma_max: float | None = None
    law: str = "log_logistic"
    stratified: bool = True
    tail: bool = True
    n_levels: int | None = None
    batch_size: int = 10_000
    progress: bool = True


def integrate(
    gap: Callable[[Tensor, Tensor], Tensor], x0: Tensor, at: Levels, generator: torch.Generator | None
) -> Estimate:
    """The integral over log sigma of E gap / sigma^2, with gap(rows, sigma) = |D_p - D_q|^2 for m draws: which samples
    to noise, (m,), numbered in random order, and their levels, (m,)."""
    scale = _validate.positive("the samples' standard deviation", float(x0.var(0).mean()) ** 0.5)
    low = 0.01 * scale if at.sigma_min is None else at.sigma_min
    high = 50.0 * scale if at.sigma_max is None else at.sigma_max
    if not low < high:
        raise ValueError(f"sigma_min={low:g} is not below sigma_max={high:g}")
    count = at.n_levels or at.n
    each = at.n // count
    even = max(2, at.batch_size // 2 * 2)  # `from_scores` halves what shares a level
    where = home(x0.device, generator)
    place = torch.rand(count, generator=generator, dtype=torch.float64, device=where).to(x0.device)
    place = (torch.arange(count, device=place.device) + place) / count if at.stratified else place
    sigma, density = LAWS[at.law](place, low, high, scale)
    order = torch.randperm(count * each, generator=generator, device=where).to(x0.device)
    blocks = _blocks(len(order), each, even) if at.n_levels else _blocks(len(order), len(order), at.batch_size)
    sigma, values = sigma.repeat_interleave(each), []
    with tqdm(total=len(order), disable=not at.progress, desc="noise levels", leave=False, delay=2) as bar:
        for block in blocks:
            rows, levels = order[block], sigma[block]
            values.append(gap(rows, levels.to(x0)).double() / levels.square())
            bar.update(len(rows))
    y = torch.cat(values).reshape(count, each).mean(1) / density  # (count,), one number a level
    value, variance = float(y.mean()), _variance_of_mean(y, at.stratified)
    if at.tail:
        parts = order[: max(2, 2 * (len(order) // 20))].split(even)
        gaps = [gap(rows, torch.full((len(rows),), high).to(x0)).double() for rows in parts]
        beyond = torch.cat(gaps) / (2 * high**2)
        value, variance = value + float(beyond.mean()), variance + float(beyond.var()) / len(beyond)
    return Estimate(value, variance**0.5, len(order))


def _blocks(n: int, group: int, size: int) -> list[slice]:
    """Slices of 0 to n - 1 in order, of `size` at most, none across two groups of `group` neighbours."""
    return [slice(start, min(start + size, first + group, n))
            for first in range(0, n, group) for start in range(first, min(first + group, n), size)]


def _log_uniform(place: Tensor, low: float, high: float, scale: float) -> tuple[Tensor, Tensor]:
    width = math.log(high / low)
    return low * torch.exp(place * width), torch.full_like(place, 1 / width)


def _log_logistic(place: Tensor, low: float, high: float, scale: float) -> tuple[Tensor, Tensor]:
    """log sigma from the logistic law about log scale: its tails fall as sigma and 1 / sigma, slower than any gap."""
    bottom, top = low / (low + scale), high / (high + scale)
    v = bottom + (top - bottom) * place
    return scale * v / (1 - v), v * (1 - v) / (top - bottom)


#: place in (0, 1) -> (sigma, its density over log sigma)
LAWS: dict[str, Callable[[Tensor, float, float, float], tuple[Tensor, Tensor]]] = {
    "log_logistic": _log_logistic, "log_uniform": _log_uniform,
}


def _variance_of_mean(y: Tensor, stratified: bool) -> float:
    """Of the mean of y (k,). Neighbouring strata differ by their noise and hardly by their means, so half of the
    squared differences of pairs is the noise's variance (and a little more: never too small on average)."""
    if not stratified:
        return float(y.var()) / len(y)
    pairs = y[: len(y) // 2 * 2].reshape(-1, 2)
    return float(pairs.diff(dim=1).square().mean()) / 2 / len(y)


def levels_from(options: dict[str, Any]) -> Levels:
    unknown = set(options) - set(Levels.__dataclass_fields__)
    if unknown:
        raise TypeError(_validate.closest("option", min(unknown), Levels.__dataclass_fields__))
    at = Levels(**options)
    at = replace(at, n=_validate.whole("n", at.n, least=4), batch_size=_validate.whole("batch_size", at.batch_size))
    _validate.choose("law", at.law, LAWS)
    if at.n_levels is not None:
        at = replace(at, n_levels=_validate.whole("n_levels", at.n_levels, least=2))
        if at.n_levels > at.n:  # type: ignore[operator]
            raise ValueError(f"n_levels={at.n_levels}: wanted at most n={at.n}")
    low, high = (None if value is None else _validate.positive(name, value) for name, value in (
        ("sigma_min", at.sigma_min), ("sigma_max", at.sigma_max)))
    return replace(at, sigma_min=low, sigma_max=high)


def noised(x0: Tensor, rows: Tensor, sigma: Tensor, generator: torch.Generator | None) -> Tensor:
    chosen = x0[rows % len(x0)]
    return chosen + column(sigma, chosen) * noise_like(chosen, generator)
