"""Self-checks for the tutorials' exercises: one line of text each, and never an exception.

`check.tweedie(f)` prints "exercise 2: not attempted yet" while `f` returns `...` or None, "exercise 2: correct",
or the first mismatch, and returns whether `f` is correct. The answers are in `tutorials/solutions.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minidistill.distributions import GaussianMixture, ring

Case = tuple[str, tuple[Any, ...], Any]  # what the case is, the arguments, the expected value


def one_call(f: Callable[..., Any]) -> bool:
    """00, exercise 1: f(denoiser, z, sigma) is one Euler step of the probability flow from sigma * z down to 0."""
    target, z = ring(8), _points(6)
    return _report(1, f, [(f"sigma = {sigma:g}", (target, z, sigma), target(sigma * z, sigma)) for sigma in (1.0, 3.0)])


def score_gap(f: Callable[..., Any]) -> bool:
    """00, exercise 2: f(teacher_x0, fake_x0, sigma) is s_p - s_q from the two denoised points, sigma (n,)."""
    p, q, sigma = _points(6), _points(6, seed=1), torch.tensor([0.1, 0.3, 0.5, 1.0, 2.0, 5.0])
    equal = torch.full((6,), 2.0)
    return _report(2, f, [
        ("equal denoisers", (p, p, sigma), torch.zeros(6, 2)),
        ("one noise level", (p, q, equal), (p - q) / 4),
        ("many noise levels", (p, q, sigma), (p - q) / sigma.square().unsqueeze(1)),
    ])


def mixture_score(f: Callable[..., Any]) -> bool:
    """01, exercise 1: f(x, means, stds, weights) is the score of sum_k w_k N(mu_k, s_k^2 I)."""
    means, weights, x = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 2.0]]), torch.tensor([0.5, 0.3, 0.2]), _points(6)
    cases: list[Case] = []
    for title, stds in (("equal stds", torch.full((3,), 0.7)), ("different stds", torch.tensor([0.4, 0.8, 1.5]))):
        cases.append((title, (x, means, stds, weights), GaussianMixture(means, stds, weights).score(x)))
    return _report(1, f, cases)


def tweedie(f: Callable[..., Any]) -> bool:
    """01, exercise 2: f(score, x, sigma) is E[x0 | x], where score is that of the noised law."""
    target, x = ring(3, std=0.5), _points(6)
    return _report(2, f, [
        (f"sigma = {sigma:g}", (target.noised(sigma).score, x, sigma), target(x, sigma)) for sigma in (1.0, 0.5, 2.0)
    ])


def langevin_share(f: Callable[..., Any]) -> bool:
    """01, exercise 3: f(start, weight) is the left mode's share after plain Langevin between far modes."""
    return _report(3, f, [
        (f"start = {start:g}, weight = {weight:g}", (start, weight), start)
        for start, weight in ((0.5, 0.8), (0.3, 0.8), (0.9, 0.1))
    ])


def stein_trace(f: Callable[..., Any]) -> bool:
    """02, exercise 1: f(field, x, noise, radius) is Stein's estimate (n,) of the field's divergence at x, (n, d)."""
    x, noise, matrix = _points(6), _points(6, seed=1) / 2, torch.tensor([[0.9, 0.2], [-0.5, 0.4]])
    cases: list[Case] = []
    for title, shift in (("linear field", 0), ("shifted linear field", 3)):
        field = lambda u, shift=shift: u @ matrix.T + shift  # noqa: E731
        cases.append((title, (field, x, noise, 0.1), torch.einsum("ni,ij,nj->n", noise, matrix, noise)))
    rise = (noise * ((x + 0.2 * noise).sin() - x.sin())).sum(1)
    return _report(1, f, [*cases, ("sine, radius = 0.2", (torch.sin, x, noise, 0.2), rise / 0.2)])


def best_share(f: Callable[..., Any]) -> bool:
    """02, exercise 2: f(target, denoising, covariance) is the share of the first in the mix of least variance."""
    return _report(2, f, [
        (f"variances {a:g} and {b:g}, covariance {c:g}", (a, b, c), (b - c) / (a + b - 2 * c))
        for a, b, c in ((2.0, 2.0, 0.0), (1.0, 3.0, 0.0), (24.0, 99.0, -1.0), (5.0, 0.5, -0.25))
    ])


def class_gradient(f: Callable[..., Any]) -> bool:
    """03, exercise 1: f(W, probabilities, label) is the gradient (n, d) of log softmax(W x + b)[label] in x."""
    W, x, label = torch.tensor([[1.0, 0.5], [-0.4, 2.0], [0.3, -1.0]]), _points(6), torch.tensor([0, 1, 2, 2, 1, 0])
    cases: list[Case] = []
    for title, logits in (("equal probabilities", torch.zeros(6, 3)), ("sure of the label", 40 * torch.eye(3)[label]),
                          ("in between", x @ W.T)):
        c = logits.softmax(1)
        cases.append((title, (W, c, label), W[label] - c @ W))
    return _report(1, f, cases)


def gauge_defect(f: Callable[..., Any]) -> bool:
    """03, exercise 2: f(jacobian, r, score) is div r + r . score, (n,), of a field r (n, d) with Jacobian (n, d, d)."""
    x, turn = _points(6), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    cases: list[Case] = []
    for title, A, score in (
        ("a rotation of N(0, I)", turn, -x), ("the score of N(0, I) itself", -torch.eye(2), -x),
        ("a shear", torch.tensor([[0.5, 2.0], [0.3, -0.2]]), _points(6, seed=1)),
    ):
        r = x @ A.T
        cases.append((title, (A.expand(6, 2, 2), r, score), A.trace() + (r * score).sum(1)))
    return _report(2, f, cases)


def velocity(f: Callable[..., Any]) -> bool:
    """04, exercise 1: f(x, x0, alpha, sigma, d_alpha, d_sigma) is E[dx_t / dt | x] for x0 = E[x0 | x], both (n, d)."""
    x0, e = _points(6), _points(6, seed=1)
    return _report(1, f, [
        (title, (alpha * x0 + sigma * e, x0, alpha, sigma, d_alpha, d_sigma), d_alpha * x0 + d_sigma * e)
        for title, alpha, sigma, d_alpha, d_sigma in (
            ("EDM", 1.0, 3.0, 0.0, 1.0), ("flow at t = 0.4", 0.6, 0.4, -1.0, 1.0),
            ("a quarter circle", 0.6, 0.8, -0.8, 0.6),
        )
    ])


def uniform_time_density(f: Callable[..., Any]) -> bool:
    """04, exercise 2: f(level) is the density of ln level at level = t / (1 - t) for t uniform on [0, 1]."""
    return _report(2, f, [(f"level = {s:g}", (s,), s / (1 + s) ** 2) for s in (1.0, 0.1, 0.5, 4.0)])


def normalised_ratio(f: Callable[..., Any]) -> bool:
    """15, exercise 1: f(ratio, level) is each ratio over the mean of those at its level; both (n,)."""
    ratio = torch.tensor([0.5, 4.0, 1.0, 0.1, 2.0, 6.0])
    cases: list[Case] = [("one level", (ratio, torch.zeros(6, dtype=torch.long)), ratio / ratio.mean())]
    for title, level in (("equal groups", [0, 1, 2, 0, 1, 2]), ("groups of 3, 2 and 1", [7, 2, 7, 2, 5, 7])):
        where = torch.tensor(level)
        means = torch.stack([ratio[where == one].mean() for one in level])
        cases.append((title, (ratio, where), ratio / means))
    return _report(1, f, cases)


def sim_gradient(f: Callable[..., Any]) -> bool:
    """15, exercise 2: f(y, residual, J_p, J_q) is the gradient in x0 of -2 y . (D_q - x0) at x = x0 + sigma e, with
    y = D_q - D_p and residual = D_q - x0, (n, d), and the Jacobians of both denoisers, (d, d)."""
    x0, x = _points(6).requires_grad_(), _points(6, seed=1)
    jacobian_p, jacobian_q = torch.tensor([[0.9, 0.2], [-0.1, 0.4]]), torch.tensor([[0.3, -0.5], [0.2, 0.7]])
    cases: list[Case] = []
    for title, j_p, j_q in (
        ("constant networks", 0 * jacobian_p, 0 * jacobian_q), ("equal Jacobians", jacobian_q, jacobian_q),
        ("different Jacobians", jacobian_p, jacobian_q),
    ):
        moved = x + x0 - x0.detach()
        fake = moved @ j_q.T + 1
        y = fake - moved @ j_p.T
        gradient = torch.autograd.grad(-2 * (y * (fake - x0)).sum(), x0)[0]
        cases.append((title, (y.detach(), (fake - x0).detach(), j_p, j_q), gradient))
    return _report(2, f, cases)


def c_out(f: Callable[..., Any]) -> bool:
    """16, exercise 1: f(c_skip, sigma, sigma_data) is the standard deviation of x0 - c_skip (x0 + sigma e)."""
    return _report(1, f, [
        (f"c_skip = {skip:g}, sigma = {sigma:g}", (skip, sigma, 0.5), math.hypot((1 - skip) * 0.5, skip * sigma))
        for skip, sigma in ((0.0, 2.0), (1.0, 2.0), (0.2, 1.0), (0.5, 0.5))
    ])


def ema_decay(f: Callable[..., Any]) -> bool:
    """16, exercise 2: f(halflife, batch_size) is the decay of an average of weights in one step, halflife in images."""
    return _report(2, f, [
        (f"halflife = {halflife}, batch_size = {size}", (halflife, size), 0.5 ** (size / halflife))
        for halflife, size in ((64, 64), (1000, 500), (300, 256), (500_000, 512))
    ])


def mirror(f: Callable[..., Any]) -> bool:
    """16, exercise 3: f(images, coins) mirrors those images (n, c, h, w) left to right whose coin (n,) is True."""
    images = torch.arange(48.0).reshape(4, 2, 2, 3)
    cases: list[Case] = []
    for title, coins in (("none", [False] * 4), ("all", [True] * 4), ("first and last", [True, False, False, True])):
        expected = torch.stack([image.flip(-1) if coin else image for image, coin in zip(images, coins, strict=True)])
        cases.append((title, (images, torch.tensor(coins)), expected))
    return _report(3, f, cases)


def noise_through(f: Callable[..., Any]) -> bool:
    """17, exercise 1: f(sigma_init, sigma_data) is the standard deviation of the noise in a new student's samples."""
    return _report(1, f, [
        (f"sigma_init = {sigma:g}, sigma_data = {data:g}", (sigma, data), sigma * data**2 / (sigma**2 + data**2))
        for sigma, data in ((0.5, 0.5), (2.5, 0.5), (1.0, 0.7), (80.0, 0.5))
    ])


def sid_loss(f: Callable[..., Any]) -> bool:
    """17, exercise 2: f(teacher_x0, fake_x0, x0, alpha) is SiD's loss (n,) of images, without its normaliser."""
    p, q, x0 = torch.randn(3, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    gap, step = (p - q).flatten(1), (q - x0).flatten(1)
    return _report(2, f, [
        (f"alpha = {a:g}", (p, q, x0, a), (gap * ((1 - a) * gap + step)).sum(1)) for a in (1.0, 0.5, 1.2)
    ])


def claims(rows: Sequence[tuple[str, str, bool | str]]) -> None:
    """Print rows of (claim of the paper, what we measured, whether it holds) as an aligned table."""
    table = [("claim of the paper", "what we measured", "holds?")]
    word = {True: "yes", False: "no"}
    table += [(claim, seen, holds if isinstance(holds, str) else word[holds]) for claim, seen, holds in rows]
    first, second = (max(len(row[i]) for row in table) for i in (0, 1))
    for claim, seen, holds in table:
        print(f"{claim:<{first}} | {seen:<{second}} | {holds}")


def _points(n: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def _report(number: int, f: Callable[..., Any], cases: Sequence[Case]) -> bool:
    verdict = _verdict(f, cases)
    print(f"exercise {number}: {verdict}")
    return verdict == "correct"


def _verdict(f: Callable[..., Any], cases: Sequence[Case]) -> str:
    for title, arguments, expected in cases:
        try:
            got = f(*(a.clone() if isinstance(a, Tensor) else a for a in arguments))
        except Exception as error:
            return f"{title}: raised {type(error).__name__}: {' '.join(str(error).split())}"
        if got is None or got is ...:
            return "not attempted yet"
        mismatch = _mismatch(got, expected)
        if mismatch:
            return f"{title}: {mismatch}"
    return "correct"


def _mismatch(got: Any, expected: Any) -> str:
    """The first difference in words, or "" if there is none."""
    want = torch.as_tensor(expected, dtype=torch.float64)
    try:
        have = torch.as_tensor(got).detach().to("cpu", torch.float64)
    except Exception:
        return f"expected numbers, got {type(got).__name__}"
    if have.shape != want.shape:
        return f"expected shape {tuple(want.shape)}, got {tuple(have.shape)}"
    wrong = ~torch.isclose(have, want, rtol=1e-3, atol=1e-4)
    if not wrong.any():
        return ""
    index = tuple(wrong.nonzero()[0].tolist())
    where = f" at index {list(index)}" if index else ""
    return f"expected {want[index]:.4g}{where}, got {have[index]:.4g}"
