"""Log-likelihood of samples under a denoiser's model, by the probability flow (Song 2021, "Score SDE", section 4.3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from tqdm.auto import tqdm

from minidistill import _validate
from minidistill.samplers.schedules import range_of
from minidistill.score_matching.fields import call, pullback, rademacher, trace

__all__ = ["DIVERGENCES", "log_likelihood"]

DIVERGENCES = {"exact": True, "hutchinson": False}


@torch.no_grad()
def log_likelihood(
    denoiser: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor | None = None,
    *,
    divergence: str = "exact",
    probes: int = 1,
    generator: torch.Generator | None = None,
    label: Tensor | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    batch_size: int | None = None,
    chunk_size: int | None = None,
    progress: bool = False,
) -> Tensor:
    """log p(x) in nats, (n,), of the density that the probability flow brings down to the level sigmas[0].

    For an exact denoiser that is the data's density noised at sigmas[0]: the default changes nothing unless the data
    are that fine (bytes: add noise first). With u = ln sigma, the flow dx/du = x - D carries log-density at the
    rate -(dim - tr J), J = dD/dx, so log p(x) = log prior(x at the top) + integral of (dim - tr J) du; both are
    integrated by Runge-Kutta's fourth-order rule, one step from each level to the next (four calls of D each).

    Args:
        denoiser: D(x, sigma, label), differentiable in x. x: (n, *shape).
        sigmas: (m+1,) levels > 0, rising; None for 65, even in ln sigma, from 0.004 to 160 of the denoiser's
            `sigma_data`, and from 0.002 to 80 if it has none.
        divergence: "exact", dim backward passes (`chunk_size` at once), or "hutchinson", v'Jv averaged over `probes`
            random sign vectors, the same along the whole path: unbiased for the result, since that is linear in tr J.
        prior: log-density at sigmas[-1], (n, *shape) -> (n,), such as `GaussianTeacher(data).noised(80).log_prob`; None
            for N(D(0, sigmas[-1]), sigmas[-1]^2 + denoiser.sigma_data^2) (+ 0 if it has none): D(0) is the data's mean
            as the denoiser knows it, and with 0 in its place a mean of 0.3 costs 0.01 nats at sigma = 80.
        batch_size: samples at once, None for all. generator: for the probes.
    Raises:
        ValueError, TypeError: x that is not finite and floating, levels that do not rise, an unknown divergence.
    """
    _validate.samples("x", x, least=0)
    exact = _validate.choose("divergence", divergence, DIVERGENCES)
    probes = _validate.whole("probes", probes)
    if batch_size is not None:
        batch_size = _validate.whole("batch_size", batch_size)
    if label is not None:
        label = _validate.labels("label", label, len(x))
    if sigmas is None:
        low, high = range_of(denoiser)
        sigmas = torch.linspace(math.log(low), math.log(high), 65, dtype=torch.float64).exp()
    sigmas = _validate.tensor("sigmas", sigmas).double()
    kind, (x,) = x.dtype, _validate.precise(x)  # half precision is what the denoiser gets, and too coarse to add up

    def model(u: Tensor, sigma: float, label: Tensor | None) -> Tensor:
        return call(denoiser, u.to(kind), sigma, label).to(u.dtype)
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas > 0).all() and (sigmas.diff() > 0).all()):
        raise ValueError(f"sigmas={sigmas.tolist()}: wanted two levels or more, rising and > 0")
    variance = float(sigmas[-1]) ** 2 + float(getattr(denoiser, "sigma_data", None) or 0.0) ** 2
    size = batch_size or max(len(x), 1)
    parts, dim = [x.new_zeros(0)], x[:1].numel()
    logs = sigmas.log().tolist()
    with tqdm(total=-(-len(x) // size) * (len(logs) - 1), disable=not progress, desc="likelihood") as bar:
        for start in range(0, len(x), size):
            here = x[start : start + size]
            mine = None if label is None else label[start : start + size]
            slices = [] if exact else [rademacher(here, generator) for _ in range(probes)]

            def rate(
                u: float, x: Tensor, mine: Tensor | None = mine, slices: list[Tensor] = slices
            ) -> tuple[Tensor, Tensor]:
                """dx/du and dim - tr J at u = ln sigma."""
                out, pull = pullback(model, x, math.exp(u), mine)
                traces = [trace(x, pull, v) for v in slices] or [trace(x, pull, None, chunk_size)]
                return x - out, dim - torch.stack(traces).mean(0)

            total = here.new_zeros(len(here))
            for u, then in pairwise(logs):
                here, gained = _runge_kutta(rate, u, then - u, here)
                total = total + gained
                bar.update()
            if prior is None:
                centre = model(torch.zeros_like(here), float(sigmas[-1]), mine)
                parts.append(_normal(here - centre, variance) + total)
            else:
                parts.append(prior(here) + total)
    return torch.cat(parts)


def _runge_kutta(
    rate: Callable[[float, Tensor], tuple[Tensor, Tensor]], u: float, h: float, x: Tensor
) -> tuple[Tensor, Tensor]:
    """x after a step h of dx/du = rate's first, and the integral of its second along it: the classical RK4."""
    a, f = rate(u, x)
    b, g = rate(u + h / 2, x + h / 2 * a)
    c, i = rate(u + h / 2, x + h / 2 * b)
    d, j = rate(u + h, x + h * c)
    return x + h / 6 * (a + 2 * b + 2 * c + d), h / 6 * (f + 2 * g + 2 * i + j)


def _normal(x: Tensor, variance: float) -> Tensor:
    flat = x.flatten(1)
    return -0.5 * (flat.square().sum(1) / variance + flat.shape[1] * math.log(2 * math.pi * variance))
