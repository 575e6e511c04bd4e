"""Adaptive steps for the reverse-time SDE: the step size follows an estimate of the error, not a schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from minidistill import _validate
from minidistill._random import noise_like
from minidistill.samplers.loop import Advance, Denoise, Denoiser, Report, check_levels, in_chunks, scale_of

__all__ = ["gotta_go_fast"]


def gotta_go_fast(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    generator: torch.Generator | None = None,
    *,
    eps_abs: float | None = None,
    eps_rel: float = 0.05,
    safety: float = 0.9,
    r: float = 0.9,
    first_step: float = 0.01,
    per_sample: bool = False,
    label: Tensor | None = None,
    trajectory: bool = False,
    progress: bool = False,
    batch_size: int | None = None,
    early_stop: bool = False,
    report: Report | None = None,
) -> Tensor:
    """Stochastic improved Euler with adaptive steps (Jolicoeur-Martineau 2021, algorithm 1); two calls an attempt.

    An attempt from sigma to a lower level makes Euler-Maruyama's x' and the mean x'' of it and of the same step with
    the score read at x', all with one draw of noise. Its error is the root mean square of (x' - x'') / delta, with
    delta = max(eps_abs, eps_rel max(|x'|, |x' of the last step|)), elementwise. Up to 1 the step to x'' is made; either
    way the step size becomes safety * error^-r times what it was. Step sizes are in t from 1 to 0, sigma geometric
    in t as in the paper's variance-exploding process, from sigmas[0] to the last level above 0: what lies between is
    ignored, and at the end comes the denoiser.

    One step size and one pooled error serve the whole batch (the chunk, with `batch_size`), so that a rejection hardly
    depends on a sample's noise. `per_sample=True` gives each sample its own, as the released code does, with fresh
    noise after a rejection. That favours some noise over other and BIASES the samples, badly in low dimension:
    it is here to be shown. Samples that are done wait for the slowest, and their calls count.

    Args:
        eps_abs, eps_rel: tolerances, in data units and relative. The paper's 0.0078 is a grey level of images in
            [-1, 1], whose sigma_data is about 0.5; None for as much relative to the denoiser's own `sigma_data`.
        safety, r: the paper's theta and r.
        first_step: step size of the first attempt, in t.
        Others as in `samplers.sample`; the trajectory (accepted steps + 2, n, *shape) only with one step size for all.
    Raises:
        ValueError: parameters out of range, a trajectory where each sample or chunk has its own levels.
        FloatingPointError: an error estimate that is not finite, a step size that rounding keeps from advancing.
    """
    eps_abs = 0.0156 * scale_of(denoiser) if eps_abs is None else eps_abs
    for name, value in (("eps_abs", eps_abs), ("eps_rel", eps_rel), ("safety", safety), ("r", r),
                        ("first_step", first_step)):
        _validate.positive(name, value)
    if first_step > 1:
        raise ValueError(f"first_step={first_step!r}: wanted a number in (0, 1]")
    if trajectory and (per_sample or (batch_size or len(x)) < len(x)):
        raise ValueError("trajectory=True: wanted per_sample=False and one chunk, for else each has levels of its own")
    sigmas = check_levels(x, sigmas)
    top, bottom = sigmas[0], sigmas[-2]
    report = Report() if report is None else report
    chunks: list[list[float]] = []  # the levels that each chunk visits

    def solve(denoise: Denoise, x: Tensor, advance: Advance) -> Tensor:
        def score(x: Tensor, sigma: Tensor) -> Tensor:
            return (denoise(x, sigma.flatten() if per_sample else sigma.squeeze()) - x) / sigma.square()

        shape = (len(x) if per_sample else 1, *[1] * (x.ndim - 1))
        t = x.new_ones(shape) if top > bottom and len(x) else x.new_zeros(shape)
        h, x_low, path, visited = first_step * t, x, [x], [float(top)]
        while bool((t > 0).any()):
            if bool(((t > 0) & (t - h >= t)).any()):
                given = f"eps_abs={eps_abs:g} and eps_rel={eps_rel:g}"
                raise FloatingPointError(f"the step size fell to 0: {given} are too small for {x.dtype}")
            sigma, after = (bottom * (top / bottom) ** time for time in (t, t - h))
            spent = sigma.square() - after.square()
            noise = spent.sqrt() * noise_like(x, generator)
            low = x + spent * score(x, sigma) + noise
            high = (low + x + spent * score(low, after) + noise) / 2
            delta = (eps_rel * torch.maximum(low.abs(), x_low.abs())).clamp(min=eps_abs)
            errors = ((low - high) / delta).square()
            error = (errors.flatten(1).mean(1) if per_sample else errors.mean()).sqrt().reshape(shape)
            if not bool(error.isfinite().all()):
                raise FloatingPointError("the error estimate is not finite: the denoiser gave a NaN, or far too much")
            accepted = error <= 1
            share = len(x) / shape[0] / total
            report.attempts += share * int((t > 0).sum())
            report.rejected += share * int(((t > 0) & ~accepted).sum())
            x, x_low = torch.where(accepted, high, x), torch.where(accepted, low, x_low)
            before, t = t, torch.where(accepted, t - h, t)
            h = torch.minimum(t, safety * h * error.clamp(min=1e-9) ** -r)
            advance(float((before - t).mean()))
            if bool(accepted.flatten()[0]) and bool(before.flatten()[0] > 0):
                visited.append(float(after.flatten()[0]))
                path.append(x)
        if not early_stop:
            x = denoise(x, bottom)
            visited.append(0.0)
            path.append(x)
        chunks.append(visited)
        return torch.stack(path) if trajectory else x

    total = max(len(x), 1)
    out = in_chunks(solve, denoiser, x, 1.0, label, progress, batch_size, report, dim=int(trajectory))
    report.levels = chunks[0]
    return out
