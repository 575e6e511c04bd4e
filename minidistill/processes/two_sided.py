"""Stochastic interpolants between two laws: x_t = (1 - t) x0 + t x1 + gamma(t) z, from any law to any other.

With a Gaussian on one side this is one of the named processes (`interpolant`). With a mixture on both it is not: then
its marginals, its velocity and its score are exact here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill import _validate
from minidistill._random import normal
from minidistill.distributions import GaussianMixture

__all__ = ["TwoSided"]


@dataclass(frozen=True)
class TwoSided:
    """x_t = (1 - t) x0 + t x1 + gamma z, gamma^2 = latent t (1 - t), for x0 from `start`, x1 from `end` and normal z,
    all independent, t in [0, 1] (Albergo 2023).

    With b = E[d x_t / dt | x_t] and s the score of p_t, the ODE dx = b dt has the marginals p_t, and so has the SDE
    dX = (b + epsilon s) dt + sqrt(2 epsilon) dW for every epsilon >= 0. Raises ValueError for mixtures of different
    dimension and for latent <= 0.
    """

    start: GaussianMixture
    end: GaussianMixture
    latent: float = 1.0

    def __post_init__(self) -> None:
        _validate.positive("latent", self.latent)
        if self.start.shape != self.end.shape:
            raise ValueError(f"end has samples of shape {self.end.shape}; wanted those of start, {self.start.shape}")

    def gamma(self, t: Tensor) -> Tensor:
        """The standard deviation of the latent noise, shaped like t."""
        return (self.latent * t * (1 - t)).sqrt()

    def gamma_rate(self, t: Tensor) -> Tensor:
        """d gamma / dt; infinite at both ends."""
        return self.latent * (1 - 2 * t) / (2 * self.gamma(t))

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """n independent (x0, x1, z), each (n, d)."""
        x0, x1 = self.start.sample(n, generator), self.end.sample(n, generator)
        return x0, x1, normal(tuple(x0.shape), x0.device, x0.dtype, generator)

    def marginal(self, t: float) -> GaussianMixture:
        """The law of x_t: a mixture with a component for each pair of components."""
        t = _validate.number("t", t, 0, 1)
        p, q = self.start, self.end
        means = (1 - t) * p.means[:, None] + t * q.means
        covs = (1 - t) ** 2 * p.covs[:, None] + t**2 * q.covs
        covs = covs + self.latent * t * (1 - t) * torch.eye(means.shape[2]).to(covs)
        weights = p.weights[:, None] * q.weights
        return GaussianMixture(means.flatten(0, 1), covs.flatten(0, 1), weights.flatten())

    def score(self, x: Tensor, t: float) -> Tensor:
        """The score of the law of x_t at x (n, d)."""
        return self.marginal(t).score(x)

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """b = E[x1 - x0 + gamma' z | x_t = x], (n, d). Given a pair of components all is Gaussian: the mean of the rate
        and its covariance with x_t, (t C1 - (1 - t) C0 + gamma gamma' I), are plain."""
        law, p, q = self.marginal(t), self.start, self.end
        rate = (q.means - p.means[:, None]).flatten(0, 1)
        shared = t * q.covs - (1 - t) * p.covs[:, None]
        shared = (shared + self.latent * (1 - 2 * t) / 2 * torch.eye(rate.shape[1]).to(rate)).flatten(0, 1)
        gain = shared @ torch.linalg.inv(law.covs)  # (pairs, d, d)
        each = rate + torch.einsum("kij,nkj->nki", gain, x[:, None] - law.means)
        return torch.einsum("nk,nki->ni", law.responsibilities(x), each)
