"""Reverse KL with help: DMD's regression on the teacher's own samples, DMD2's adversarial term."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import softplus

from minidistill.distillation.batch import Batch, per_sample
from minidistill.distillation.objective import Terms
from minidistill.distillation.objectives.matching import DistributionMatching, fake_loss, ratio_loss
from minidistill.distillation.objectives.regression import regression_loss
from minidistill.divergences import F

__all__ = ["DMD", "DMD2", "adversarial"]


@dataclass(frozen=True)
class DMD(Terms):
    """Distribution matching plus regression of G(z) on what the teacher's deterministic sampler made of the same z
    (Yin 2024): the pairs tie every mode to a piece of the noise, so that none is dropped.

    weight: of |G(z) - y|^2 / sigma_data^2, free of units as the matching term.
        The paper's 0.25 belongs to a perceptual distance (LPIPS); here it is squared L2, where 2 to 5 did best on a
        ring of Gaussians with the exact teacher.
    needs_pairs: how many (z, y) are made before training.
    A batch without pairs has no regression term.
    """

    matching: DistributionMatching = field(default_factory=lambda: DistributionMatching(F["reverse_kl"]))
    weight: float = 1.0
    needs_pairs: int = 2048

    @property
    def needs_ratio(self) -> bool:
        return self.matching.needs_ratio

    def critic_loss(self, batch: Batch) -> Tensor:
        return self.matching.critic_loss(batch)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        terms = self.matching.terms(batch)
        if batch.pair_x0 is not None and batch.pair_y is not None:
            terms["regression"] = self.weight * regression_loss(batch)
        return terms


@dataclass(frozen=True)
class DMD2(Terms):
    """Distribution matching without pairs, on two time scales (five critic steps for each of the student), plus an
    adversarial term through the ratio's logit (Yin 2024b): with real data it can correct the teacher.

    weight: of the adversarial term. It is put on the matching term's own scale (see `adversarial`), where the paper
        has one constant for all levels.
    """

    matching: DistributionMatching = field(default_factory=lambda: DistributionMatching(F["reverse_kl"]))
    weight: float = 0.1
    critic_steps: int = 5
    needs_ratio = True

    def critic_loss(self, batch: Batch) -> Tensor:
        return fake_loss(batch) + ratio_loss(batch)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.ratio is not None
        direction, scale = self.matching.pull(batch)
        logit = batch.ratio(batch.xt, batch.sigma, batch.label)
        return {
            "matching": -per_sample(direction * batch.x0),
            "adversarial": self.weight * adversarial(logit, batch, scale),
        }


def adversarial(logit: Tensor, batch: Batch, scale: Tensor) -> Tensor:
    """(sigma / sigma_data)^2 scale softplus(-logit), (n,), for a logit about log r at x_t: (n,), or (n, h, w) and then
    its places' mean.

    At the exact ratio softplus(-logit) = log(1 + 1/r) pulls along (s_p - s_q) / (1 + r), the gradient of the softened
    reverse KL; the factors make that commensurable with the score term at every noise level. Derived here.
    """
    loss = softplus(-logit)
    loss = loss if loss.ndim == 1 else loss.flatten(1).mean(1)
    return scale.flatten() * (batch.sigma / batch.sigma_data).square() * loss
