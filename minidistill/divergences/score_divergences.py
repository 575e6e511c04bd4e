"""Divergences from scores: distances between score fields, and KL, entropy and mutual information from denoisers.

In EDM coordinates x = x0 + sigma e, and with y = s_p - s_q the gap between two scores at one noise level,

    Fisher, with any distance d    sum over levels of w(sigma) E_{q_sigma} d(y)
    KL(p || q)                     integral over sigma of sigma E_{p_sigma} |y|^2                  (de Bruijn)
    D_f(p || q)                    integral over sigma of sigma E_{q_sigma} h(r) |y|^2             (Uni-Instruct)

so f enters by its weight h alone. Entropy is a KL to a Gaussian, mutual information a KL between a conditional and a
marginal (MINDE, Franzese 2024). With D the denoisers, sigma |y| = |D_p - D_q| / sigma is a gap in units of noise, and
the integrals are over log sigma: drawing sigma log-uniformly is MINDE's importance sampling, t ~ beta / sigma_t^2,
for every process at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm.auto import tqdm

from minidistill import _validate
from minidistill._random import noise_like
from minidistill.divergences.estimators import Estimate, Samples, draw_samples
from minidistill.divergences.f_divergences import FDivergence, Function
from minidistill.divergences.noise_integral import integrate, levels_from, noised
from minidistill.divergences.score_distances import ScoreDistance, column, squared_l2, sum_squares

__all__ = [
    "Denoise", "entropy_from_scores", "fisher", "from_scores", "kl_from_scores", "mutual_information",
    "mutual_information_joint",
]

Denoise = Callable[..., Tensor]


@torch.no_grad()
def fisher(
    denoiser_p: Denoise,
    denoiser_q: Denoise,
    sample_q: Tensor | Samples,
    sigmas: Tensor,
    weights: Tensor | Function | None = None,
    distance: ScoreDistance | None = None,
    *,
    n: int = 10_000,
    generator: torch.Generator | None = None,
    batch_size: int = 10_000,
    progress: bool = True,
) -> Estimate:
    """sum_i w_i E_{x ~ q at sigma_i} d(s_p(x) - s_q(x)): the generalised Fisher divergence (Luo 2024, equation 3.1).

    Args:
        sample_q: samples (n, *shape) of the student at sigma = 0, or what draws n of them.
        sigmas: (k,) noise levels > 0.
        weights: (k,), or a function of `sigmas`; None for 1 / k, the average over levels.
        distance: None for squared L2, the Fisher divergence proper.
    """
    x0 = draw_samples("sample_q", sample_q, n, generator)
    distance = squared_l2() if distance is None else distance
    batch_size = _validate.whole("batch_size", batch_size)
    levels = _validate.tensor("sigmas", sigmas).to(x0)
    if levels.ndim != 1 or not len(levels) or not bool((levels > 0).all() and levels.isfinite().all()):
        raise ValueError(f"sigmas has shape {tuple(levels.shape)}; wanted (k,) noise levels > 0")
    w = torch.full_like(levels, 1 / len(levels)) if weights is None else weights
    w = _validate.tensor("weights", w(levels) if callable(w) else w).to(levels)
    _validate.finite("weights", w)
    if w.shape != levels.shape:
        raise ValueError(f"weights has shape {tuple(w.shape)} and sigmas {tuple(levels.shape)}; wanted equal shapes")
    values = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    bar = tqdm(total=len(levels) * len(x0), disable=not progress, desc="Fisher", leave=False, delay=2)
    for sigma, weight in zip(levels, w, strict=True):
        for rows in torch.arange(len(x0), device=x0.device).split(batch_size):
            x = x0[rows] + sigma * noise_like(x0[rows], generator)
            gap = _gap(denoiser_p, denoiser_q, x, float(sigma)) / sigma**2
            values[rows] += (weight * distance.value(gap)).double()
            bar.update(len(rows))
    bar.close()
    return Estimate(float(values.mean()), float(values.var() / len(values)) ** 0.5, len(values))


@torch.no_grad()
def kl_from_scores(
    denoiser_p: Denoise,
    denoiser_q: Denoise,
    sample_p: Tensor | Samples,
    *,
    generator: torch.Generator | None = None,
    **levels: Any,
) -> Estimate:
    """KL(p || q) in nats = integral of sigma E_{p_sigma} |s_p - s_q|^2 d sigma (MINDE, Franzese 2024, equation 11).

    What is left below `sigma_min` is not counted: strictly this is the KL after that little noise. Errors of learned
    scores add to it, for |s_p - s_q|^2 cannot tell them from a difference.

    Args:
        sample_p: samples (m, *shape), used in turn, or what draws them. The standard error takes the n draws for
            independent, which they are not where m < n.
        levels: `n`, `sigma_min`, `sigma_max`, ... of `Levels`.
    """
    at = levels_from(levels)
    x0 = draw_samples("sample_p", sample_p, at.n, generator)

    def gap(rows: Tensor, sigma: Tensor) -> Tensor:
        x = noised(x0, rows, sigma, generator)
        return sum_squares(_gap(denoiser_p, denoiser_q, x, sigma))

    return integrate(gap, x0, at, generator)


@torch.no_grad()
def entropy_from_scores(
    denoiser: Denoise,
    sample: Tensor | Samples,
    *,
    generator: torch.Generator | None = None,
    **levels: Any,
) -> Estimate:
    """The differential entropy H(p) = - E_p log g - KL(p || g) in nats, with g the Gaussian N(mean, std^2 I) of the
    samples, whose scores are known, as the reference (MINDE). Arguments as `kl_from_scores`."""
    at = levels_from(levels)
    x0 = draw_samples("sample", sample, at.n, generator)
    mean, variance = x0.mean(0), float(x0.var(0).mean())

    def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
        return mean + variance / (variance + column(sigma, x).square()) * (x - mean)

    kl = kl_from_scores(denoiser, gaussian, x0, generator=generator, **levels)
    surprise = (sum_squares(x0 - mean) / variance + x0[0].numel() * math.log(2 * math.pi * variance)).double() / 2
    error = math.hypot(kl.standard_error, float(surprise.std()) / len(x0) ** 0.5)
    return Estimate(float(surprise.mean()) - kl.value, error, kl.n)


@torch.no_grad()
def mutual_information(
    conditional: Denoise,
    marginal: Denoise,
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator | None = None,
    **levels: Any,
) -> Estimate:
    """I(X; Y) = E_y KL(p(x | y) || p(x)) in nats, from pairs x (m, *shape), y (m, ...) (MINDE-c).

    conditional: D(x_sigma, sigma, y), with y clean, where other denoisers have their label.
    marginal: D(x_sigma, sigma).
    """
    _pairs(x, y)

    def gap(rows: Tensor, sigma: Tensor) -> Tensor:
        xt = noised(x, rows, sigma, generator)
        given = _validate.denoised(conditional(xt, sigma, y[rows % len(y)]), xt, "conditional")
        return sum_squares(given - _validate.denoised(marginal(xt, sigma), xt, "marginal"))

    return integrate(gap, x, levels_from(levels), generator)


@torch.no_grad()
def mutual_information_joint(
    joint: Denoise,
    x_given_y: Denoise,
    y_given_x: Denoise,
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator | None = None,
    **levels: Any,
) -> Estimate:
    """I(X; Y) from a joint score and both conditional ones (MINDE-j): the integral of sigma times
    E |s(x_sigma, y_sigma) - [s(x_sigma | y), s(y_sigma | x)]|^2, conditions clean.

    x, y: (m, *shape) each, shapes of their own.
    joint: D(z_sigma, sigma) on z = [x, y], each flattened, (n, dx + dy).
    x_given_y: D(x_sigma, sigma, y), as in `mutual_information`; y_given_x: D(y_sigma, sigma, x); these see the shapes.
    """
    _pairs(x, y)
    _validate.samples("y", y)
    z = torch.cat([x.flatten(1), y.flatten(1)], 1)

    def gap(rows: Tensor, sigma: Tensor) -> Tensor:
        zt, rows = noised(z, rows, sigma, generator), rows % len(x)
        xt, yt = zt.tensor_split([x[0].numel()], 1)
        xt, yt = xt.reshape(-1, *x.shape[1:]), yt.reshape(-1, *y.shape[1:])
        of_x = _validate.denoised(x_given_y(xt, sigma, y[rows]), xt, "x_given_y")
        of_y = _validate.denoised(y_given_x(yt, sigma, x[rows]), yt, "y_given_x")
        both = torch.cat([of_x.flatten(1), of_y.flatten(1)], 1)
        return sum_squares(_validate.denoised(joint(zt, sigma), zt, "joint") - both)

    return integrate(gap, z, levels_from(levels), generator)


@torch.no_grad()
def from_scores(
    divergence: FDivergence,
    denoiser_p: Any,
    denoiser_q: Any,
    sample_p: Tensor | Samples | None = None,
    sample_q: Tensor | Samples | None = None,
    log_ratio: Callable[[Tensor, float], Tensor] | None = None,
    *,
    generator: torch.Generator | None = None,
    **levels: Any,
) -> Estimate:
    """D_f(p || q) = integral of sigma E_{q_sigma} h(r) |s_p - s_q|^2 d sigma (Uni-Instruct, Wang 2025):
    f enters by its weight h alone. Raises ValueError for total variation, which has none.

    Half of the draws are p's and half q's, weighted as draws of their average: q's alone would miss what h = r asks.

    Args:
        sample_p, sample_q: samples or what draws them; None for the denoisers themselves, as mixtures do.
        log_ratio: (x, sigma) -> log p_sigma/q_sigma, (n,), sigma a float; None for the densities of two mixtures.
    """
    if float(divergence.log_weight(torch.zeros(()))) == -math.inf:
        raise ValueError(f"{divergence.name} has no curvature, so no score can tell it; wanted another divergence")
    at = levels_from({"n_levels": 200, **levels})
    if at.n_levels is None or at.n < 2 * at.n_levels:
        raise ValueError(f"n={at.n} and n_levels={at.n_levels}: wanted two draws or more a level")
    at = replace(at, n=2 * at.n_levels * (at.n // (2 * at.n_levels)))  # as many draws of p as of q at each level
    x_p = draw_samples("sample_p", denoiser_p if sample_p is None else sample_p, at.n, generator)
    x_q = draw_samples("sample_q", denoiser_q if sample_q is None else sample_q, at.n, generator)
    ratio = log_ratio or (lambda x, s: denoiser_p.noised(s).log_prob(x) - denoiser_q.noised(s).log_prob(x))

    def gap(rows: Tensor, sigma: Tensor) -> Tensor:
        of_p, of_q = rows.tensor_split([len(rows) // 2])
        both = torch.cat([x_p[of_p % len(x_p)], x_q[of_q % len(x_q)]])
        x = both + column(sigma, both) * noise_like(both, generator)
        level = float(sigma[0])  # the rows of one call share their level
        v = ratio(x, level)
        h = torch.exp(divergence.log_weight(v) + logsigmoid(-v) + math.log(2))  # h q / m, m = (p + q) / 2
        return h * sum_squares(_gap(denoiser_p, denoiser_q, x, level))

    return integrate(gap, x_q, at, generator)


def _gap(denoiser_p: Denoise, denoiser_q: Denoise, x: Tensor, sigma: float | Tensor) -> Tensor:
    """D_p - D_q at x, (n, *shape)."""
    of_p = _validate.denoised(denoiser_p(x, sigma), x, "denoiser_p")
    return of_p - _validate.denoised(denoiser_q(x, sigma), x, "denoiser_q")


def _pairs(x: Tensor, y: Tensor) -> None:
    _validate.samples("x", x, least=2)
    if len(y) != len(x):
        raise ValueError(f"x has {len(x)} samples and y {len(y)}; wanted pairs")
