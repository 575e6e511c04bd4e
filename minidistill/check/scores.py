"""Exercises of the notebooks 00 to 04."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from minidistill.check import ours
from minidistill.check._core import Case, Function, points, report
from minidistill.distributions import ring

__all__ = [
    "add_noise", "best_share", "bridge_velocity", "class_gradient", "denoising_loss",
    "euler_step", "even_weight", "gauge_defect", "langevin_share", "linear_step", "mixture_score", "one_call",
    "score_gap", "stein_trace", "step_score", "training_loop", "tweedie", "uniform_time_density", "velocity",
]


def one_call(f: Function) -> bool:
    """00, exercise 1: f(denoiser, z, sigma) is one Euler step of the probability flow from sigma * z down to 0."""
    target, z = ring(8), points(6)
    cases: list[Case] = [
        (f"sigma = {sigma:g}", (target, z, sigma), ours.one_call(target, z, sigma)) for sigma in (1.0, 3.0)
    ]
    return report(1, f, cases, hints={
        "the step starts at x = sigma z, not at z": lambda D, z, s: D(z, s),
        "the sign is wrong: the step is 0 - sigma long, and the slope is (x - D) / sigma":
            lambda D, z, s: 2 * s * z - D(s * z, s),
        "that is the slope; the step is x plus its length times the slope": lambda D, z, s: (s * z - D(s * z, s)) / s,
        "the slope is (x - D) / sigma: it is divided by sigma": lambda D, z, s: s * z - s * (s * z - D(s * z, s)),
    })


def score_gap(f: Function) -> bool:
    """00, exercise 2: f(teacher_x0, fake_x0, sigma) is s_p - s_q from the two denoised points, sigma (n,)."""
    p, q, sigma = points(6), points(6, seed=1), torch.tensor([0.1, 0.3, 0.5, 1.0, 2.0, 5.0])
    cases: list[Case] = [
        (title, (teacher_x0, fake_x0, level), ours.score_gap(teacher_x0, fake_x0, level))
        for title, teacher_x0, fake_x0, level in (
            ("equal denoisers", p, p, sigma), ("one noise level", p, q, torch.full((6,), 2.0)),
            ("many noise levels", p, q, sigma),
        )
    ]
    return report(2, f, cases, hints={
        "a score is (D - x) / sigma^2: divide by sigma^2, not by sigma": lambda p, q, s: (p - q) / s[:, None],
        "that is the gap of the denoisers; a score is (D - x) / sigma^2": lambda p, q, s: p - q,
    })


def add_noise(f: Function) -> bool:
    """01, exercise 2: f(x0, sigma, noise) is x0 (n, d) with noise (n, d) of the levels sigma (n,)."""
    x0, noise, sigma = points(6), points(6, seed=1), torch.tensor([0.1, 0.3, 0.5, 1.0, 2.0, 5.0])
    pair = torch.tensor([0.5, 3.0])
    return report(2, f, [
        ("no noise", (x0, 0 * sigma, noise), x0),
        ("many noise levels", (x0, sigma, noise), ours.add_noise(x0, sigma, noise)),
        ("two samples in the plane", (x0[:2], pair, noise[:2]), ours.add_noise(x0[:2], pair, noise[:2])),
    ], hints={
        "the noise's standard deviation is sigma, its variance sigma^2":
            lambda x0, s, e: ours.add_noise(x0, s.sqrt(), e),
        "the noise is added to x0, which is not scaled": lambda x0, s, e: s[:, None] * (x0 + e),
    })


def mixture_score(f: Function) -> bool:
    """01, exercise 1: f(x, means, stds, weights) is the score of sum_k w_k N(mu_k, s_k^2 I)."""
    means, weights, x = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 2.0]]), torch.tensor([0.5, 0.3, 0.2]), points(6)
    cases: list[Case] = []
    for title, stds in (("equal stds", torch.full((3,), 0.7)), ("different stds", torch.tensor([0.4, 0.8, 1.5]))):
        cases.append((title, (x, means, stds, weights), ours.mixture_score(x, means, stds, weights)))
    wide = torch.cat([x, points(6, seed=1)[:, :1]], 1), torch.cat([means, means[:, :1]], 1), stds, weights
    cases.append(("three dimensions", wide, ours.mixture_score(*wide)))
    far = x + 100, means, stds, weights
    cases.append(("points far out, where every e^(...) is 0", far, ours.mixture_score(*far)))

    def without_normaliser(x: Tensor, means: Tensor, stds: Tensor, weights: Tensor) -> Tensor:
        return ours.mixture_score(x, means, stds, weights * stds ** x.shape[1])

    return report(1, f, cases, hints={
        "a Gaussian's density is divided by s^d, which no longer cancels": without_normaliser,
        "s^d, where d is the dimension of x": lambda x, m, s, w: ours.mixture_score(x, m, s, w * s ** (x.shape[1] - 2)),
        "a Gaussian's density is divided by s^d, not by s":
            lambda x, m, s, w: ours.mixture_score(x, m, s, w * s ** (x.shape[1] - 1)),
        "the weights w_k are part of the responsibilities":
            lambda x, m, s, w: ours.mixture_score(x, m, s, torch.ones_like(w)),
    })


def tweedie(f: Function) -> bool:
    """01, exercise 3: f(score, x, sigma) is E[x0 | x], where score is that of the noised law."""
    target, x = ring(3, std=0.5), points(6)
    return report(3, f, [
        (f"sigma = {sigma:g}", (target.noised(sigma).score, x, sigma), target(x, sigma)) for sigma in (1.0, 0.5, 2.0)
    ], hints={
        "the score is multiplied by the variance sigma^2, not by sigma": lambda score, x, s: x + s * score(x),
        "the denoised point lies up the score from x: add x": lambda score, x, s: s**2 * score(x),
        "towards the data is along the score, not against it": lambda score, x, s: x - s**2 * score(x),
    })


def euler_step(f: Function) -> bool:
    """01, exercise 4: f(denoiser, x, sigma, after) is one Euler step of the probability flow to the level after it."""
    target, x = ring(3, std=0.5), points(6)
    return report(4, f, [
        (f"from {sigma:g} to {after:g}", (target, x, sigma, after), ours.euler_step(target, x, sigma, after))
        for sigma, after in ((1.0, 0.0), (2.0, 1.5), (0.5, 0.1))
    ], hints={
        "the sign is wrong: the step is after - sigma long, which is negative, and the slope is (x - D) / sigma":
            lambda D, x, s, t: x + (s - t) * (x - D(x, s)) / s,
        "that is a step all the way to level 0; it ends at the level `after`": lambda D, x, s, t: D(x, s),
        "the slope is that at `sigma`, where x is, so it is divided by sigma":
            lambda D, x, s, t: x + (t - s) * (x - D(x, s)) / (t or s),
        "the slope is (x - D) / sigma: it is divided by sigma": lambda D, x, s, t: x + (t - s) * (x - D(x, s)),
        "that is the slope; the step is x plus its length times the slope": lambda D, x, s, t: (x - D(x, s)) / s,
    })


def langevin_share(f: Function) -> bool:
    """01, exercise 5: f(start, weight) is the left mode's share after plain Langevin between far modes."""
    return report(5, f, [
        (f"start = {start:g}, weight = {weight:g}", (start, weight), start)
        for start, weight in ((0.5, 0.8), (0.3, 0.8), (0.9, 0.1))
    ], hints={
        "that is where endless runs end; how would a walker cross the gap? On each side the score knows nothing of the "
        "weights": lambda start, weight: weight,
        "nothing draws all walkers to one side": lambda start, weight: 1.0,
        "each walker stays near where it began, whatever the weights": lambda start, weight: start * weight,
    })


def denoising_loss(f: Function) -> bool:
    """02, exercise 1: f(denoiser, x0, sigma, noise) is |D(x0 + sigma e, sigma) - x0|^2 / d, (n,)."""
    target, x0, noise = ring(3, std=0.5), points(6), points(6, seed=1)
    sigma = torch.tensor([0.1, 0.3, 0.5, 1.0, 2.0, 5.0])

    def clean(D: Any, x0: Tensor, s: Tensor, e: Tensor) -> Tensor:
        return (D(x0, s) - x0).square().mean(1)

    scale = torch.ones((), requires_grad=True)

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return scale * target(x, sigma)

    @functools.wraps(f)
    def with_gradient(denoiser: Any, x0: Tensor, sigma: Tensor, noise: Tensor) -> Any:
        loss = f(network, x0, sigma, noise)
        if isinstance(loss, Tensor) and not loss.requires_grad:
            raise TypeError("expected a loss with a gradient: nothing is to be detached, nor done under no_grad()")
        return loss

    return report(1, with_gradient, [
        ("one noise level", (target, x0, torch.ones(6), noise), ours.denoising_loss(target, x0, torch.ones(6), noise)),
        ("many noise levels", (target, x0, sigma, noise), ours.denoising_loss(target, x0, sigma, noise)),
    ], hints={
        "the denoiser is called on the noised x0 + sigma e, not on x0": clean,
        "the target is the clean x0, not the noised x": lambda D, x0, s, e: (
            (D(ours.add_noise(x0, s, e), s) - ours.add_noise(x0, s, e)).square().mean(1)),
        "the target is the clean x0; the noise is what a noise predictor returns": lambda D, x0, s, e: (
            (D(ours.add_noise(x0, s, e), s) - e).square().mean(1)),
        "a square is missing": lambda D, x0, s, e: (D(ours.add_noise(x0, s, e), s) - x0).abs().mean(1),
        "averaged over the d coordinates, not summed: `.mean(1)`":
            lambda D, x0, s, e: 2 * ours.denoising_loss(D, x0, s, e),
        "that is the score's squared error; the denoiser's has no factor 1 / sigma^4":
            lambda D, x0, s, e: ours.denoising_loss(D, x0, s, e) / s**4,
    })


def training_loop(f: Function) -> bool:
    """02, exercise 2: f(loss, optimizer, steps) minimises loss() and returns the list of its values. Tried on
    |w|^2 / 2, which gradient descent makes smaller by the same factor in each step."""
    def start(rate: float = 0.5, steps: int = 5) -> tuple[Any, ...]:
        w = torch.tensor([3.0, -1.0], requires_grad=True)
        return lambda: w.square().sum() / 2, torch.optim.SGD([w], rate), steps

    def descend(loss: Any, optimizer: Any, steps: int, *, forget: bool = False, step: bool = True) -> list[float]:
        losses = []
        for _ in range(steps):
            value = loss()
            value.backward()
            if step:
                optimizer.step()
            if not forget:
                optimizer.zero_grad()
            losses.append(value.item())
        return losses

    @functools.wraps(f)
    def floats(loss: Any, optimizer: Any, steps: int) -> Any:
        losses = f(loss, optimizer, steps)
        if isinstance(losses, (float, Tensor)):
            raise TypeError("expected the list of all losses, one a step, got one number")
        if isinstance(losses, list) and any(isinstance(value, Tensor) for value in losses):
            raise TypeError("the list holds tensors; wanted floats, as loss.item() gives them")
        return losses

    return report(2, floats, [
        ("five steps on |w|^2 / 2", start, descend(*start())),
        ("one step", lambda: start(0.1, 1), descend(*start(0.1, 1))),
    ], hints={
        "gradients of earlier steps pile up: call optimizer.zero_grad()":
            lambda loss, o, n: descend(loss, o, n, forget=True),
        "the weights never change: call optimizer.step() after backward(), and zero_grad() not between the two":
            lambda loss, o, n: descend(loss, o, n, step=False),
    })


def even_weight(f: Function) -> bool:
    """02, exercise 3: f(sigma, sigma_data) is 1 / Var(x0 | x) for x0 from N(0, sigma_data^2), (n,)."""
    sigma = torch.tensor([0.1, 0.3, 0.5, 1.0, 2.0, 5.0])
    return report(3, f, [
        (f"sigma_data = {data:g}", (sigma, data), ours.even_weight(sigma, data)) for data in (0.5, 1.0, 2.0)
    ], hints={
        "that is the variance; the weight is one over it": lambda s, d: 1 / ours.even_weight(s, d),
        "one over the variance, not over the standard deviation": lambda s, d: ours.even_weight(s, d).sqrt(),
        "that is one over the variance of x; wanted that of x0, once x is known": lambda s, d: 1 / (s**2 + d**2),
        "the data's own variance counts too: x0 is known before x is seen, to sigma_data": lambda s, d: 1 / s**2,
        "two Gaussian factors are multiplied, N(x0; 0, sigma_data^2) and N(x; x0, sigma^2): their exponents add":
            lambda s, d: (s**2 + d**2) / s**4,
    })


def stein_trace(f: Function) -> bool:
    """02b, exercise 1: f(field, x, noise, radius) is Stein's estimate (n,) of the field's divergence at x, (n, d)."""
    x, noise, matrix = points(6), points(6, seed=1) / 2, torch.tensor([[0.9, 0.2], [-0.5, 0.4]])
    cases: list[Case] = []
    for title, shift in (("linear field", 0), ("shifted linear field", 3)):
        field = lambda u, shift=shift: u @ matrix.T + shift  # noqa: E731
        cases.append((title, (field, x, noise, 0.1), torch.einsum("ni,ij,nj->n", noise, matrix, noise)))
    rise = (noise * ((x + 0.2 * noise).sin() - x.sin())).sum(1)
    return report(1, f, [*cases, ("sine, radius = 0.2", (torch.sin, x, noise, 0.2), rise / 0.2)], hints={
        "subtract the field at x": lambda s, x, e, r: (e * s(x + r * e)).sum(1) / r,
    })


def best_share(f: Function) -> bool:
    """02b, exercise 2: f(target, denoising, covariance) is the share of the first in the mix of least variance."""
    return report(2, f, [
        (f"variances {a:g} and {b:g}, covariance {c:g}", (a, b, c), (b - c) / (a + b - 2 * c))
        for a, b, c in ((2.0, 2.0, 0.0), (1.0, 3.0, 0.0), (24.0, 99.0, -1.0), (5.0, 0.5, -0.25))
    ])


def class_gradient(f: Function) -> bool:
    """03, exercise 1: f(W, probabilities, label) is the gradient (n, d) of log softmax(W x + b)[label] in x."""
    W, x, label = torch.tensor([[1.0, 0.5], [-0.4, 2.0], [0.3, -1.0]]), points(6), torch.tensor([0, 1, 2, 2, 1, 0])
    cases: list[Case] = []
    for title, logits in (("equal probabilities", torch.zeros(6, 3)), ("sure of the label", 40 * torch.eye(3)[label]),
                          ("in between", x @ W.T)):
        c = logits.softmax(1)
        cases.append((title, (W, c, label), W[label] - c @ W))
    return report(1, f, cases, hints={
        "that is the gradient of the logit; the normaliser has one too": lambda W, c, y: W[y],
        "the mean row weighs each row of W by its probability": lambda W, c, y: W[y] - W.mean(0),
        "the logarithm of c, not c itself": lambda W, c, y: (
            c[torch.arange(len(y)), y][:, None] * (W[y] - c @ W)),
    })


def gauge_defect(f: Function) -> bool:
    """03, exercise 2: f(jacobian, r, score) is div r + r . score, (n,), of a field r (n, d) with Jacobian (n, d, d)."""
    x, turn = points(6), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    cases: list[Case] = []
    for title, A, score in (
        ("a rotation of N(0, I)", turn, -x), ("the score of N(0, I) itself", -torch.eye(2), -x),
        ("a shear", torch.tensor([[0.5, 2.0], [0.3, -0.2]]), points(6, seed=1)),
    ):
        r = x @ A.T
        cases.append((title, (A.expand(6, 2, 2), r, score), A.trace() + (r * score).sum(1)))
    return report(2, f, cases, hints={
        "the divergence is the trace of the Jacobian, not the sum of all its entries":
            lambda J, r, s: J.sum((1, 2)) + (r * s).sum(1),
        "the product with the score is missing": lambda J, r, s: J.diagonal(dim1=1, dim2=2).sum(1),
    })


def step_score(f: Function) -> bool:
    """03b, exercise 1: f(after, before, drift, g, step) is the score at `after` of N(before + drift step, g^2 step)."""
    before, e = points(6), points(6, seed=1)
    return report(1, f, [
        (title, (after, before, force, g, step), -(after - before - force * step) / (g**2 * step))
        for title, force, g, step, after in (
            ("no drift, g = 1", 0 * before, 1.0, 0.1, before + 0.3 * e),
            ("a spring", -before, 1.0, 0.1, before + 0.3 * e),
            ("a spring, g = 0.5, longer", -before, 0.5, 0.4, before + e),
        )
    ], hints={
        "the mean of the step is before + drift step": lambda a, b, f, g, h: -(a - b) / (g**2 * h),
        "divide by the variance g^2 step, not by the standard deviation":
            lambda a, b, f, g, h: -(a - b - f * h) / (g * h**0.5),
        "the noise of a step has the variance g^2 step": lambda a, b, f, g, h: -(a - b - f * h) / (g * h),
        "the score points from `after` back to the mean: turn the sign": lambda a, b, f, g, h: (
            (a - b - f * h) / (g**2 * h)),
    })


def linear_step(f: Function) -> bool:
    """03b, exercise 2: f(x, drift, slope, g, step) is (mean, variance) of dx = (drift + slope (x - x_s)) dt + g dW."""
    x, force = points(6)[:, :1], points(6, seed=1)[:, :1]
    down, up = torch.full_like(x, -1.5), torch.linspace(0.5, 2.0, 6)[:, None]

    def euler(x: Tensor, drift: Tensor, slope: Tensor, g: float, step: float) -> tuple[Tensor, Tensor]:
        return x + drift * step, torch.full_like(x, g**2 * step)

    return report(2, f, [
        (title, (x, force, slope, g, step), ours.linear_step(x, force, slope, g, step))
        for title, slope, g, step in (
            ("a falling drift", down, 1.0, 0.2), ("a rising one, g = 0.5", up, 0.5, 0.4),
            ("a long step", down, 1.0, 4.0),
        )
    ], hints={
        "that is Euler's step: the drift changes along the way, by slope (x - x_s)": euler,
        "the variance is wanted, not the standard deviation": lambda x, f, J, g, h: (
            ours.linear_step(x, f, J, g, h)[0], ours.linear_step(x, f, J, g, h)[1].sqrt()),
        "the variance grows at the rate 2 slope v + g^2: mind the 2": lambda x, f, J, g, h: (
            ours.linear_step(x, f, J, g, h)[0], g**2 * torch.expm1(J * h) / J),
        "the mean starts at x_s": lambda x, f, J, g, h: (
            ours.linear_step(x, f, J, g, h)[0] - x, ours.linear_step(x, f, J, g, h)[1]),
    })


def velocity(f: Function) -> bool:
    """04, exercise 1: f(x, x0, alpha, sigma, d_alpha, d_sigma) is E[dx_t / dt | x] for x0 = E[x0 | x], both (n, d)."""
    x0, e = points(6), points(6, seed=1)
    return report(1, f, [
        (title, (alpha * x0 + sigma * e, x0, alpha, sigma, d_alpha, d_sigma), d_alpha * x0 + d_sigma * e)
        for title, alpha, sigma, d_alpha, d_sigma in (
            ("EDM", 1.0, 3.0, 0.0, 1.0), ("flow at t = 0.4", 0.6, 0.4, -1.0, 1.0),
            ("a quarter circle", 0.6, 0.8, -0.8, 0.6),
        )
    ], hints={
        "the noise that x and x0 imply is (x - alpha x0) / sigma: x0 is scaled by alpha":
            lambda x, x0, a, s, da, ds: da * x0 + ds * (x - x0) / s,
        "what is left of x is sigma e: divide it by sigma": lambda x, x0, a, s, da, ds: da * x0 + ds * (x - a * x0),
        "that is flow's velocity, e - x0: the rates are d_alpha and d_sigma":
            lambda x, x0, a, s, da, ds: (x - a * x0) / s - x0,
    })


def uniform_time_density(f: Function) -> bool:
    """04, exercise 2: f(level) is the density of ln level at level = t / (1 - t) for t uniform on [0, 1]."""
    return report(2, f, [(f"level = {s:g}", (s,), s / (1 + s) ** 2) for s in (1.0, 0.1, 0.5, 4.0)], hints={
        "that is the density of the level; ln level's is `level` times as large": lambda s: 1 / (1 + s) ** 2,
        "that is t itself, the share of levels below": lambda s: s / (1 + s),
        "divide by d ln level / dt = 1 / t + 1 / (1 - t), do not multiply": lambda s: (1 + s) ** 2 / s,
    })


def bridge_velocity(f: Function) -> bool:
    """04b, exercise 1: f(x0, x1, z, t) is d x_t / dt of x_t = (1 - t) x0 + t x1 + sqrt(t (1 - t)) z for t (n, 1)."""
    x0, x1, z, times = points(6), points(6, seed=1), points(6, seed=2), torch.tensor([0.1, 0.3, 0.5, 0.6, 0.8, 0.95])
    return report(1, f, [
        (title, (x0, x1, z, t[:, None]), ours.bridge_velocity(x0, x1, z, t[:, None]))
        for title, t in (("t = 0.5", torch.full((6,), 0.5)), ("t = 0.2", torch.full((6,), 0.2)), ("many times", times))
    ], hints={
        "gamma depends on t too: add its derivative times z": lambda x0, x1, z, t: x1 - x0,
        "gamma itself is not its derivative": lambda x0, x1, z, t: x1 - x0 + (t * (1 - t)).sqrt() * z,
        "that is the derivative of gamma^2; gamma's is that over 2 gamma": lambda x0, x1, z, t: (
            x1 - x0 + (1 - 2 * t) * z),
        "the derivative of a square root has a 2 below": lambda x0, x1, z, t: (
            x1 - x0 + (1 - 2 * t) / (t * (1 - t)).sqrt() * z),
        "t runs from x0 to x1": lambda x0, x1, z, t: ours.bridge_velocity(x1, x0, z, t),
    })
