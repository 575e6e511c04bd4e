"""Self-checks for the tutorials' exercises: one line of text each, and never an exception.

`check.tweedie(f)` prints "exercise 2: not attempted yet" while `f` returns `...` or None, "exercise 2: correct",
or the first mismatch, and returns whether `f` is correct. The answers are in `tutorials/solutions.py`.
"""

from __future__ import annotations

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
