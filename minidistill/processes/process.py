"""One forward process, by its alpha(t) and sigma(t): all that follows from these two curves.

Every Gaussian forward process is `x_t = alpha(t) x0 + sigma(t) e`, e ~ N(0, I), t running from data to noise. Divided
by alpha it is `x = x0 + level e`, level = sigma / alpha (Karras 2022, section 2): processes differ in a clock,
level(t), and a scale, alpha(t), and in nothing else. In order: the SDE with these marginals, times for training, the
way to EDM coordinates and back, predictions and their losses, and how far a process ends from its prior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill import _validate
from minidistill._autodiff import derivative
from minidistill.distributions import GaussianMixture
from minidistill.processes.conversions import FROM_PAIR, convert

__all__ = ["Curve", "Process", "prior_kl", "uniform"]

Curve = Callable[[Tensor], Tensor]  # elementwise: any shape in, the same shape out


@dataclass(frozen=True)
class Process:
    """x_t = alpha(t) x0 + sigma(t) e for t in [t_min, t_max].

    Attributes:
        alpha, sigma: signal scale and noise std at t, elementwise.
        time: the inverse of `level`, which rises with t.
        variance: sigma^2, given where its root has an infinite slope at t = 0, and so no usable derivative there.
        prior_std: std of the Gaussian that stands in for p(x_T); None for sigma(T).
        quantile: u in (0, 1) -> t, the law of t that this process is usually trained with; None for uniform.
    """

    name: str
    alpha: Curve
    sigma: Curve
    time: Curve
    t_min: float
    t_max: float
    variance: Curve | None = None
    prior_std: float | None = None
    quantile: Curve | None = None

    def level(self, t: Tensor) -> Tensor:
        """sigma / alpha, the noise level in EDM coordinates; infinite where alpha is 0."""
        return self.sigma(t) / self.alpha(t)

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2); infinite where either is 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(d alpha / dt, d sigma / dt)."""
        return derivative(self.alpha, t), derivative(self.sigma, t)

    def drift(self, t: Tensor) -> Tensor:
        """f(t) of dx = f(t) x dt + g(t) dW: f = d log alpha / dt (Kingma 2021, equation 5). ValueError where it is
        infinite, at alpha = 0."""
        _validate.floats("t", t)
        return self._finite("drift", t, derivative(lambda u: self.alpha(u).log(), t))

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) of the same SDE: g^2 = d sigma^2 / dt - 2 f sigma^2. No linear SDE has any other g."""
        _validate.floats("t", t)
        growth = derivative(self.variance or (lambda u: self.sigma(u).square()), t)
        g = (growth - 2 * self.drift(t) * self.sigma(t).square()).clamp(min=0).sqrt()
        return self._finite("diffusion", t, g)

    def prior(self, t: float | None = None) -> tuple[float, float]:
        """(mean, std) per coordinate of the Gaussian that sampling starts from at time t (None: t_max)."""
        at = self._clock(self.t_max if t is None else t, torch.zeros(1, dtype=torch.float64))
        return 0.0, self.prior_std or float(self.sigma(at))

    def sample_time(self, n: int, rng: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """n times for training, (n,), from the process's usual law: see each process below."""
        n = _validate.whole("n", n, least=0)
        _validate.generator("rng", rng)
        u = torch.rand(n, generator=rng, device=device).clamp(min=2.0**-25)  # never 0, whose time is an end
        return (self.quantile or uniform(self.t_min, self.t_max))(u)

    def to_edm(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(x_t, t) -> (x_t / alpha, sigma / alpha), the same point in EDM coordinates. Where alpha is 0 (the end of
        cosine and flow) there is no such point; it is taken at alpha = machine epsilon, where every D is E[x0]."""
        t = self._clock(t, x)
        alpha = self.alpha(t).clamp(min=torch.finfo(x.dtype).eps)
        level = self.sigma(t) / alpha
        return x / alpha, level.reshape(-1) if level.ndim else level

    def from_edm(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """(x, sigma) in EDM coordinates -> (x_t, t), t shaped like sigma. ValueError: a level the process lacks."""
        _validate.floats("x", x)
        sigma = _validate.tensor("sigma", sigma, x.dtype, x.device)
        _validate.broadcast_sigma(sigma, x)
        t = self.time(sigma)
        nearest = t.clamp(self.t_min, self.t_max)  # rounding may step over an end
        slack = 64 * torch.finfo(x.dtype).eps * (self.t_max - self.t_min)
        if not bool(((t - nearest).abs() <= slack).all()):
            ends = self.level(sigma.new_tensor([self.t_min, self.t_max])).tolist()
            raise self._outside("sigma", sigma, "levels", ends)
        return x * self.alpha(self._clock(nearest, x)), nearest

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """alpha(t) x0 + sigma(t) noise, for t a float or (n,)."""
        t = self._clock(t, x0)
        return self.alpha(t) * x0 + self.sigma(t) * noise

    def convert(self, prediction: Tensor, x: Tensor, t: Tensor | float, source: str, target: str) -> Tensor:
        """`conversions.convert` at time t, a float or (n,): here the velocity is known too. All are (n, *shape)."""
        t = self._clock(t, x)
        rates = self.rates(t) if "velocity" in (source, target) else None
        return convert(prediction, x, self.alpha(t), self.sigma(t), source, target, rates)

    def loss_weight(self, t: Tensor, prediction: str) -> Tensor:
        """w(t), shaped like t, with w |error of the prediction|^2 = |error of x0|^2 for every sample: at a given x_t an
        error d in x0 is one of -d alpha / sigma in e (Salimans & Ho 2022, section 4, has eps and v). ValueError where
        it is infinite, as the noise's is at alpha = 0."""
        from_pair = _validate.choose("prediction", prediction, FROM_PAIR)
        _validate.floats("t", t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        squares = from_pair(torch.ones_like(t), -alpha / sigma, alpha, sigma, *self.rates(t)).square()
        return self._finite(f"weight of {prediction}", t, squares.reciprocal())

    def marginal(self, data: GaussianMixture, t: float) -> GaussianMixture:
        """The law of x_t for x0 from a mixture: again a mixture, in float64."""
        data = data.to(torch.float64)
        at = self._clock(t, data.means)
        return data.noised(float(self.sigma(at)), scale=float(self.alpha(at)))

    def _clock(self, t: Tensor | float, x: Tensor) -> Tensor:
        """t, checked, as a tensor that broadcasts against x."""
        _validate.floats("x", x)
        t = _validate.tensor("t", t, x.dtype, x.device)
        if not bool(((t >= self.t_min) & (t <= self.t_max)).all()):
            raise self._outside("t", t, "times", [self.t_min, self.t_max])
        return _validate.broadcast_sigma(t, x)

    def _finite(self, what: str, t: Tensor, value: Tensor) -> Tensor:
        """The value, elementwise in t; ValueError where it is not finite (on an accelerator it is not looked at)."""
        if value.device.type == "cpu" and _validate.any_of(bad := ~value.isfinite()):
            at = t[bad].flatten()[0].item() if t.shape == value.shape else t.flatten()[0].item()
            raise ValueError(f"t holds {at:g}, where the {what} of the {self.name} process is not finite; wanted times "
                             f"inside {self.t_min:g} to {self.t_max:g}")
        return value

    def _outside(self, name: str, given: Tensor, what: str, ends: list[float]) -> ValueError:
        return ValueError(f"{name} runs from {given.min().item():g} to {given.max().item():g}; "
                          f"wanted {what} of the {self.name} process, {ends[0]:g} to {ends[1]:g}")


def prior_kl(process: Process, data: GaussianMixture, t: float | None = None, method: str = "quadrature") -> float:
    """KL(p(x_T) || prior) in nats for x0 from a mixture and T = t (None: t_max): what stopping at T costs, the part of
    the ELBO's gap that falls with T while the accumulated score error grows (Franzese 2023).

    Exact for one Gaussian. "quadrature" (d <= 2): 161 nodes per axis about each component, so poor where one component
    is far narrower than another. "lower" and "upper" bound it in any d: the Gaussian with p_T's mean and covariance,
    which has the most entropy of these; the components' mean KL, since KL is convex.
    """
    _validate.choose("method", method, dict.fromkeys(("quadrature", "lower", "upper")))
    p, std = process.marginal(data, process.t_max if t is None else t), process.prior(t)[1]
    _validate.positive("the prior's std at t", std)
    d = p.means.shape[1]

    def gaussian_kl(mean: Tensor, cov: Tensor) -> Tensor:  # (..., d), (..., d, d) -> (...)
        cov = cov / std**2
        return (mean.square().sum(-1) / std**2 + torch.diagonal(cov, 0, -2, -1).sum(-1) - d - torch.logdet(cov)) / 2

    if method == "upper" or p.n_components == 1:
        return float(p.weights @ gaussian_kl(p.means, p.covs))
    if method == "lower":
        offset = p.means - p.mean
        cov = torch.einsum("k,kij->ij", p.weights, p.covs) + (p.weights * offset.T) @ offset
        return float(gaussian_kl(p.mean, cov))
    if d > 2:
        raise ValueError(f"method='quadrature' in {d} dimensions: wanted 2 at most; 'lower' and 'upper' bound the KL")
    line = torch.linspace(-8, 8, 161, dtype=torch.float64, device=p.means.device)
    z = torch.cartesian_prod(*[line] * d).reshape(-1, d)
    prior, rule, total = GaussianMixture(torch.zeros_like(p.means[:1]), std), (-z.square().sum(1) / 2).softmax(0), 0.0
    for weight, mean, root in zip(p.weights, p.means, torch.linalg.cholesky(p.covs), strict=True):
        x = mean + z @ root.mT
        total += float(weight * (rule @ (p.log_prob(x) - prior.log_prob(x))))
    return total


def uniform(low: float, high: float) -> Curve:
    """The quantile function of the uniform law on [low, high]."""
    return lambda u: low + (high - low) * u
