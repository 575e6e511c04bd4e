"""Four ways to a number D_f(p || q), behind one function: `estimate(divergence, p, q, method)`.

| method        | needs                               | what it gives                                               |
|---------------|-------------------------------------|-------------------------------------------------------------|
| `grid`        | both densities, 1 to 3 dimensions   | the exact value, but for the mass outside the grid          |
| `monte_carlo` | both densities                      | unbiased in any dimension                                   |
| `variational` | samples of both                     | a lower bound: the best score of a trained critic           |
| `ratio`       | samples of both                     | f of a learned p / q: no bound, but one ratio serves every f |

A critic is a network v(x) that stands for log p(x) / q(x). It is trained on one part of the samples, stopped by a
second, and judged on a third, so the variational bound stays a bound however much it overfits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from minidistill import _validate
from minidistill.distributions import GaussianMixture
from minidistill.divergences.f_critics import CHUNK, cut, dual_values, learn_log_ratio, train_critic
from minidistill.divergences.f_divergences import LOG2, F, FDivergence

__all__ = [
    "METHODS", "MOST_POINTS", "Density", "Estimate", "Samples", "draw_samples", "dual_bound", "estimate",
    "kl_with_reference", "monte_carlo", "on_grid", "variational", "with_ratio",
]

MOST_POINTS = 10**9  # of a grid


class Samples(Protocol):
    """Anything that draws: `GaussianMixture`, `GaussianTeacher`, ..."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor: ...


class Density(Samples, Protocol):
    """Anything that draws and knows its density."""

    def log_prob(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Estimate:
    """A number in nats, with the standard error of its sampling (bias is not in it) and the draws it was made of.

    outside: the larger share of p's or q's mass that a grid misses; 0 for the other methods.
    """

    value: float
    standard_error: float
    n: int
    outside: float = 0.0

    def __float__(self) -> float:
        return self.value


def estimate(divergence: FDivergence, p: Any, q: Any, method: str = "grid", **options: Any) -> Estimate:
    """D_f(p || q) by one of `METHODS`, with that method's options. p and q are distributions (`.log_prob`,
    `.sample`), or samples (n, *shape) for `variational` and `ratio`. Raises ValueError for an unknown method, TypeError
    for a p or q that lacks what the method needs."""
    return _validate.choose("method", method, METHODS)(divergence, p, q, **options)


# ---------------------------------------------------------------------------------------------- densities are known


def on_grid(
    divergence: FDivergence,
    p: Density,
    q: Density,
    *,
    bounds: tuple[float | Sequence[float], float | Sequence[float]] | None = None,
    n_cells: int = 400,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Estimate:
    """The sum over a regular grid in float64: for smooth densities that vanish at its ends, exact to many digits.

    The number of dimensions is that of p's or q's `.shape`, and of the corners where neither has one.

    bounds: the lower and the upper corner, numbers or (d,); None for two Gaussian mixtures' means with 10 standard
        deviations around them. n_cells: along each axis; at most 10^9 points in all.
    device: of the points; None for the mixtures' own, and that of `bounds` where neither p nor q is one.
    """
    _need("p", p, "log_prob")
    _need("q", q, "log_prob")
    n_cells = _validate.whole("n_cells", n_cells, least=2)
    corners = [_validate.tensor("bounds", corner, torch.float64) for corner in bounds or ()]
    d = _dimensions(p, q, corners)
    if n_cells**d > MOST_POINTS:
        given = f"n_cells={n_cells} in {d} dimensions is {n_cells**d:.2g} points"
        raise ValueError(f"{given}; wanted {MOST_POINTS:g} at most")
    low, high = (corner.expand(d) for corner in corners or _box(p, q))
    if not bool((low < high).all()):
        raise ValueError(f"bounds={bounds!r}: wanted a lower corner below the upper one")
    p, q = (law.to(torch.float64) if isinstance(law, GaussianMixture) else law for law in (p, q))
    own = [law.means.device for law in (p, q) if isinstance(law, GaussianMixture)]
    device = torch.device(device) if device is not None else (own or [low.device])[0]
    axes = [torch.linspace(float(a), float(b), n_cells, dtype=torch.float64, device=device)
            for a, b in zip(low, high, strict=True)]
    cell = float(((high - low) / (n_cells - 1)).prod())
    value, mass_p, mass_q = 0.0, 0.0, 0.0
    for start in tqdm(range(0, n_cells**d, CHUNK), disable=not progress, desc="grid", leave=False, delay=2):
        number = torch.arange(start, min(start + CHUNK, n_cells**d), device=device)
        # The digits of a point's number in base n_cells are its places along the axes, the last axis first.
        x = torch.stack([axis[number // n_cells ** (d - 1 - k) % n_cells] for k, axis in enumerate(axes)], 1)
        log_p, log_q = p.log_prob(x), q.log_prob(x)
        value += float(_tangent_free(divergence, log_p, log_q).sum()) * cell
        mass_p, mass_q = mass_p + float(log_p.exp().sum()) * cell, mass_q + float(log_q.exp().sum()) * cell
    return Estimate(value, 0.0, n_cells**d, outside=max(0.0, 1 - mass_p, 1 - mass_q))


def monte_carlo(
    divergence: FDivergence,
    p: Density,
    q: Density,
    n: int = 100_000,
    generator: torch.Generator | None = None,
    *,
    proposal: Density | None = None,
) -> Estimate:
    """The mean of q f(p/q) / m over n draws of a proposal m, in log space.

    proposal: None for (p + q) / 2, half of the draws from each. Every ratio to it is at most 2, which keeps the values
        of both KLs logarithmic in the ratio; from draws of q alone forward KL's standard error may be infinite.
        A chi-squared that hides in far tails stays unseen by any of these, and its standard error is too small then.
    """
    n = _validate.whole("n", n, least=4)
    for name, law in (("p", p), ("q", q), *([("proposal", proposal)] if proposal else [])):
        _need(name, law, "log_prob", "sample")
    groups = []
    for law, count in ([(p, n - n // 2), (q, n // 2)] if proposal is None else [(proposal, n)]):
        values = []
        for x in law.sample(count, generator).split(CHUNK):
            log_p, log_q = p.log_prob(x), q.log_prob(x)
            log_m = torch.logaddexp(log_p, log_q) - LOG2 if proposal is None else proposal.log_prob(x)
            values.append(_tangent_free(divergence, log_p - log_m, log_q - log_m))
        groups.append(torch.cat(values))
    return _mean_of_groups(groups)


# ---------------------------------------------------------------------------------------------- samples alone


def variational(
    divergence: FDivergence,
    p: Tensor | Samples,
    q: Tensor | Samples,
    *,
    n: int = 20_000,
    held_out: float = 0.5,
    generator: torch.Generator | None = None,
    **training: Any,
) -> Estimate:
    """The dual sup_T E_p T - E_q f*(T) with a trained critic, on held-out samples: a lower bound in expectation
    (Nguyen 2010; the divergence of f-GAN and of Fan 2022).

    n: draws of each side where p and q are distributions. held_out: the share kept for the answer.
    generator: for draws, and to shuffle samples that are given; without it the last of them are held out, and they
    must come in random order.
    training: options of `train_critic`.
    """
    train, test = _split(p, q, n, held_out, generator)
    return dual_bound(divergence, train_critic(divergence, *train, **training), *test)


def with_ratio(
    divergence: FDivergence,
    p: Tensor | Samples,
    q: Tensor | Samples,
    *,
    log_ratio: Callable[[Tensor], Tensor] | None = None,
    n: int = 20_000,
    held_out: float = 0.5,
    generator: torch.Generator | None = None,
    **training: Any,
) -> Estimate:
    """f of a learned ratio, averaged over held-out samples of both sides as `monte_carlo` does with the exact one.

    log_ratio: x -> log p(x)/q(x), (n,); None learns it by `learn_log_ratio`, and all samples are the answer's if it is
        given. A wrong ratio errs to either side: this is no bound. held_out, generator: as in `variational`.
    """
    if log_ratio is None:
        train, test = _split(p, q, n, held_out, generator)
        log_ratio = learn_log_ratio(*train, **training)
    else:
        test = draw_samples("p", p, n, generator), draw_samples("q", q, n, generator)
    groups = []
    with torch.no_grad():
        for x in test:
            v = torch.cat([log_ratio(part) for part in x.split(CHUNK)])
            # p / m and q / m with m = (p + q) / 2 are 2 sigmoid(v) and 2 sigmoid(-v).
            p_m, q_m = (nn.functional.logsigmoid(w) + LOG2 for w in (v, -v))
            groups.append(_tangent_free(divergence, p_m, q_m))
    return _mean_of_groups(groups)


def kl_with_reference(
    samples_p: Tensor,
    q: Density,
    *,
    reference: Density | None = None,
    held_out: float = 0.5,
    generator: torch.Generator | None = None,
    **training: Any,
) -> Estimate:
    """KL(p || q) from samples of p and the density of q alone: sup_h 1 + E_p log(h g / q) - E_g h over a reference g
    of known density (Fan 2022, variational Wasserstein gradient flow). Its critic is that of KL(p || g), which a g
    close to p makes easy, where q may be far; a lower bound on held-out samples.

    reference: None for the Gaussian with the mean and the covariance of the samples that the critic is trained on.
    generator: for the reference's draws, and to shuffle the samples; without it they must come in random order.
    """
    _validate.samples("samples_p", samples_p, least=8)
    _need("q", q, "log_prob")
    train, test = cut(samples_p, held_out, generator)
    g = reference if reference is not None else _gaussian_fit(train)
    v = train_critic(F["forward_kl"], train, g.sample(len(train), generator), **training)
    of_g = g.sample(len(test), generator)
    with torch.no_grad():
        gain = 1 + v(test) + g.log_prob(test) - q.log_prob(test)
        return _difference(gain, v(of_g).exp())


def dual_bound(
    divergence: FDivergence, critic: Callable[[Tensor], Tensor], samples_p: Tensor, samples_q: Tensor
) -> Estimate:
    """E_p f'(e^v) - E_q f*(f'(e^v)) for a critic v(x), (n,): at most D_f(p || q), with equality at v = log p/q. The
    samples must not be those that the critic was trained on."""
    return _difference(*dual_values(divergence, critic, samples_p, samples_q))


METHODS: dict[str, Callable[..., Estimate]] = {
    "grid": on_grid, "monte_carlo": monte_carlo, "variational": variational, "ratio": with_ratio,
}


def _tangent_free(divergence: FDivergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """q f(p/q) - f'(1) (p - q): the same integral, but nowhere negative and without its first-order noise."""
    tilt = float(divergence.slope(torch.zeros((), dtype=torch.float64)))
    return divergence.perspective(log_p, log_q) - tilt * (log_p.exp() - log_q.exp())


def _mean_of_groups(groups: list[Tensor]) -> Estimate:
    """The average of the groups' means; each group is independent draws."""
    variance = sum(float(g.double().var()) / len(g) for g in groups) / len(groups) ** 2
    return Estimate(sum(float(g.double().mean()) for g in groups) / len(groups), variance**0.5, sum(map(len, groups)))


def _difference(gain: Tensor, cost: Tensor) -> Estimate:
    gain, cost = gain.double(), cost.double()
    variance = float(gain.var()) / len(gain) + float(cost.var()) / len(cost)
    return Estimate(float(gain.mean() - cost.mean()), variance**0.5, len(gain) + len(cost))


def _split(
    p: Tensor | Samples, q: Tensor | Samples, n: int, held_out: float, generator: torch.Generator | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(train_p, train_q), (test_p, test_q)."""
    (train_p, test_p), (train_q, test_q) = (
        cut(draw_samples(name, law, n, generator), held_out, generator if isinstance(law, Tensor) else None)
        for name, law in (("p", p), ("q", q))
    )
    return (train_p, train_q), (test_p, test_q)


def draw_samples(name: str, law: Tensor | Samples, n: int, generator: torch.Generator | None) -> Tensor:
    if not isinstance(law, Tensor):
        _need(name, law, "sample")
        n = _validate.whole("n", n)
        law = law.sample(n, generator)
    _validate.samples(name, law, least=8)
    return law


def _gaussian_fit(x: Tensor) -> GaussianMixture:
    return GaussianMixture(x.mean(0, keepdim=True), torch.cov(x.T).reshape(1, x.shape[1], x.shape[1]))


def _box(p: Density, q: Density) -> tuple[Tensor, Tensor]:
    low, high = [], []
    for name, law in (("p", p), ("q", q)):
        if not isinstance(law, GaussianMixture):
            raise ValueError(f"bounds: {name} is {type(law).__name__}, whose extent is not known; wanted (low, high)")
        reach = 10 * law.variances.sqrt()  # (k, d)
        low.append((law.means - reach).min(0).values.double().cpu())
        high.append((law.means + reach).max(0).values.double().cpu())
    return torch.stack(low).min(0).values, torch.stack(high).max(0).values


def _dimensions(p: Density, q: Density, corners: list[Tensor]) -> int:
    """Of the space that p and q live in; corners must be numbers, or have that many of them."""
    known = {name: math.prod(law.shape) for name, law in (("p", p), ("q", q)) if hasattr(law, "shape")}
    given = {corner.numel() for corner in corners if corner.ndim}
    if len(set(known.values())) > 1:
        raise ValueError(f"p has {known['p']} dimensions and q {known['q']}; wanted equal numbers")
    if not known and not given:
        raise ValueError("bounds: neither p nor q has a .shape that tells the number of dimensions; wanted corners "
                         "that do, ([low, ...], [high, ...])")
    d = next(iter(known.values()), max(given, default=1))
    if d > 3:
        raise ValueError(f"{next(iter(known), 'bounds')} has {d} dimensions; a grid wants 3 at most: "
                         "use method='monte_carlo'")
    if given - {d}:
        raise ValueError(f"bounds: a corner has {min(given - {d})} numbers; wanted {d}, one a dimension")
    return d


def _need(name: str, law: object, *methods: str) -> None:
    for method in methods:
        if not callable(getattr(law, method, None)):
            raise TypeError(f"{name} is {type(law).__name__}; wanted a distribution with .{method}(...)")
