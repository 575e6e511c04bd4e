"""Forward processes and the changes of variables between them: one process in many clothes.

Every Gaussian forward process is `x_t = alpha(t) x0 + sigma(t) e`, e ~ N(0, I), t running from data to noise. Divided
by alpha it is `x = x0 + level e`, level = sigma / alpha (Karras 2022, section 2): processes differ in a clock,
level(t), and a scale, alpha(t), and in nothing else. The rest of the package speaks EDM coordinates, where alpha = 1;
this file is the one place where the other clothes exist. In order: what follows from alpha and sigma; the processes;
what a network may predict; models as denoisers and back; alpha-deblending; how far a process ends from its prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.distributions import GaussianMixture

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
        """log(alpha^2 / sigma^2)."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(d alpha / dt, d sigma / dt)."""
        return _derivative(self.alpha, t), _derivative(self.sigma, t)

    def drift(self, t: Tensor) -> Tensor:
        """f(t) of dx = f(t) x dt + g(t) dW: f = d log alpha / dt (Kingma 2021, equation 5)."""
        return _derivative(lambda u: self.alpha(u).log(), t)

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) of the same SDE: g^2 = d sigma^2 / dt - 2 f sigma^2. No linear SDE has any other g."""
        growth = _derivative(self.variance or (lambda u: self.sigma(u).square()), t)
        return (growth - 2 * self.drift(t) * self.sigma(t).square()).clamp(min=0).sqrt()

    def prior(self, t: float | None = None) -> tuple[float, float]:
        """(mean, std) per coordinate of the Gaussian that sampling starts from at time t (None: t_max)."""
        at = self._clock(self.t_max if t is None else t, torch.zeros(1, dtype=torch.float64))
        return 0.0, self.prior_std or float(self.sigma(at))

    def sample_time(self, n: int, rng: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """n times for training, (n,), from the process's usual law: see each process below."""
        _validate.whole("n", n, least=0)
        u = torch.rand(n, generator=rng, device=device).clamp(min=2.0**-25)  # never 0, whose time is an end
        return (self.quantile or _uniform(self.t_min, self.t_max))(u)

    def to_edm(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(x_t, t) -> (x_t / alpha, sigma / alpha), the same point in EDM coordinates. Where alpha is 0 (the end of
        cosine and flow) there is no such point; it is taken at alpha = machine epsilon, where every D is E[x0]."""
        t = self._clock(t, x)
        alpha = self.alpha(t).clamp(min=torch.finfo(x.dtype).eps)
        level = self.sigma(t) / alpha
        return x / alpha, level.reshape(-1) if level.ndim else level

    def from_edm(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """(x, sigma) in EDM coordinates -> (x_t, t), t shaped like sigma. ValueError: a level the process lacks."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
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
        """`convert` below at time t, a float or (n,): here the velocity is known too. All are (n, *shape)."""
        t = self._clock(t, x)
        rates = self.rates(t) if "velocity" in (source, target) else None
        return convert(prediction, x, self.alpha(t), self.sigma(t), source, target, rates)

    def loss_weight(self, t: Tensor, prediction: str) -> Tensor:
        """w(t), shaped like t, with w |error of the prediction|^2 = |error of x0|^2 for every sample: at a given x_t an
        error d in x0 is one of -d alpha / sigma in e (Salimans & Ho 2022, section 4, has eps and v)."""
        from_pair = _validate.choose("prediction", prediction, FROM_PAIR)
        alpha, sigma = self.alpha(t), self.sigma(t)
        return from_pair(torch.ones_like(t), -alpha / sigma, alpha, sigma, *self.rates(t)).square().reciprocal()

    def marginal(self, data: GaussianMixture, t: float) -> GaussianMixture:
        """The law of x_t for x0 from a mixture: again a mixture, in float64."""
        data = data.to(torch.float64)
        at = self._clock(t, data.means)
        alpha, noise = self.alpha(at), self.sigma(at).square() * torch.eye(data.means.shape[1]).to(data.means)
        return GaussianMixture(alpha * data.means, alpha.square() * data.covs + noise, data.weights)

    def _clock(self, t: Tensor | float, x: Tensor) -> Tensor:
        """t, checked, as a tensor that broadcasts against x."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        if not bool(((t >= self.t_min) & (t <= self.t_max)).all()):
            raise self._outside("t", t, "times", [self.t_min, self.t_max])
        return _validate.broadcast_sigma(t, x)

    def _outside(self, name: str, given: Tensor, what: str, ends: list[float]) -> ValueError:
        return ValueError(f"{name} runs from {given.min().item():g} to {given.max().item():g}; "
                          f"wanted {what} of the {self.name} process, {ends[0]:g} to {ends[1]:g}")


def edm(sigma_max: float = 1000.0, log_mean: float = -1.2, log_std: float = 1.2) -> Process:
    """The identity: alpha = 1, sigma = t; trained at ln sigma ~ N(log_mean, log_std^2) (Karras 2022, table 1)."""
    _validate.positive("sigma_max", sigma_max)
    _validate.positive("log_std", log_std)
    return Process(
        "edm", torch.ones_like, lambda t: t, lambda s: s, 0.0, sigma_max,
        quantile=lambda u: torch.exp(log_mean + log_std * torch.special.ndtri(u)).clamp(max=sigma_max),
    )


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Process:
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t on [0, 1] (Song 2021, equation 30).
    At t = 0 the noise is sigma_min already; uniform t in training is log-uniform sigma."""
    _validate.positive("sigma_min", sigma_min)
    _validate.positive("sigma_max", sigma_max)
    if sigma_max <= sigma_min:
        raise ValueError(f"sigma_max={sigma_max!r}: wanted a number above sigma_min={sigma_min!r}")
    span = math.log(sigma_max / sigma_min)
    return Process("ve", torch.ones_like, lambda t: sigma_min * torch.exp(span * t),
                   lambda s: torch.log(s / sigma_min) / span, 0.0, 1.0, quantile=_uniform(1e-5, 1.0))


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Process:
    """Variance preserving, beta(t) linear in t on [0, 1] (Song 2021, equation 32): alpha = e^(-B/2), B the integral of
    beta; alpha^2 + sigma^2 = 1; f = -beta/2, g^2 = beta. Training: t uniform from 1e-5 on, as for VE and sub-VP."""
    integral, inverse = _linear_rate(beta_min, beta_max)
    return _of_variance(
        "vp", lambda t: torch.exp(-0.5 * integral(t)), lambda t: -torch.expm1(-integral(t)),
        lambda s: inverse(torch.log1p(s.square())),  # since 1 / alpha^2 = 1 + level^2
        _uniform(1e-5, 1.0),
    )


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Process:
    """VP's alpha with less noise on the way: sigma = 1 - alpha^2 (Song 2021, appendix C). The drift is VP's, -beta/2;
    g^2 = beta (1 - e^(-2B)), below VP's beta, is just what `diffusion` finds from alpha and sigma."""
    integral, inverse = _linear_rate(beta_min, beta_max)
    return Process(
        "sub_vp", lambda t: torch.exp(-0.5 * integral(t)), lambda t: -torch.expm1(-integral(t)),
        lambda s: inverse(2 * torch.asinh(s / 2)),  # since level = e^(B/2) - e^(-B/2)
        0.0, 1.0, prior_std=1.0, quantile=_uniform(1e-5, 1.0),
    )


def ddpm(steps: int = 1000, beta_min: float = 0.1, beta_max: float = 20.0, betas: Tensor | None = None) -> Process:
    """DDPM (Ho 2020): alpha^2 = abar_t, the product of 1 - beta_s over s <= t, at t = 0, 1, ..., steps - 1 as diffusers
    counts. In between log level is linear in t (as in k-diffusion). f and g are per step. Training: whole t, uniform.

    The usual betas, linear from beta_min / steps to beta_max / steps, become VP at its time (t + 1) / steps as steps ->
    infinity (Song 2021, appendix B). `betas`, (steps,) numbers in (0, 1), replaces them.
    """
    if betas is None:
        _validate.whole("steps", steps, least=2)
        betas = torch.linspace(beta_min / steps, beta_max / steps, steps, dtype=torch.float64)
    betas = torch.as_tensor(betas).detach().double()
    if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(f"betas={betas.tolist()[:3]}... {tuple(betas.shape)}: wanted two or more between 0 and 1")
    steps, levels = len(betas), torch.log1p(-betas).cumsum(0).neg().expm1().log() / 2  # log level; level^2 = 1/abar - 1

    def log_level(t: Tensor) -> Tensor:
        low, table = t.detach().floor().long().clamp(0, steps - 2), levels.to(t)
        return table[low] + (t - low) * (table[low + 1] - table[low])

    def time(s: Tensor) -> Tensor:
        wanted, table = s.log().contiguous(), levels.to(s)
        low = (torch.searchsorted(table, wanted, right=True) - 1).clamp(0, steps - 2)
        return low + (wanted - table[low]) / (table[low + 1] - table[low])

    return Process(
        "ddpm", lambda t: torch.sigmoid(-2 * log_level(t)).sqrt(), lambda t: torch.sigmoid(2 * log_level(t)).sqrt(),
        time, 0.0, steps - 1.0, prior_std=1.0, quantile=lambda u: (u * steps).floor().clamp(max=steps - 1),
    )


def cosine(offset: float = 0.008) -> Process:
    """alpha = cos(h) / cos(h_0) with h = pi/2 (t + offset) / (1 + offset), alpha^2 + sigma^2 = 1 (Nichol & Dhariwal
    2021, equation 17, without their cap on beta: alpha is 0 at t = 1). Training: t uniform."""
    _validate.positive("offset", offset)
    unit = 0.5 * math.pi / (1 + offset)  # radians per unit of t
    sin0, cos0 = math.sin(unit * offset), math.cos(unit * offset)
    return _of_variance(
        "cosine", lambda t: torch.sin(unit * (1 - t)) / cos0,
        # (cos^2 h_0 - cos^2 h) / cos^2 h_0, without its cancellation near t = 0
        lambda t: torch.sin(unit * t) * torch.sin(unit * (t + 2 * offset)) / cos0**2,
        lambda s: torch.atan((s.square() + sin0**2).sqrt() / cos0) / unit - offset,
    )


def flow(logit_normal: tuple[float, float] | None = None) -> Process:
    """Flow matching, rectified flow: alpha = 1 - t, sigma = t, a straight line with velocity e - x0 (Lipman 2023, Liu
    2023). Training: t uniform, or with `logit_normal` = (mean, std) logit t ~ N(mean, std^2) (Esser 2024: (0, 1))."""
    mean, std = logit_normal or (0.0, 1.0)
    _validate.positive("logit_normal's std", std)
    return Process(
        "flow", lambda t: 1 - t, lambda t: t, lambda s: 1 / (1 + 1 / s), 0.0, 1.0, prior_std=1.0,
        quantile=logit_normal and (lambda u: torch.sigmoid(mean + std * torch.special.ndtri(u))),
    )


def iadb() -> Process:
    """Iterative alpha-(de)blending, x_a = (1 - a) noise + a x0 (Heitz 2023): flow, at t = 1 - a. See `deblend`."""
    return replace(flow(), name="iadb")


def interpolant(latent: float = 2.0) -> Process:
    """The stochastic interpolant x_t = (1 - t) x0 + t x1 + gamma z with gamma^2 = latent t (1 - t) (Albergo 2023). For
    Gaussian x1 it collapses: sigma^2 = t^2 + gamma^2, and E[velocity | x_t] is the same. latent = 0 is flow, 1 a
    Brownian bridge (sigma^2 = t), 2 preserves variance. Training: t uniform."""
    _validate.positive("latent", latent, strictly=False)

    def time(s: Tensor) -> Tensor:  # level^2 = r^2 + latent r with r = t / (1 - t): the root without cancellation
        r = 2 * s / (latent / s + (latent**2 / s.square() + 4).sqrt())
        return torch.where(s > 0, 1 / (1 + 1 / r), 0)

    return _of_variance("interpolant", lambda t: 1 - t, lambda t: t * (latent + (1 - latent) * t), time)


#: What a network may predict, solved for both unknowns: f(x_t, prediction, alpha, sigma, alpha', sigma') -> (x0, e).
#: Each is two equations, alpha x0 + sigma e = x_t and the prediction's own. Only "velocity" reads the rates.
TO_PAIR: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "x0": lambda x, x0, a, s, *_: (x0, (x - a * x0) / s),
    "eps": lambda x, eps, a, s, *_: ((x - s * eps) / a, eps),
    "v": lambda x, v, a, s, *_: ((a * x - s * v) / (a**2 + s**2), (a * v + s * x) / (a**2 + s**2)),
    "score": lambda x, score, a, s, *_: ((x + s**2 * score) / a, -s * score),  # Tweedie
    "velocity": lambda x, u, a, s, da, ds: ((ds * x - s * u) / (a * ds - s * da), (a * u - da * x) / (a * ds - s * da)),
}
#: The way back, which is each prediction's definition: f(x0, e, alpha, sigma, alpha', sigma').
FROM_PAIR: dict[str, Callable[..., Tensor]] = {
    "x0": lambda x0, e, a, s, *_: x0,
    "eps": lambda x0, e, a, s, *_: e,
    "v": lambda x0, e, a, s, *_: a * e - s * x0,  # Salimans & Ho 2022
    "score": lambda x0, e, a, s, *_: -e / s,  # of p(x_t | x0); its mean given x_t is that of p(x_t)
    "velocity": lambda x0, e, a, s, da, ds: da * x0 + ds * e,  # d x_t / dt at fixed x0, e; its mean moves p_t
}
#: The same to and from x0 for those that need no clock: f(x_t, prediction, alpha, sigma) and f(x_t, x0, alpha, sigma).
TO_X0: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    name: lambda x, prediction, a, s, f=f: f(x, prediction, a, s)[0]  # type: ignore[misc]
    for name, f in TO_PAIR.items() if name != "velocity"
}
FROM_X0: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    name: lambda x, x0, a, s, f=f: f(x0, (x - a * x0) / s, a, s)  # type: ignore[misc]
    for name, f in FROM_PAIR.items() if name != "velocity"
}


def convert(
    prediction: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float, source: str, target: str,
    rates: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Turn one prediction about x_t = alpha x0 + sigma e into another: x0, eps, v, score or velocity.

    `prediction` and `x` are (n, *shape); `alpha`, `sigma` and both `rates` (alpha', sigma'), which only the velocity
    needs, floats or (n,). ValueError: unknown names, no rates. `Process.convert` knows all four numbers from t.
    """
    to_pair = _validate.choose("source", source, TO_PAIR)
    from_pair = _validate.choose("target", target, FROM_PAIR)
    alpha = _validate.broadcast_sigma(alpha, x)
    sigma = _validate.broadcast_sigma(sigma, x)
    if rates is None and "velocity" in (source, target):
        raise ValueError("rates=None: wanted (d alpha / dt, d sigma / dt) for a velocity; Process.convert has them")
    slopes = [torch.as_tensor(rate, dtype=x.dtype, device=x.device) for rate in rates or ()]
    slopes = [slope.reshape(-1, *[1] * (x.ndim - 1)) if slope.ndim == 1 else slope for slope in slopes]
    return from_pair(*to_pair(x, prediction, alpha, sigma, *slopes), alpha, sigma, *slopes)


def as_denoiser(model: Callable[..., Tensor], process: Process, prediction: str = "eps") -> Callable[..., Tensor]:
    """Wrap `model(x_t, t)` of any process and prediction type as D(x, sigma) in EDM coordinates."""
    _validate.choose("prediction", prediction, TO_PAIR)

    def denoise(x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        x_t, t = process.from_edm(x, _validate.broadcast_sigma(sigma, x).flatten().expand(len(x)))
        out = model(x_t, t) if label is None else model(x_t, t, label)
        return process.convert(out, x_t, t, prediction, "x0")

    return denoise


def as_model(denoiser: Callable[..., Tensor], process: Process, prediction: str = "eps") -> Callable[..., Tensor]:
    """The way back: D(x, sigma) as `model(x_t, t)`, t a float or (n,). "velocity": the probability flow's dx / dt."""
    _validate.choose("prediction", prediction, FROM_PAIR)

    def model(x: Tensor, t: float | Tensor, label: Tensor | None = None) -> Tensor:
        at = process.to_edm(x, t)
        return process.convert(denoiser(*at) if label is None else denoiser(*at, label), x, t, "x0", prediction)

    return model


def score_from_denoiser(denoised: Tensor, x: Tensor, sigma: float | Tensor) -> Tensor:
    """Tweedie in EDM coordinates: score = (D - x) / sigma^2, shaped like x."""
    return (denoised - x) / _validate.broadcast_sigma(sigma, x, positive=True).square()


@torch.no_grad()
def deblend(model: Callable[[Tensor, Tensor], Tensor], x: Tensor, blends: Tensor) -> Tensor:
    """Iterative alpha-deblending (Heitz 2023), x <- x + (a' - a) model(x, a) from noise to data, x (n, *shape).

    `model(x, a)`, a (n,), is E[x0 - noise | x_a = x], minus flow's velocity at t = 1 - a; `blends` (m+1,) rise within
    [0, 1]. So this is Euler on flow and, divided by a, Euler (or DDIM) in EDM coordinates along sigma = (1 - a) / a.
    """
    _validate.samples("x", x, least=0)
    blends = torch.as_tensor(blends).to(x)
    if blends.ndim != 1 or len(blends) < 2 or not bool((blends.diff() > 0).all()) or blends[0] < 0 or blends[-1] > 1:
        raise ValueError(f"blends={blends.tolist()}: wanted two or more numbers rising within [0, 1]")
    for a, after in pairwise(blends):
        x = x + (after - a) * model(x, a.expand(len(x)))
    return x


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
    d, covs = p.means.shape[1], p.covs

    def gaussian_kl(mean: Tensor, cov: Tensor) -> Tensor:  # (..., d), (..., d, d) -> (...)
        cov = cov / std**2
        return (mean.square().sum(-1) / std**2 + torch.diagonal(cov, 0, -2, -1).sum(-1) - d - torch.logdet(cov)) / 2

    if method == "upper" or p.n_components == 1:
        return float(p.weights @ gaussian_kl(p.means, covs))
    if method == "lower":
        offset = p.means - p.mean
        return float(gaussian_kl(p.mean, torch.einsum("k,kij->ij", p.weights, covs) + (p.weights * offset.T) @ offset))
    if d > 2:
        raise ValueError(f"method='quadrature' in {d} dimensions: wanted 2 at most; 'lower' and 'upper' bound the KL")
    line = torch.linspace(-8, 8, 161, dtype=torch.float64, device=p.means.device)
    z = torch.cartesian_prod(*[line] * d).reshape(-1, d)
    prior, rule, total = GaussianMixture(torch.zeros_like(p.means[:1]), std), (-z.square().sum(1) / 2).softmax(0), 0.0
    for weight, mean, root in zip(p.weights, p.means, torch.linalg.cholesky(covs), strict=True):
        x = mean + z @ root.mT
        total += float(weight * (rule @ (p.log_prob(x) - prior.log_prob(x))))
    return total


def _of_variance(name: str, alpha: Curve, variance: Curve, time: Curve, quantile: Curve | None = None) -> Process:
    """A process on [0, 1] that ends in N(0, I), by its sigma^2."""
    return Process(name, alpha, lambda t: variance(t).sqrt(), time, 0.0, 1.0, variance, 1.0, quantile)


def _linear_rate(beta_min: float, beta_max: float) -> tuple[Curve, Curve]:
    """B(t), the integral from 0 to t of beta, linear from beta_min to beta_max on [0, 1], and its inverse."""
    _validate.positive("beta_min", beta_min, strictly=False)
    _validate.positive("beta_max", beta_max)
    slope = beta_max - beta_min
    # The root of slope/2 t^2 + beta_min t = B, in the form without cancellation near 0.
    return (lambda t: beta_min * t + 0.5 * slope * t.square(),
            lambda total: 2 * total / (beta_min + (beta_min**2 + 2 * slope * total).sqrt()))


def _uniform(low: float, high: float) -> Curve:
    return lambda u: low + (high - low) * u


def _derivative(function: Curve, t: Tensor) -> Tensor:
    """d function / dt for an elementwise function; torch.func, since that works under no_grad and inside vmap too."""
    return torch.func.grad(lambda u: function(u).sum())(t)


#: The processes by name, with their usual constants.
PROCESSES: dict[str, Callable[[], Process]] = {
    make.__name__: make for make in (edm, ve, vp, sub_vp, ddpm, cosine, flow, iadb, interpolant)
}
