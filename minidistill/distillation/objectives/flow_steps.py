"""Wasserstein gradient flow of an f-divergence, step by step: each step goes down, and not far."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minidistill import _validate
from minidistill.distillation.batch import Batch, per_sample
from minidistill.distillation.objective import Terms
from minidistill.distillation.settings import Settings
from minidistill.divergences import F, FDivergence

__all__ = ["WassersteinFlow"]


@dataclass(frozen=True)
class WassersteinFlow(Terms):
    """JKO steps q_{k+1} = argmin W2^2(q, q_k) / (2 a) + D_f(p || q), samples alone (Fan 2022, arXiv 2112.02424).

    The divergence is its dual, the most that E_p f'(r) - E_q f*(f'(r)) comes to over log r, which the ratio's network
    learns from real and made samples; the student descends the second part, whose gradient at the best log r is h(r)
    grad log r. In the place of W2 stands the way from where the same noise was taken before this step, |G(z) -
    G_k(z)|^2: no less than W2, and equal to it for small steps.

    needs_snapshots: how many steps, each of an equal part of the run; G_k is the student's average when it begins, so
        that average should not reach back farther than a step (`ema_halflife`).
    size: a, in variances of the data.
    level: of a little noise, in standard deviations of the data, on real and made samples: it is for their laws to
        overlap.
    """

    divergence: FDivergence = field(default_factory=lambda: F["jensen_shannon"])
    needs_snapshots: int = 20
    size: float = 1.0
    level: float = 0.05
    needs_ratio = True
    needs_fake = False

    def __post_init__(self) -> None:
        for name in ("size", "level"):
            _validate.positive(name, getattr(self, name))

    def noise_levels(self, n: int, settings: Settings, progress: float, generator: torch.Generator) -> Tensor:
        return torch.full((n,), self.level * settings.sigma_data, device=generator.device)

    def critic_loss(self, batch: Batch) -> Tensor:
        """Minus the dual, (n,)."""
        assert batch.ratio is not None
        xt, _, sigma, label = batch.real_and_fake()
        real, fake = batch.ratio(xt, sigma, label).chunk(2)
        return self.divergence.cost(fake) - self.divergence.slope(real)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.ratio is not None
        assert batch.entry is not None
        assert batch.target is not None
        with torch.no_grad():
            before = batch.target(batch.entry.x, batch.entry.sigma, batch.label)
        way = per_sample((batch.x0 - before).square()) / batch.sigma_data**2
        return {"divergence": -self.divergence.cost(batch.ratio(batch.xt, batch.sigma, batch.label)),
                "way": way / (2 * self.size)}
