"""A denoiser that is the gradient of a scalar: an energy E(x, sigma) = -log p_sigma(x) + constant(sigma).

A network for D can have any Jacobian; a score has a symmetric one. Here D = x - sigma^2 grad_x E by construction, so
D is conservative to rounding, and differences of E at one noise level are log-density ratios, which a plain denoiser
gives only as line integrals. Distilled from a teacher, it serves composition and Monte Carlo (Thornton 2025).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minidistill import _validate, training
from minidistill._random import seeded
from minidistill.data import to_float
from minidistill.networks import MLP, Preconditioned, check_input
from minidistill.score_matching import edm_weight, log_uniform_sigma
from minidistill.score_matching.fields import call, inner, per_sample, value_and_gradient

__all__ = ["EnergyDenoiser", "distil_energy"]


class EnergyDenoiser(Preconditioned):
    """E = |x|^2 / (2 (sigma^2 + sigma_data^2)) - (sigma_data / sigma) f(c_in x), and D = x - sigma^2 grad_x E.

    This is the one scaling of a scalar for which D has EDM's preconditioning, D = c_skip x + c_out F(c_in x), with
    F = grad f: at initialisation and at every noise level the gradient of f is all that has to be learned, at unit
    variance (Karras 2022, table 1). The first term is the exact energy of Gaussian data.

    Args:
        network: F(x, c_noise, label). With one output, (n, 1), that is f; with outputs shaped like x, f = u'F(u), which
            lets any denoiser's network be an energy (as in Salimans 2021). It should be smooth: SiLU, not ReLU.
            Where samples are single numbers the two look alike, and `network.out_features == 1` says that it is f.
        sigma_data: the data's standard deviation.
    """

    def energy(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """E(x, sigma) in nats, (n,): -log p_sigma(x) up to a number that may depend on sigma, not on x. ValueError: x,
        sigma or label that do not fit, a network whose output is neither of the two."""
        label = check_input(self, x, label)
        s = _validate.broadcast_sigma(sigma, x, positive=True)
        variance = s.square() + self.sigma_data**2
        u = torch.rsqrt(variance) * x
        out = self.run(u, (s.log() / 4).flatten().expand(len(x)), label).to(x.dtype)
        scalar = out.shape == (len(x), 1) and (x.shape[1:] != (1,) or getattr(self.network, "out_features", None) == 1)
        if not scalar and out.shape != x.shape:
            raise ValueError(f"network returned shape {tuple(out.shape)}; wanted ({len(x)}, 1) or {tuple(x.shape)}")
        f = out.flatten() if scalar else inner(u, out)
        return (x.square() / (2 * variance)).flatten(1).sum(1) - self.sigma_data / s.flatten() * f

    def forward(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """E[x0 | x] estimated: x (n, *shape), sigma a float or (n,) > 0, label (n,) if class-conditional."""
        _validate.floats("x", x)
        s = _validate.broadcast_sigma(sigma, x, positive=True)
        (wide,) = _validate.precise(x)
        return (x - s.square() * value_and_gradient(lambda u: self.energy(u, sigma, label), wide)[1]).to(x.dtype)


def distil_energy(
    teacher: Callable[..., Tensor],
    data: Tensor,
    network: nn.Module | None = None,
    *,
    labels: Tensor | None = None,
    steps: int = 3000,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    sigma_min: float = 0.02,
    sigma_max: float = 20.0,
    ema_halflife: float = 100_000,
    clip: float = 1.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    **fit_options: Any,
) -> EnergyDenoiser:
    """Train an energy whose denoiser is the teacher's: E_x w(sigma) |D_E - D_teacher|^2 / dim, at noised data
    (Thornton 2025).

    A teacher's field that is not conservative is projected onto the nearest one that is, in that mean square.

    Args:
        data: (n, *shape), floating, or images as bytes: where the two are compared, noised. labels: (n,) classes.
        network: None for an MLP of width 128 with one output.
        sigma_min, sigma_max: relative to data of standard deviation 1; ln sigma is uniform between.
        fit_options: `checkpoint`, `resume`, `progress`, `minutes`, ... of `training.fit`.
    Returns:
        the averaged (EMA) `EnergyDenoiser`, in eval mode.
    Raises:
        ValueError, TypeError: data, labels, a network, counts or rates that do not fit.
    """
    if not (isinstance(data, Tensor) and data.dtype == torch.uint8):
        _validate.samples("data", data, least=2)
    if labels is not None:
        labels = _validate.labels("labels", labels, len(data))
    steps, batch_size = _validate.whole("steps", steps), _validate.whole("batch_size", batch_size)
    learning_rate, sigma_min, sigma_max, ema_halflife, clip = (_validate.positive(name, value) for name, value in (
        ("learning_rate", learning_rate), ("sigma_min", sigma_min), ("sigma_max", sigma_max),
        ("ema_halflife", ema_halflife), ("clip", clip)))
    if sigma_min >= sigma_max:
        raise ValueError(f"sigma_min={sigma_min} is above sigma_max={sigma_max}")
    device = _validate.device("device", device)
    rng = training.generator_on(device, seed)
    n_classes = 0 if labels is None else int(labels.max()) + 1
    with seeded(seed, device):  # initial weights and dropout
        if network is None:
            network = MLP(tuple(data.shape[1:]), hidden=128, depth=3, n_classes=n_classes, out_features=1)
        _validate.fits(network, tuple(data.shape[1:]), n_classes)
        if data.is_floating_point():
            data = data.to(torch.get_default_dtype())
        given = {"teacher": teacher, "data": data, "labels": labels}
        checksums = {name: training.fingerprint(each) for name, each in given.items()}
        data, labels = data.to(device), None if labels is None else labels.to(device)
        sigma_data = _validate.positive("data's standard deviation", float(to_float(data[:10_000]).std()))
        student = EnergyDenoiser(network.to(device).train(), sigma_data)
        ema = copy.deepcopy(student).eval().requires_grad_(False)
        optimizer = torch.optim.Adam(student.parameters(), learning_rate, betas=(0.9, 0.99))

        def update(state: training.State) -> dict[str, Tensor]:
            index = torch.randint(len(data), (batch_size,), generator=rng, device=device)
            x0, label = to_float(data[index]), None if labels is None else labels[index]
            sigma = log_uniform_sigma(batch_size, sigma_min * sigma_data, sigma_max * sigma_data, rng, device)
            noise = torch.randn(x0.shape, generator=rng, device=device)
            x = x0 + _validate.broadcast_sigma(sigma, x0) * noise
            with torch.no_grad():
                target = call(teacher, x, sigma, label)
            training.set_learning_rate(optimizer, learning_rate * training.schedule(state.step, steps, 100))
            loss = per_sample((student(x, sigma, label) - target).square(), edm_weight(sigma, sigma_data)).mean()
            skipped = training.optimizer_step(loss, optimizer, clip)
            training.update_ema(ema, student, ema_halflife, batch_size, state.step)
            return {"loss": loss.detach(), "skipped": skipped}

        config = {
            "run": "energy", "network": getattr(network, "config", None), "data": [*data.shape],
            "sigma_data": sigma_data, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate,
            "sigma": [sigma_min, sigma_max], "ema_halflife": ema_halflife, "clip": clip, "seed": seed,
            "checksums": checksums,
        }
        state = training.State({"net": student, "ema": ema}, {"net": optimizer}, rng, config)
        training.fit(state, update, steps, batch_size=batch_size, **({"description": "energy"} | fit_options))
        return ema
