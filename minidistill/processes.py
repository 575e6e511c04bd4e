"""Forward processes and the changes of variables between them.

Every Gaussian forward process is `x_t = alpha(t) x0 + sigma(t) e`. The rest of the package speaks EDM
coordinates only, `x = x0 + sigma e`; a process is turned into them by `x_t / alpha` and `sigma / alpha`
(Karras 2022, section 2). This file is the one place where the other clothes exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill import _validate


@dataclass(frozen=True)
class Process:
    """x_t = alpha(t) x0 + sigma(t) e for t in [t_min, t_max].

    `alpha` and `sigma` map a tensor of times to tensors; `time` is the inverse of `sigma / alpha`.
    Everything else about the process (drift, diffusion, log-SNR) follows from these.
    """

    name: str
    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    time: Callable[[Tensor], Tensor]
    t_min: float
    t_max: float

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2)."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def drift(self, t: Tensor) -> Tensor:
        """f(t) of dx = f(t) x dt + g(t) dW: f = d log alpha / dt (Kingma 2021, equation 5)."""
        return _derivative(lambda u: self.alpha(u).log(), t)

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) of the same SDE: g^2 = d sigma^2 / dt - 2 f sigma^2."""
        growth = _derivative(lambda u: self.sigma(u).square(), t)
        return (growth - 2 * self.drift(t) * self.sigma(t).square()).clamp(min=0).sqrt()

    def to_edm(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(x_t, t) -> (x_t / alpha, sigma / alpha), the same point in EDM coordinates."""
        alpha, sigma = self._levels(t, x)
        return x / alpha, (sigma / alpha).reshape(-1) if sigma.ndim else sigma / alpha

    def from_edm(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """(x, sigma) in EDM coordinates -> (x_t, t)."""
        t = self.time(torch.as_tensor(sigma, dtype=x.dtype, device=x.device))
        return x * self._levels(t, x)[0], t

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """alpha(t) x0 + sigma(t) noise, for t a float or (n,)."""
        alpha, sigma = self._levels(t, x0)
        return alpha * x0 + sigma * noise

    def _levels(self, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        if not bool(((t >= self.t_min) & (t <= self.t_max)).all()):
            raise ValueError(
                f"t runs from {t.min().item():g} to {t.max().item():g}; "
                f"wanted times of the {self.name} process, {self.t_min:g} to {self.t_max:g}"
            )
        return _validate.broadcast_sigma(self.alpha(t), x), _validate.broadcast_sigma(self.sigma(t), x)


def edm(sigma_max: float = 1000.0) -> Process:
    """The identity: alpha = 1, sigma = t (Karras 2022)."""
    return Process("edm", torch.ones_like, lambda t: t, lambda s: s, 0.0, sigma_max)


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Process:
    """Variance preserving, beta(t) linear in t on [0, 1] (Song 2021, equation 32): alpha^2 + sigma^2 = 1."""
    slope = beta_max - beta_min

    def integral(t: Tensor) -> Tensor:  # of beta from 0 to t
        return beta_min * t + 0.5 * slope * t.square()

    def time(edm_sigma: Tensor) -> Tensor:
        total = torch.log1p(edm_sigma.square())  # since 1 / alpha^2 = 1 + (sigma / alpha)^2
        # The root of slope/2 t^2 + beta_min t = total, in the form without cancellation near 0.
        return 2 * total / (beta_min + (beta_min**2 + 2 * slope * total).sqrt())

    return Process(
        "vp",
        alpha=lambda t: torch.exp(-0.5 * integral(t)),
        sigma=lambda t: torch.sqrt(-torch.expm1(-integral(t))),
        time=time,
        t_min=0.0,
        t_max=1.0,
    )


#: What a network may predict, and how each turns into the clean sample: f(x_t, prediction, alpha, sigma).
TO_X0: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "x0": lambda x, x0, alpha, sigma: x0,
    "eps": lambda x, eps, alpha, sigma: (x - sigma * eps) / alpha,
    # v = alpha e - sigma x0 (Salimans & Ho 2022); (alpha^2 + sigma^2) = 1 for VP, general here.
    "v": lambda x, v, alpha, sigma: (alpha * x - sigma * v) / (alpha.square() + sigma.square()),
    "score": lambda x, score, alpha, sigma: (x + sigma.square() * score) / alpha,  # Tweedie
}
#: The way back: f(x_t, x0, alpha, sigma) gives the named prediction.
FROM_X0: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "x0": lambda x, x0, alpha, sigma: x0,
    "eps": lambda x, x0, alpha, sigma: (x - alpha * x0) / sigma,
    "v": lambda x, x0, alpha, sigma: alpha * (x - alpha * x0) / sigma - sigma * x0,
    "score": lambda x, x0, alpha, sigma: (alpha * x0 - x) / sigma.square(),
}


def convert(
    prediction: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float, source: str, target: str
) -> Tensor:
    """Turn one prediction about x_t = alpha x0 + sigma e into another: x0, eps, v or score.

    `prediction` and `x` are (n, *shape); `alpha` and `sigma` floats or (n,). Unknown names raise ValueError.
    """
    to_x0 = _validate.choose("source", source, TO_X0)
    from_x0 = _validate.choose("target", target, FROM_X0)
    alpha = _validate.broadcast_sigma(alpha, x)
    sigma = _validate.broadcast_sigma(sigma, x)
    return from_x0(x, to_x0(x, prediction, alpha, sigma), alpha, sigma)


def as_denoiser(
    model: Callable[[Tensor, Tensor], Tensor], process: Process, prediction: str = "eps"
) -> Callable[..., Tensor]:
    """Wrap `model(x_t, t)` of any process and prediction type as D(x, sigma) in EDM coordinates."""
    to_x0 = _validate.choose("prediction", prediction, TO_X0)

    def denoise(x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        x_t, t = process.from_edm(x, level)
        alpha, s = process._levels(t, x)
        out = model(x_t, t) if label is None else model(x_t, t, label)  # type: ignore[call-arg]
        return to_x0(x_t, out, alpha, s)

    return denoise


def score_from_denoiser(denoised: Tensor, x: Tensor, sigma: float | Tensor) -> Tensor:
    """Tweedie in EDM coordinates: score = (D - x) / sigma^2, shaped like x."""
    return (denoised - x) / _validate.broadcast_sigma(sigma, x, positive=True).square()


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """d function / dt for an elementwise function, by automatic differentiation."""
    with torch.enable_grad():
        t = t.detach().requires_grad_(True)
        value = function(t).sum()
        if not value.requires_grad:  # constant in t, such as EDM's alpha
            return torch.zeros_like(t)
        return torch.autograd.grad(value, t)[0]


#: The processes by name, with their usual constants.
PROCESSES: dict[str, Callable[[], Process]] = {"edm": edm, "vp": vp}
