"""What a denoiser's field looks like: its Jacobian, its trace, its curl, and whether any diffusion could have it.

A score is a gradient, so its Jacobian is symmetric, and the scores of one diffusion obey one partial differential
equation. A network knows neither; here are the measures and the penalties. The Jacobian is always J = dD/dx, in
denoiser form: the score (D - x) / sigma^2 has (J - I) / sigma^2. Everything is reverse mode (torch.func.vjp), twice
for J v: that is faster here than forward mode and asks less of the network. Attention is computed by its plain kernel
here, since the fused ones have no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minidistill import _validate
from minidistill._autodiff import differentiable, ordinary, vjp
from minidistill._random import home

__all__ = [
    "Denoise", "asymmetry", "basis", "call", "check_samples", "column", "conservative_penalty", "curl",
    "fokker_planck_loss", "fokker_planck_residual", "inner", "jacobian", "level", "local_step", "per_sample",
    "pullback", "rademacher", "trace", "value_and_gradient", "vmap",
]

Denoise = Callable[..., Tensor]
vmap = torch.func.vmap


def rademacher(x: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Random signs shaped like x: slices v with E v v' = I and the least variance of v'Jv (Hutchinson 1990)."""
    _validate.floats("x", x)
    return (2 * torch.randint(2, x.shape, generator=rng, device=home(x.device, rng)) - 1).to(x)


def pullback(
    denoiser: Denoise, x: Tensor, sigma: float | Tensor, label: Tensor | None = None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """D(x) and the map v -> J'v, both (n, *shape); one call of the denoiser, then one backward pass a v."""
    check_samples("x", x)
    out, pull = vjp(lambda u: call(denoiser, u, ordinary(sigma), label), x)
    return out, lambda v: pull(v)[0]


def jacobian(
    denoiser: Denoise, x: Tensor, sigma: float | Tensor, label: Tensor | None = None, chunk_size: int | None = None
) -> Tensor:
    """J[i, j] = dD_i / dx_j, (n, dim, dim), exactly, in dim backward passes run as one batch.

    `chunk_size` bounds how many of them share memory. Samples must not see each other (no batch norm).
    """
    _, pull = pullback(denoiser, x, sigma, label)
    with differentiable():
        return vmap(pull, chunk_size=chunk_size)(basis(x)).flatten(2).transpose(0, 1)


def trace(x: Tensor, pull: Callable[[Tensor], Tensor], slices: Tensor | None, chunk_size: int | None = None) -> Tensor:
    """tr J, (n,): Hutchinson's unbiased v'Jv with slices v (n, *shape), or exact in dim backward passes (None)."""
    if slices is not None:
        _validate.like("slices", slices, "x", x)
        return inner(slices, pull(slices))
    with differentiable():
        return vmap(lambda v: inner(v, pull(v)), chunk_size=chunk_size)(basis(x)).sum(0)


def asymmetry(
    denoiser: Denoise, x: Tensor, sigma: float | Tensor, label: Tensor | None = None, *, normalised: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """|J - J'|_F^2 / dim, (n,), exactly: what `conservative_penalty` estimates. 0 for the score of any density.

    `normalised`: |K - K'|^2 / (4 |K|^2) with the score's Jacobian K, from 0 (symmetric) to 1 (a pure rotation), the
    NAsym of Chao 2023 (QCSBM).
    """
    J = jacobian(denoiser, x, sigma, label, chunk_size)
    twist = (J - J.mT).square().sum((1, 2))
    if normalised:
        return twist / (4 * (J - torch.eye(J.shape[1]).to(J)).square().sum((1, 2)))
    return twist / J.shape[1]


def curl(denoiser: Denoise, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
    """ds_2/dx_1 - ds_1/dx_2 of the score s = (D - x) / sigma^2, (n,), for x (n, 2): twice the field's rate of turn."""
    s = level(x, sigma).flatten()
    if x[0].numel() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; wanted (n, 2), for curl is a number only in the plane")
    J = jacobian(denoiser, x, sigma, label)
    return (J[:, 1, 0] - J[:, 0, 1]) / s.square()


def conservative_penalty(
    denoiser: Denoise, x: Tensor, sigma: float | Tensor, slices: Tensor, label: Tensor | None = None,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """weight |J v - J'v|^2 / dim, (n,): unbiased for weight |J - J'|_F^2 / dim (Chao 2023, QCSBM).

    Times dim / (2 sigma^4) it is the paper's 1/2 |K - K'|_F^2 of the score's Jacobian K. The paper's own estimator
    |K'v|^2 - v'K K v has the same mean; this one is never negative, and exactly 0 where J is symmetric.
    """
    level(x, sigma, slices=slices)
    _, pull = pullback(denoiser, x, sigma, label)
    across, push = vjp(pull, slices)  # v -> J'v is linear, so its own transpose is v -> J v
    return per_sample((push(slices)[0] - across).square(), weight)


def fokker_planck_residual(
    denoiser: Denoise, x: Tensor, sigma: float | Tensor, label: Tensor | None = None, slices: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """dD/d ln sigma - sigma^2 grad tr J - 2 J'(D - x), (n, *shape), in units of x; 0 for the scores of a diffusion.

    It is sigma^3 times ds/d sigma - sigma grad(div s + |s|^2), the gradient of the Fokker-Planck equation of log p in
    EDM coordinates (Deveney 2023; Lai 2023). The gradient of the trace is exact, dim backward passes, or unbiased with
    slices (n, *shape); its square is then too large by the slices' variance (use the product of two residuals).
    """
    s = level(x, sigma)
    levels = s.flatten().expand(len(x)).contiguous()

    def scalar(u: Tensor) -> tuple[Tensor, Tensor]:
        out, pull = pullback(denoiser, u, levels, label)
        return trace(u, pull, slices, chunk_size), pull(out - u)

    value, pull_trace, transported = vjp(scalar, x, has_aux=True)
    (grad_trace,) = pull_trace(torch.ones_like(value))
    _, pull_level = vjp(lambda levels: call(denoiser, ordinary(x), levels, label), levels)
    _, push_level = vjp(pull_level, torch.zeros_like(x))
    (growth,) = push_level((levels,))  # dD/d sigma, times sigma
    return growth - s.square() * grad_trace - 2 * transported


def fokker_planck_loss(
    denoiser: Denoise, x: Tensor, sigma: float | Tensor, label: Tensor | None = None, slices: Tensor | None = None,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """weight R1 R2 / dim, (n,), with R of `fokker_planck_residual`: a penalty whose mean is weight |R|^2 / dim.

    slices are a pair (2, n, *shape), one for each factor, which keeps it unbiased (a sample's value may be negative);
    None for the exact |R|^2 / dim.
    """
    if slices is None:
        return per_sample(fokker_planck_residual(denoiser, x, sigma, label).square(), weight)
    check_samples("x", x)
    if slices.shape != (2, *x.shape):
        raise ValueError(f"slices has shape {tuple(slices.shape)}; wanted {(2, *x.shape)}, two for each sample")
    first, second = (fokker_planck_residual(denoiser, x, sigma, label, v) for v in slices)
    return per_sample(first * second, weight)


def local_step(
    x: Tensor, noise: Tensor, drift: Callable[[Tensor, float | Tensor], Tensor], diffusion: float, t: float | Tensor,
    step: float, *, linearised: bool = True,
) -> tuple[Tensor, Tensor]:
    """x_t after a short time `step` of dx = drift(x, t) dt + diffusion dW, and grad log p(x_t | x), both (n, *shape).

    `linearised`: the drift's first-order Taylor series at x makes the transition Gaussian with exact moments (Singhal
    2024); it takes a dim by dim matrix exponential a sample. Otherwise Euler-Maruyama, where the drift is constant.
    """
    check_samples("x", x)
    _validate.like("noise", noise, "x", x)
    _validate.positive("diffusion", diffusion)
    _validate.positive("step", step)
    field = drift(x, t)
    _validate.like("drift(x, t)", field, "x", x)
    if not linearised:
        width = diffusion * step**0.5
        return x + step * field + width * noise, -noise / width
    A = jacobian(lambda u, time, label: drift(u, time), x, t)  # (n, dim, dim)
    eye, zero = torch.eye(A.shape[1]).to(A).expand_as(A), torch.zeros_like(A)
    push = torch.cat([field.flatten(1)[:, :, None], zero[:, :, 1:]], 2)
    # Van Loan's integrals of matrix exponentials, here int e^{Au} f du and e^{-Ah} int e^{Au} g^2 e^{A'u} du.
    mean = _expm(A, push, zero, step)[0][:, :, 0]
    upper, lower = _expm(-A, diffusion**2 * eye, A.mT, step)
    cov = lower.mT @ upper
    factor = torch.linalg.cholesky((cov + cov.mT) / 2)
    e = noise.flatten(1)[:, :, None]
    score = -torch.linalg.solve_triangular(factor.mT, e, upper=True)
    return x + (mean + (factor @ e).squeeze(2)).reshape(x.shape), score.reshape(x.shape)


# ---------------------------------------------------------------------------------- what the losses share

def call(denoiser: Denoise, x: Tensor, sigma: float | Tensor, label: Tensor | None) -> Tensor:
    """D(x, sigma, label), shaped like x or an error: a wrong shape would be broadcast into a wrong loss. TypeError for
    a label that is neither a tensor nor None."""
    if label is not None and not isinstance(label, Tensor):
        raise TypeError(f"label is {type(label).__name__}; wanted a tensor ({len(x)},) or None")
    return _validate.denoised(denoiser(x, sigma, label), x)


def value_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x), (n,), and df/dx, (n, *shape), one sample a row."""
    value, pull = vjp(function, x)
    return value, pull(torch.ones_like(value))[0]


def per_sample(values: Tensor, weight: Tensor | float) -> Tensor:
    """weight times the mean over dimensions, (n,)."""
    if not isinstance(weight, Tensor):
        weight = _validate.number("weight", weight)
    elif weight.shape not in (torch.Size([]), values.shape[:1]):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; wanted a float or ({len(values)},)")
    elif weight.device.type == "cpu" and _validate.any_of(~weight.detach().isfinite()):
        raise ValueError("weight holds a NaN or infinite value; wanted finite numbers")
    return weight * values.flatten(1).mean(1)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a'b for each sample, (n,)."""
    return (a * b).flatten(1).sum(1)


def basis(x: Tensor) -> Tensor:
    """The dim unit vectors of one sample's space, (dim, n, *shape)."""
    dim = x.shape[1:].numel()
    return torch.eye(dim, dtype=x.dtype, device=x.device).reshape(dim, 1, *x.shape[1:]).expand(dim, *x.shape)


def check_samples(name: str, x: Tensor) -> None:
    """Raise unless x is floating and (n, *shape). Its values are not looked at: a GPU would have to wait."""
    _validate.floats(name, x)
    if x.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; wanted (n, d) or (n, *shape)")


def level(x: Tensor, sigma: float | Tensor, name: str = "x", **like: Tensor) -> Tensor:
    """Check x, sigma > 0 and the tensors that must be shaped like x; sigma, ready to multiply x."""
    check_samples(name, x)
    for other, value in like.items():
        _validate.like(other, value, name, x)
    return _validate.broadcast_sigma(sigma, x, positive=True)


def column(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    out = _validate.tensor(name, value, x.dtype, x.device)
    if out.shape not in (torch.Size([]), x.shape[:1]):
        raise ValueError(f"{name} has shape {tuple(out.shape)}; wanted a float or ({len(x)},), one a sample")
    if out.device.type == "cpu" and _validate.any_of(~out.detach().isfinite()):
        raise ValueError(f"{name} holds a NaN or infinite value; wanted finite numbers")
    return out.reshape(-1, *[1] * (x.ndim - 1))


def _expm(top: Tensor, corner: Tensor, bottom: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """The upper right and the lower right block of exp(step [[top, corner], [0, bottom]])."""
    d = top.shape[1]
    block = torch.cat([torch.cat([top, corner], 2), torch.cat([torch.zeros_like(top), bottom], 2)], 1)
    out = torch.linalg.matrix_exp(step * block)
    return out[:, :d, d:], out[:, d:, d:]
