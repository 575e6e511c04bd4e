"""sCM: consistency in continuous time, in TrigFlow's coordinates (Lu & Song 2025).

With x0 of standard deviation sigma_data and z = sigma_data e, TrigFlow's x_t = cos t x0 + sin t z is EDM's x times
cos t at level sigma = sigma_data tan t, and EDM's preconditioned denoiser is its consistency function already:

    f(x_t, t) = cos t x_t - sin t sigma_data F(x_t / sigma_data, t) = D(x_t / cos t, sigma_data tan t).

Along a path f must not change, so that df/dt is the error. It is not squared: F is moved against cos t df/dt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill._autodiff import jvp
from minidistill.distillation.batch import Batch, column, per_sample
from minidistill.distillation.objective import Terms
from minidistill.distillation.settings import Settings
from minidistill.networks.jumps import TOP

__all__ = ["ContinuousConsistency", "tangent", "trig_network"]


def trig_network(denoiser: Callable[..., Tensor], sigma_data: float, label: Tensor | None) -> Callable[..., Tensor]:
    """sigma_data F(x, t) of a denoiser D(x, sigma, label) in TrigFlow's coordinates: x (n, *shape) = x_t, t (n,)."""
    def network(x: Tensor, t: Tensor) -> Tensor:
        c, s = (column(f(t), x) for f in (torch.cos, torch.sin))
        return (c * x - denoiser(x / c, sigma_data * t.tan(), label)) / s

    return network


def tangent(
    network: Callable[..., Tensor], x: Tensor, t: Tensor, velocity: Tensor, rise: float = 1.0,
    difference: float | None = None,
) -> Tensor:
    """cos t df/dt along dx/dt = velocity, (n, *shape), in two parts (Lu & Song 2025, equation 8): `rise` is the share
    of the second, which holds F's own derivative and is unstable at first; 1 for all of it.

    The derivative is a forward one, of F along cos t sin t (velocity, 1) at once, which keeps it bounded; with
    `difference`, a central difference of that step in t.
    """
    c, s = (column(f(t), x) for f in (torch.cos, torch.sin))
    along, pace = c * s * velocity, (c * s).flatten()
    if difference is None:
        here, rate = jvp(network, (x, t), (along, pace))
    else:
        h = difference
        up, down = (network(x + step * along, t + step * pace) for step in (h, -h))
        here, rate = network(x, t), (up - down) / (2 * h)
    return -c.square() * (here - velocity) - rise * (c * s * x + rate)


@dataclass(frozen=True)
class ContinuousConsistency(Terms):
    """|F - sg(F + g / (|g| + c))|^2 with g = cos t df/dt, for the size |g| a dimension (Lu & Song 2025, algorithm 1).

    teacher: dx/dt from the teacher (their sCD); False for the noise's own, cos t z - sin t x0 (sCT), from data alone.
    rise: the share of the run in which `tangent`'s second part rises to its full size.
    normalise: c above, or None for the tangent as it is.
    log_mean, log_std: of the normal law of ln tan t = ln(sigma / sigma_data); -1 and 1.4 in the paper's sCT.
    sigma_init: where sampling begins, in standard deviations of the data.
    difference: a step in t, for networks that have no forward derivative.

    Their learned weight of t is left out: once normalised, all tangents are about as long.
    """

    teacher: bool = True
    rise: float = 0.25
    normalise: float | None = 0.1
    log_mean: float = 0.0
    log_std: float = 1.4
    difference: float | None = None
    needs_real = True
    needs_samples = False
    octaves = 4
    sigma_init: float = TOP
    route = "end"

    def noise_levels(self, n: int, settings: Settings, progress: float, generator: torch.Generator) -> Tensor:
        normal = torch.randn(n, generator=generator, device=generator.device)
        return settings.sigma_data * (self.log_mean + self.log_std * normal).exp().clamp(1e-3, self.sigma_init)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.real is not None
        assert batch.student is not None
        unit, label = batch.sigma_data, batch.real_label
        t = (batch.sigma / unit).atan()
        c, s = (column(f(t), batch.real) for f in (torch.cos, torch.sin))
        x, velocity = c * batch.real + s * unit * batch.noise, c * unit * batch.noise - s * batch.real
        frozen = trig_network(batch.frozen or batch.student, unit, label)
        with torch.no_grad():
            if self.teacher:
                velocity = trig_network(batch.teacher, unit, label)(x, t)
            risen = min(1.0, batch.progress / self.rise) if self.rise else 1.0
            g = tangent(frozen, x, t, velocity, risen, self.difference) / unit
            if self.normalise is not None:
                g = g / (column(per_sample(g.square()).sqrt() / x[0].numel() ** 0.5, x) + self.normalise)
            wanted = frozen(x, t) / unit + g
        return {"tangent": per_sample((trig_network(batch.student, unit, label)(x, t) / unit - wanted).square())}
