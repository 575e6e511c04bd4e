"""Score matching losses, per sample: each has the score (or the denoiser) as its minimiser.

One convention: a loss is weight |D - D*|^2 / dim (`explicit_loss`) up to a constant that does not depend on the model,
in expectation and, for `lcss_loss` and `finite_difference_loss`, up to a stated order. D* = x + sigma^2 score is the
exact denoiser, x (n, *shape), dim its size, x0 clean and x = x0 + sigma noise. Times dim / (2 sigma^4), with weight 1,
each is its textbook form 1/2 |s - s*|^2 + constant of the score s = (D - x) / sigma^2. Losses of x alone hold for
samples of any density, sigma being only the scale between D and s. All randomness is an argument; the gradient reaches
the denoiser alone, except where a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.score_matching.fields import (
    call,
    column,
    inner,
    level,
    local_step,
    per_sample,
    pullback,
    trace,
    value_and_gradient,
)

__all__ = [
    "Denoise", "dlsm_loss", "explicit_loss", "finite_difference_loss",
    "implicit_loss", "lcss_loss", "local_dsm_loss", "mixed_target_loss",
    "optimal_share", "posterior_denoiser", "sliced_loss", "sure_loss", "target_loss", "tiw_loss",
]

Denoise = Callable[..., Tensor]


# ------------------------------------------------- from samples x of the law whose score is sought

def explicit_loss(
    denoiser: Denoise, x: Tensor, sigma: float | Tensor, score: Tensor, label: Tensor | None = None,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """weight |D(x) - (x + sigma^2 score)|^2 / dim, (n,): against the exact score at x (Hyvarinen 2005, equation 2).

    x and score are (n, *shape); sigma and weight floats or (n,).
    """
    s = level(x, sigma, score=score)
    return per_sample((call(denoiser, x, sigma, label) - x - s.square() * score).square(), weight)


def implicit_loss(
    denoiser: Denoise, x: Tensor, sigma: float | Tensor, label: Tensor | None = None, weight: Tensor | float = 1.0,
    *, chunk_size: int | None = None,
) -> Tensor:
    """weight (|D - x|^2 + 2 sigma^2 tr(J - I)) / dim, (n,), J = dD/dx exactly (Hyvarinen 2005, theorem 1).

    The trace takes dim backward passes, `chunk_size` of them at once: for small dim only.
    """
    s = level(x, sigma)
    out, pull = pullback(denoiser, x, sigma, label)
    dim = x[0].numel()
    excess = trace(x, pull, None, chunk_size) / dim - 1
    return per_sample((out - x).square(), weight) + weight * 2 * s.flatten().square() * excess


def sliced_loss(
    denoiser: Denoise, x: Tensor, sigma: float | Tensor, slices: Tensor, label: Tensor | None = None,
    weight: Tensor | float = 1.0, *, variance_reduced: bool = False,
) -> Tensor:
    """weight ((v'(D - x))^2 + 2 sigma^2 (v'Jv - v'v)) / dim, (n,), for slices v with E v v' = I (Song 2019, SSM).

    `variance_reduced` has |D - x|^2 for the first term, whose mean over v is known (SSM-VR). slices (n, *shape)
    are such as `rademacher`. Costs one backward pass, and a second one through it.
    """
    s = level(x, sigma, slices=slices)
    out, pull = pullback(denoiser, x, sigma, label)
    curvature = 2 * s.square() * slices * (pull(slices) - slices)
    return per_sample(_square(out - x, slices, variance_reduced) + curvature, weight)


def finite_difference_loss(
    denoiser: Denoise, x: Tensor, sigma: float | Tensor, slices: Tensor, label: Tensor | None = None,
    weight: Tensor | float = 1.0, *, step: float = 0.05, variance_reduced: bool = False,
) -> Tensor:
    """`sliced_loss` from D at x + eps v and x - eps v, eps = step sigma: off by O(eps^2) (Pang 2020, FD-SSM).

    v'Jv is their difference along v over 2 eps, and D is their mean. Two calls of the denoiser, no second derivatives;
    rounding grows as 1 / step.
    """
    s = level(x, sigma, slices=slices)
    _validate.positive("step", step)
    move = step * s * slices
    ahead, behind = call(denoiser, x + move, sigma, label), call(denoiser, x - move, sigma, label)
    curvature = 2 * s.square() * slices * ((ahead - behind) / (2 * step * s) - slices)
    return per_sample(_square((ahead + behind) / 2 - x, slices, variance_reduced) + curvature, weight)


def lcss_loss(
    denoiser: Denoise, x: Tensor, sigma: float | Tensor, noise: Tensor, label: Tensor | None = None,
    weight: Tensor | float = 1.0, *, tau: float = 0.05, control_variate: bool = True,
) -> Tensor:
    """weight (|D(x) - x|^2 + 2 sigma^2 (e'(D(x') - D(x)) / r - e'e)) / dim, (n,): Stein's identity for the trace.

    x' = x + r e, r = tau sigma, e = noise ~ N(0, I) (Osada 2024, LCSS): two calls, off by O(r^2) in the bulk of p and
    without bound in its tails, so keep tau <= 0.1. The norm is at x; at x' the loss would be denoising x' to x.
    Without the `control_variate` D(x), whose mean is 0, the variance grows as 1 / r^2.
    """
    s = level(x, sigma, noise=noise)
    _validate.positive("tau", tau)
    here, there = call(denoiser, x, sigma, label), call(denoiser, x + tau * s * noise, sigma, label)
    rise = there - here if control_variate else there - x
    return per_sample((here - x).square() + 2 * s.square() * noise * (rise / (tau * s) - noise), weight)


def sure_loss(
    denoiser: Denoise, x: Tensor, sigma: float | Tensor, slices: Tensor | None = None, label: Tensor | None = None,
    weight: Tensor | float = 1.0, *, chunk_size: int | None = None,
) -> Tensor:
    """weight (|D - x|^2 + 2 sigma^2 tr J - sigma^2 dim) / dim, (n,): Stein's unbiased risk estimate.

    Its mean is the mean of `denoising_loss`, constant included, from data x that were only ever seen with noise of
    this sigma (Aali 2023, SURE-Score): it is `implicit_loss` + sigma^2. The trace is v'Jv with slices v (n, *shape),
    exact with None. For higher noise the paper adds `denoising_loss` on D(x, sigma) as if that were clean.
    """
    s = level(x, sigma)
    out, pull = pullback(denoiser, x, sigma, label)
    excess = 2 * trace(x, pull, slices, chunk_size) / x[0].numel() - 1
    return per_sample((out - x).square(), weight) + weight * s.flatten().square() * excess


# ------------------------------------------------- from clean x0 and the noise that was added

def target_loss(
    denoiser: Denoise, x0: Tensor, sigma: float | Tensor, noise: Tensor, clean_score: Tensor,
    label: Tensor | None = None, weight: Tensor | float = 1.0,
) -> Tensor:
    """weight |D(x) - (x + sigma^2 clean_score)|^2 / dim, (n,), x = x0 + sigma noise (De Bortoli 2024, TSM).

    clean_score is grad log p0 at x0, (n, *shape): its mean given x is the score at x. Little variance at small sigma
    and much at large, the opposite of `denoising_loss`.
    """
    return mixed_target_loss(denoiser, x0, sigma, noise, clean_score, 1.0, label, weight)


def mixed_target_loss(
    denoiser: Denoise, x0: Tensor, sigma: float | Tensor, noise: Tensor, clean_score: Tensor, share: float | Tensor,
    label: Tensor | None = None, weight: Tensor | float = 1.0,
) -> Tensor:
    """weight |D(x) - share (x + sigma^2 clean_score) - (1 - share) x0|^2 / dim, (n,), share a float or (n,).

    share 1 is `target_loss`, 0 `denoising_loss`, and `optimal_share` between them has the least variance.
    """
    s = level(x0, sigma, "x0", noise=noise, clean_score=clean_score)
    x = x0 + s * noise
    target = torch.lerp(x0, x + s.square() * clean_score, column("share", share, x))
    return per_sample((call(denoiser, x, sigma, label) - target).square(), weight)


def optimal_share(sigma: float | Tensor, information: float | Tensor) -> float | Tensor:
    """1 / (1 + sigma^2 information): the share of the target in the mix of least variance, shaped like sigma.

    information = E|grad log p0|^2 / dim, that of the clean data, such as `clean_score.square().mean()`. The errors of
    the two targets have covariance -I, I the information of p_sigma, whatever p0 is; hence the closed form.
    """
    return 1 / (1 + sigma**2 * information)


def posterior_denoiser(denoiser: Denoise, classifier: Denoise) -> Denoise:
    """D(x, sigma, y) = denoiser(x, sigma) + sigma^2 grad_x log c(y | x): Bayes' rule for denoisers.

    classifier(x, sigma) gives logits (n, c) at that noise level; y is (n,). The gradient reaches the classifier too.
    """
    def denoise(x: Tensor, sigma: float | Tensor, label: Tensor) -> Tensor:
        def log_likelihood(u: Tensor) -> Tensor:
            logits = classifier(u, sigma)
            chosen = _validate.labels("label", label, len(x), logits.shape[1], wait=False)
            return logits.log_softmax(1).gather(1, chosen[:, None]).squeeze(1)

        s = level(x, sigma)
        return call(denoiser, x, sigma, None) + s.square() * value_and_gradient(log_likelihood, x)[1]

    return denoise


def dlsm_loss(
    denoiser: Denoise, x0: Tensor, sigma: float | Tensor, noise: Tensor, classifier: Denoise, label: Tensor,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """weight |D(x) + sigma^2 grad_x log c(label | x) - x0|^2 / dim, (n,) (Chao 2022, DLSM).

    `denoising_loss` of the `posterior_denoiser`, with the denoiser frozen: the gradient reaches the classifier alone,
    logits (n, c) = classifier(x, sigma). The paper adds cross entropy, which pins what gradients leave open.
    """
    s = level(x0, sigma, "x0", noise=noise)
    posterior = posterior_denoiser(lambda x, level, y: denoiser(x, level).detach(), classifier)
    return per_sample((posterior(x0 + s * noise, sigma, label) - x0).square(), weight)


def tiw_loss(
    denoiser: Denoise, x0: Tensor, sigma: float | Tensor, noise: Tensor, discriminator: Denoise,
    label: Tensor | None = None, weight: Tensor | float = 1.0,
) -> Tensor:
    """weight r(x) |D(x) - (x0 + sigma^2 grad log r(x))|^2 / dim, (n,): unbiased data's loss, from biased x0.

    discriminator(x, sigma, label) = log r, (n,): the logit of unbiased against biased data at that noise level; it has
    no gradient. With the exact log r = log p_unbiased / p_biased the loss is `explicit_loss` under p_unbiased up to a
    constant (Kim 2024, TIW-DSM); with any other, the minimiser is off by the error of its gradient only.
    """
    s = level(x0, sigma, "x0", noise=noise)
    x = x0 + s * noise
    log_ratio, slope = (v.detach() for v in value_and_gradient(lambda u: discriminator(u, sigma, label), x.detach()))
    gap = call(denoiser, x, sigma, label) - x0 - s.square() * slope
    return per_sample(gap.square(), weight) * log_ratio.exp()


# ------------------------------------------------- for forward processes whose drift is not linear

def local_dsm_loss(
    denoiser: Denoise, x: Tensor, sigma: float | Tensor, noise: Tensor,
    drift: Callable[[Tensor, float | Tensor], Tensor], diffusion: float, t: float | Tensor, step: float,
    label: Tensor | None = None, weight: Tensor | float = 1.0, *, linearised: bool = True,
) -> Tensor:
    """weight |D(x_t) - (x_t + sigma^2 grad log p(x_t | x))|^2 / dim, (n,): local DSM (Singhal 2024).

    x are samples at time t, x_t one `local_step` later; sigma is the name that D gives to that later time, and the
    scale of its score. The minimiser is exactly the score of the law that such steps simulate, whatever their size.
    """
    s = level(x, sigma, noise=noise)
    xt, score = local_step(x, noise, drift, diffusion, t, step, linearised=linearised)
    return per_sample((call(denoiser, xt, sigma, label) - xt - s.square() * score).square(), weight)


# ------------------------------------------------- noise levels, and what the losses share

def _square(residual: Tensor, slices: Tensor, variance_reduced: bool) -> Tensor:
    """|r|^2 or (v'r)^2, both spread over dimensions so that their sum is right."""
    if variance_reduced:
        return residual.square()
    return column("", inner(slices, residual), residual) * slices * residual
