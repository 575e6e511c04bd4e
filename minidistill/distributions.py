"""Exact targets: distributions whose samples, density, score and denoiser are all known.

A Gaussian mixture stays a Gaussian mixture under Gaussian noise, so at every noise level its density, its
score and its denoiser are closed formulas. That makes it the referee of the whole package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minidistill import _validate
from minidistill._random import home, normal

__all__ = [
    "MIXTURES", "SHAPES", "GaussianMixture", "checkerboard", "grid", "ring", "spirals", "swiss_roll", "two_moons",
]


class GaussianMixture:
    """sum_k w_k N(mu_k, Sigma_k) in d dimensions, with everything exact at every noise level.

    It is a denoiser, `mixture(x, sigma) = E[x0 | x]`, and so a teacher.

    Args:
        means: (k, d).
        stds_or_covs: standard deviations, one number or (k,), or covariances (k, d, d).
        weights: (k,) positive numbers, scaled to sum to 1; None for equal weights.
    Raises:
        ValueError: wrong shapes, non-finite values, weights or stds that are not positive, covariances
            that are not symmetric positive definite.
    """

    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]],
        stds_or_covs: float | Tensor | Sequence[float],
        weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        means = _validate.tensor("means", means)
        self.means = means if means.is_floating_point() else means.to(torch.get_default_dtype())
        _validate.samples("means", self.means)
        k, d = self.means.shape[0], self.means[0].numel()
        if self.means.ndim != 2:
            raise ValueError(f"means has shape {tuple(self.means.shape)}; wanted (k, d)")
        weights = torch.ones(k) if weights is None else weights
        weights = _validate.tensor("weights", weights, self.means.dtype, self.means.device)
        if weights.shape != (k,) or not torch.isfinite(weights).all() or not (weights > 0).all():
            raise ValueError(f"weights={weights.tolist()}: wanted {k} positive numbers")
        self.weights = weights / weights.sum()
        spread = _validate.tensor("stds_or_covs", stds_or_covs, self.means.dtype, self.means.device)
        _validate.finite("stds_or_covs", spread)
        # Noise adds sigma^2 to every eigenvalue and leaves the axes alone, so one eigendecomposition
        # serves all noise levels. `_axes is None` means that the axes are the coordinates'.
        self._axes: Tensor | None = None
        if spread.ndim <= 1 and spread.numel() in (1, k):
            if not (spread > 0).all():
                raise ValueError(f"stds_or_covs={spread.tolist()}: wanted standard deviations > 0")
            self._variances = spread.square().reshape(-1, 1).expand(k, 1)  # (k, 1): the same in all directions
        elif spread.shape == (k, d, d):
            if not torch.allclose(spread, spread.mT, rtol=1e-4):
                raise ValueError("stds_or_covs: wanted symmetric covariances")
            self._variances, self._axes = torch.linalg.eigh(spread)  # (k, d), (k, d, d)
            if not (self._variances > 0).all():
                raise ValueError(
                    "stds_or_covs: wanted positive definite covariances, but the smallest eigenvalue "
                    f"is {self._variances.min().item():g}"
                )
        else:
            raise ValueError(f"stds_or_covs has shape {tuple(spread.shape)}; wanted (), ({k},) or ({k}, {d}, {d})")

    def __repr__(self) -> str:
        many = "s" if self.n_components > 1 else ""
        return (f"GaussianMixture({self.n_components} component{many}, shape={self.shape}, "
                f"sigma_data={self.sigma_data:.4g})")

    @property
    def n_components(self) -> int:
        return len(self.means)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, (d,)."""
        return tuple(self.means.shape[1:])

    @property
    def mean(self) -> Tensor:
        """E[x], (d,)."""
        return self.weights @ self.means

    @property
    def covs(self) -> Tensor:
        """The components' covariances, (k, d, d): d times what the means take, and `variances` may do."""
        if self._axes is None:
            return torch.diag_embed(self._variances.expand_as(self.means))
        return (self._axes * self._variances.unsqueeze(-2)) @ self._axes.mT

    @property
    def variances(self) -> Tensor:
        """The variance of each coordinate in each component, the diagonals of `covs`, (k, d)."""
        if self._axes is None:
            return self._variances.expand_as(self.means)
        return torch.diagonal(self.covs, dim1=1, dim2=2)

    @property
    def sigma_data(self) -> float:
        """The root mean variance per dimension: the scale that EDM's preconditioning calls sigma_data."""
        second_moment = self.weights @ (self.means.square() + self.variances)
        variance = (second_moment - self.mean.square()).mean()
        if not variance > 1e-2 * second_moment.mean():  # far from the origin that difference is rounding
            variance = (self.weights @ ((self.means - self.mean).square() + self.variances)).mean()
        return float(variance.sqrt())

    def to(self, where: torch.dtype | torch.device) -> GaussianMixture:
        """The same mixture with another dtype or on another device."""
        return self._like(self.means.to(where), self._variances.to(where))

    def noised(self, sigma: float, scale: float = 1.0) -> GaussianMixture:
        """The law of `scale * x0 + sigma * e`: a mixture of the scaled means with sigma^2 more variance in every
        direction."""
        sigma = float(_validate.positive("sigma", sigma, strictly=False))
        if scale == 1:
            return self._like(self.means, self._variances + sigma**2)
        scale = float(_validate.positive("scale", scale, strictly=not sigma))
        return self._like(scale * self.means, scale**2 * self._variances + sigma**2)

    def _like(self, means: Tensor, variances: Tensor) -> GaussianMixture:
        out = object.__new__(GaussianMixture)
        out.means, out._variances = means, variances
        out.weights = self.weights.to(means)
        out._axes = None if self._axes is None else self._axes.to(means)
        return out

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n independent draws, (n, d); the same for the same generator state."""
        return self.sample_with_labels(n, generator)[0]

    def sample_with_labels(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws (n, d) and the component that each came from, (n,)."""
        n = _validate.whole("n", n, least=0)
        weights = self.weights.to(home(self.weights.device, generator))
        component = torch.multinomial(weights, n, replacement=True, generator=generator) if n else torch.zeros(0).long()
        component = component.to(self.means.device)
        e = normal((n, *self.shape), self.means.device, self.means.dtype, generator)
        step = e * self._variances[component].sqrt()
        if self._axes is not None:
            step = torch.einsum("nij,nj->ni", self._axes[component], step)
        return self.means[component] + step, component

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (n,) for x (n, d)."""
        self._check(x)
        return self._log_joint(x, None)[0].logsumexp(1)

    def distances(self, x: Tensor) -> Tensor:
        """From x (n, d) to every mean in that component's standard deviations (Mahalanobis's), (n, k)."""
        self._check(x)
        _, offset, variances = self._log_joint(x, None)
        return (offset.square() / variances).sum(-1).sqrt()

    def responsibilities(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """P(component | x at noise level sigma), (n, k)."""
        self._check(x)
        return self._log_joint(x, _validate.broadcast_sigma(sigma, x))[0].softmax(1)

    def score(self, x: Tensor) -> Tensor:
        """grad log p(x), (n, d), in x's dtype. For the score at noise level s use `mixture.noised(s).score`."""
        self._check(x)
        log_joint, offset, variances = self._log_joint(x, None)
        return self._mix(log_joint, self._turn(-offset / variances)).to(x.dtype)

    def denoise(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """E[x0 | x0 + sigma e = x], (n, d), in x's dtype (Tweedie; Efron 2011). With `label` (n,), the posterior mean
        given that x0 came from that component: the mixture as a class-conditional teacher."""
        self._check(x)
        log_joint, offset, noisy = self._log_joint(x, _validate.broadcast_sigma(sigma, x))
        # Each component shrinks towards its mean: mu + Sigma (Sigma + sigma^2)^-1 (x - mu).
        posterior_means = self.means + self._turn(offset * (self._variances / noisy))  # (n, k, d)
        if label is not None:
            label = _validate.labels("label", label, len(x), self.n_components)
            log_joint = torch.nn.functional.one_hot(label, self.n_components).to(log_joint).log()  # 0 or -infinity
        return self._mix(log_joint, posterior_means).to(x.dtype)

    __call__ = denoise

    def _check(self, x: Tensor) -> None:
        _validate.floats("x", x)
        if x.ndim != 2 or x.shape[1:] != self.means.shape[1:]:
            raise ValueError(f"x has shape {tuple(x.shape)}; wanted (n, {self.means.shape[1]})")

    def _log_joint(self, x: Tensor, sigma: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """log w_k N(x; mu_k, Sigma_k + sigma^2 I), (n, k), with what it was made of: the offsets x - mu_k in
        the components' own axes, (n, k, d), and the variances there, (k, d or 1) or (n, k, d or 1)."""
        offset = x.unsqueeze(1) - self.means  # (n, k, d)
        if self._axes is not None:
            offset = torch.einsum("kij,nki->nkj", self._axes, offset)
        variances = self._variances
        if sigma is not None:
            variances = variances + (sigma.square() if sigma.ndim == 0 else sigma.square().unsqueeze(-1))
        d = x.shape[1]
        log_det = variances.log().sum(-1) * (d / variances.shape[-1])
        # So far out that squares leave the range of numbers, all components are taken for equally likely.
        quadratic = (offset.square() / variances).sum(-1).clamp(max=torch.finfo(offset.dtype).max / 4)
        constant = self.weights.log() - 0.5 * d * math.log(2 * math.pi)
        return constant - 0.5 * (quadratic + log_det), offset, variances

    def _turn(self, vectors: Tensor) -> Tensor:
        """Vectors (n, k, d) from the components' own axes to the coordinates'."""
        return vectors if self._axes is None else torch.einsum("kij,nkj->nki", self._axes, vectors)

    @staticmethod
    def _mix(log_joint: Tensor, vectors: Tensor) -> Tensor:
        """sum_k P(k | x) v_k for vectors (n, k, d), (n, d)."""
        return (log_joint.softmax(1).unsqueeze(1) @ vectors).squeeze(1)


def ring(
    k: int = 8, radius: float = 2.0, std: float | Sequence[float] | Tensor = 0.2,
    weights: Sequence[float] | Tensor | None = None,
) -> GaussianMixture:
    """k Gaussians evenly spaced on a circle, the first at (radius, 0), counter-clockwise."""
    k, radius = _validate.whole("k", k), _validate.positive("radius", radius)
    angle = 2 * math.pi * torch.arange(k) / k
    return GaussianMixture(radius * torch.stack([angle.cos(), angle.sin()], 1), _std(std, k), weights)


def grid(
    n: int = 5, spacing: float = 1.0, std: float | Sequence[float] | Tensor = 0.1,
    weights: Sequence[float] | Tensor | None = None,
) -> GaussianMixture:
    """n x n Gaussians on a square lattice centred at the origin."""
    n, spacing = _validate.whole("n", n), _validate.positive("spacing", spacing)
    line = spacing * (torch.arange(n) - (n - 1) / 2)
    return GaussianMixture(torch.cartesian_prod(line, line).reshape(n * n, 2), _std(std, n * n), weights)


def _std(std: float | Sequence[float] | Tensor, k: int) -> Tensor:
    """The standard deviations, () or (k,); ValueError unless they are numbers > 0."""
    out = _validate.tensor("std", std, torch.get_default_dtype())
    if out.ndim > 1 or out.numel() not in (1, k) or not bool((out > 0).all() and out.isfinite().all()):
        raise ValueError(f"std={std!r}: wanted a finite number > 0, or {k} of them")
    return out


def two_moons(n: int, generator: torch.Generator | None = None, noise: float = 0.1) -> Tensor:
    """Two interleaved half circles of radius 1, about the origin, (n, 2)."""
    noise = _validate.positive("noise", noise, strictly=False)
    angle = math.pi * _uniform(n, generator)
    upper = _uniform(n, generator) < 0.5
    x = torch.stack([torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5,
                     torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25], 1)
    return x + noise * torch.randn(x.shape, generator=generator)


def swiss_roll(n: int, generator: torch.Generator | None = None, noise: float = 0.05) -> Tensor:
    """A spiral of one and a half turns, scaled to radius 2, (n, 2)."""
    noise = _validate.positive("noise", noise, strictly=False)
    angle = 1.5 * math.pi * (1 + 2 * _uniform(n, generator))
    radius = 2 * angle / (4.5 * math.pi)
    x = radius.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], 1)
    return x + noise * torch.randn(x.shape, generator=generator)


def checkerboard(n: int, generator: torch.Generator | None = None) -> Tensor:
    """The dark squares of a 4 x 4 board on [-2, 2]^2, uniformly, (n, 2)."""
    x = 4 * _uniform(n, generator) - 2
    row = 2 * torch.randint(2, x.shape, generator=generator) + x.floor().long() % 2 - 2
    return torch.stack([x, row + _uniform(n, generator)], 1)


def spirals(n: int, generator: torch.Generator | None = None, noise: float = 0.05) -> Tensor:
    """Two intertwined spirals of one turn and radius 2, (n, 2)."""
    noise = _validate.positive("noise", noise, strictly=False)
    t = _uniform(n, generator).sqrt()  # sqrt: points spread evenly along the arms
    angle = 2 * math.pi * t + math.pi * torch.randint(2, t.shape, generator=generator)
    x = (2 * t).unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], 1)
    return x + noise * torch.randn(x.shape, generator=generator)


def _uniform(n: int, generator: torch.Generator | None) -> Tensor:
    _validate.generator("generator", generator)
    return torch.rand(_validate.whole("n", n, least=0), generator=generator)


#: The exact targets and the sample-only shapes by name, as the command line knows them.
MIXTURES: dict[str, Callable[[], GaussianMixture]] = {"ring": ring, "grid": grid}
SHAPES: dict[str, Callable[..., Tensor]] = {
    "two_moons": two_moons, "swiss_roll": swiss_roll, "checkerboard": checkerboard, "spirals": spirals,
}
