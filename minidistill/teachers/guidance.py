"""Denoisers changed after training: their mean corrected, or pulled towards a class or away from a worse model.

Guidance extrapolates, D = D_0 + scale (D_1 - D_0), and `scale` is read the same way everywhere here: 0 is the weak
model D_0, 1 is the strong one D_1 (no guidance), above 1 goes beyond it. Papers that write (1 + w) D_1 - w D_0 have
w = scale - 1. At sigma = 0 the guided score is exactly that of p_0 (p_1 / p_0)^scale, a sharper density. At higher
noise it is the score of no diffusion, since noising and taking powers do not commute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from minidistill import _validate
from minidistill._random import noise_like
from minidistill.data import to_float
from minidistill.samplers.schedules import levels_of
from minidistill.score_matching.fields import call, column, level, per_sample, value_and_gradient

__all__ = [
    "Calibrated", "Denoise", "Guided", "aligned_guidance_loss", "autoguided", "calibrated", "classifier_free",
    "classifier_guided",
]

Denoise = Callable[..., Tensor]


@dataclass(frozen=True)
class Guided:
    """D(x, sigma, label) = rule(x, sigma, label), which tells its samples' shape, classes and scale as teachers do."""

    rule: Denoise
    shape: tuple[int, ...] | None
    n_classes: int
    sigma_data: float | None

    def __call__(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        return self.rule(x, sigma, label)


def classifier_free(denoiser: Denoise, scale: float, unconditional: Denoise | int | None = None) -> Guided:
    """D_u + scale (D_c - D_u), D_c = denoiser(x, sigma, label) (Ho 2022, where w = scale - 1).

    unconditional: where D_u comes from. None asks the denoiser without a label, as exact mixtures, closed forms and
    networks trained with `train_denoiser(..., drop_label=...)` allow; a number is the null class of such a network;
    anything else is another denoiser, D_u = unconditional(x, sigma). With label=None, D is D_u.
    """
    scale = _validate.number("scale", scale)
    classes = int(getattr(denoiser, "n_classes", getattr(denoiser, "n_components", 0)))
    own = getattr(denoiser, "null_class", None)
    null = None if unconditional is None or callable(unconditional) else _validate.whole(
        "unconditional", unconditional, least=0)
    if null is not None and null != (last := classes - 1 if own is None else own):
        raise ValueError(f"unconditional={null}: this denoiser has {classes} classes; wanted its last, {last}")
    real = classes - (null is not None and own is None)  # a denoiser that does not tell its null class counts it

    def rule(x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        if null is not None:
            base = call(denoiser, x, sigma, torch.full((len(x),), null, device=x.device))
        else:
            base = call(unconditional if callable(unconditional) else denoiser, x, sigma, None)
        if label is None:
            return base
        label = _validate.labels("label", label, len(x), real or None)
        return torch.lerp(base, call(denoiser, x, sigma, label), scale)

    return _like(denoiser, rule, real)


def classifier_guided(denoiser: Denoise, log_prob: Denoise, scale: float = 1.0, n_classes: int = 0) -> Guided:
    """D + scale sigma^2 grad_x log p(label | x, sigma) (Dhariwal 2021): Bayes' rule at scale 1, D alone at 0.

    log_prob(x, sigma, label) gives (n,) for noised x; `score_matching.posterior_denoiser` is scale 1 from logits.
    n_classes is what the result tells, for samplers that choose labels themselves.
    """
    scale = _validate.number("scale", scale)
    n_classes = _validate.whole("n_classes", n_classes, least=0)

    def rule(x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        slope = value_and_gradient(lambda u: log_prob(u, sigma, label), x)[1]
        return call(denoiser, x, sigma, None) + scale * level(x, sigma).square() * slope

    return _like(denoiser, rule, n_classes)


def autoguided(good: Denoise, bad: Denoise, scale: float) -> Guided:
    """D_bad + scale (D_good - D_bad) (Karras 2024): away from a smaller or less trained model of the same data."""
    scale = _validate.number("scale", scale)

    def rule(x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        return torch.lerp(call(bad, x, sigma, label), call(good, x, sigma, label), scale)

    return _like(good, rule, int(getattr(good, "n_classes", 0)))


def aligned_guidance_loss(
    denoiser: Denoise, x0: Tensor, sigma: float | Tensor, noise: Tensor, label: Tensor, scale: float | Tensor,
    unconditional: Denoise, weight: Tensor | float = 1.0,
) -> Tensor:
    """weight |D_u + scale (D_c - D_u) - x0|^2 / dim, (n,), x = x0 + sigma noise: train what guidance samples (Patel
    2023).

    scale > 0 is a float or (n,). By algebra its minimiser is D_c = D_u + (D* - D_u) / scale with D* the plain
    conditional denoiser (D_u exact and fixed): guided at that same scale it gives back D*. It removes guidance.
    """
    x = x0 + level(x0, sigma, "x0", noise=noise) * noise
    with torch.no_grad():
        base = call(unconditional, x, sigma, None)
    guided = base + column("scale", scale, x) * (call(denoiser, x, sigma, label) - base)
    return per_sample((guided - x0).square(), weight)


@dataclass(frozen=True)
class Calibrated(Guided):
    """What `calibrated` returns: the corrected D with the table it adds. eta is E[(x_t - D) / sigma], (m, c, *shape), c
    = 1 without classes, at the levels `sigmas` (m,), rising; `error` its standard error."""

    sigmas: Tensor
    eta: Tensor
    error: Tensor


@torch.no_grad()
def calibrated(
    denoiser: Denoise, data: Tensor, sigmas: Tensor | None = None, labels: Tensor | None = None, *, pairs: int = 1,
    batch_size: int = 1024, generator: torch.Generator | None = None, progress: bool = False,
) -> Calibrated:
    """D + sigma eta(sigma) with eta = E[(x_t - D) / sigma], the mean of the predicted noise (Pang 2023, "On
    Calibrating Diffusion Probabilistic Models").

    A true score has mean 0 at every noise level. Taking off a wrong mean lowers the loss |D - x0|^2 by exactly
    |sigma eta|^2. eta is estimated from the data at each level, for each class where there are labels, and linear in
    log sigma between levels, constant outside them. Noise comes as +e and -e, so that its own mean adds no error.

    Args:
        data: (n, *shape), floating, or images as bytes; two or more, for the standard error.
        labels: (n,) classes, for a conditional denoiser, two or more of each.
        sigmas: (m,) levels > 0, in any order; None for 18, those that a sampler of this denoiser visits.
        pairs: draws of noise for each data point, each with its mirror image.
    Raises:
        ValueError, TypeError: data, labels, levels or counts that are none.
    """
    if not (isinstance(data, Tensor) and data.dtype == torch.uint8):
        _validate.samples("data", data)
    sigmas = levels_of(denoiser, 18)[:-1] if sigmas is None else _validate.tensor("sigmas", sigmas)
    sigmas = sigmas.sort().values if sigmas.ndim == 1 else sigmas
    if sigmas.ndim != 1 or not len(sigmas) or not bool((sigmas > 0).all() and (sigmas.diff() > 0).all()):
        raise ValueError(f"sigmas={sigmas.tolist()}: wanted one level > 0 or more, each once")
    pairs, batch_size = _validate.whole("pairs", pairs), _validate.whole("batch_size", batch_size)
    if labels is not None:
        labels = _validate.labels("labels", labels, len(data))
    group = labels if labels is not None else torch.zeros(len(data), dtype=torch.long, device=data.device)
    classes = int(group.max()) + 1
    counts = torch.bincount(group, minlength=classes).double()
    if not bool((counts > 0).all()):
        raise ValueError(f"labels: no sample has class {int(counts.argmin())}; wanted some of each, 0 to {classes - 1}")
    if not bool((counts > 1).all()):
        who = "data has" if labels is None else f"labels: class {int(counts.argmin())} has"
        raise ValueError(f"{who} 1 sample; wanted at least 2, for the standard error")
    moments = torch.zeros(2, len(sigmas), classes, *data.shape[1:], dtype=torch.float64, device=data.device)
    for k, sigma in enumerate(tqdm(sigmas.tolist(), disable=not progress, desc="calibrating")):
        for start in range(0, len(data), batch_size):
            x0, mine = to_float(data[start : start + batch_size]), group[start : start + batch_size]
            slope = torch.zeros_like(x0)
            for _ in range(pairs):
                e = noise_like(x0, generator)
                for x in (x0 + sigma * e, x0 - sigma * e):
                    label = None if labels is None else mine
                    slope += (x - call(denoiser, x, sigma, label)) / (2 * pairs * sigma)
            moments[0, k].index_add_(0, mine, slope.double())
            moments[1, k].index_add_(0, mine, slope.double().square())
    n = counts.reshape(-1, *[1] * (data.ndim - 1))
    eta = moments[0] / n
    error = ((moments[1] / n - eta.square()).clamp(min=0) / (n - 1)).sqrt()
    nodes = sigmas.to(eta).log()

    def rule(x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        s = level(x, sigma)
        place = s.flatten().expand(len(x)).to(nodes).log()
        after = torch.searchsorted(nodes, place).clamp(1, max(1, len(nodes) - 1))
        after, before = after.clamp(max=len(nodes) - 1), after - 1
        share = ((place - nodes[before]) / (nodes[after] - nodes[before])).nan_to_num(0.0).clamp(0, 1)
        if labels is not None and label is None:  # the table is of the classes
            return call(denoiser, x, sigma, None)
        if labels is not None and label is not None:
            label = _validate.labels("label", label, len(x), classes)
        row = torch.zeros_like(before) if labels is None or label is None else label
        correction = torch.lerp(eta[before, row], eta[after, row], column("share", share, eta[before, row]))
        return call(denoiser, x, sigma, label) + s * correction.to(x)

    like = _like(denoiser, rule, classes if labels is not None else 0)
    return Calibrated(rule, like.shape or tuple(data.shape[1:]), like.n_classes, like.sigma_data, sigmas, eta, error)


def _like(denoiser: Denoise, rule: Denoise, n_classes: int) -> Guided:
    shape = getattr(denoiser, "shape", None)
    return Guided(rule, None if shape is None else tuple(shape), n_classes, getattr(denoiser, "sigma_data", None))

