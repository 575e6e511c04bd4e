"""Reverse KL with help: DMD's regression on the teacher's own samples, DMD2's adversarial term. (f-distill's is that of
DMD2 beside another divergence: `f_distill` in OBJECTIVES.)"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from minidistill.distillation.batch import Batch
from minidistill.distillation.objective import Terms
from minidistill.distillation.objectives.matching import DistributionMatching
from minidistill.distillation.objectives.regression import regression_loss
from minidistill.divergences import F

__all__ = ["DMD", "DMD2"]


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
        has one constant for all levels. At 0.1 a wrong teacher stays uncorrected, at 1 it is not (notebook 09).
    """

    matching: DistributionMatching = field(default_factory=lambda: DistributionMatching(F["reverse_kl"]))
    weight: float = 1.0
    critic_steps: int = 5

    @property
    def needs_ratio(self) -> bool:
        return self.both.needs_ratio

    @property
    def both(self) -> DistributionMatching:
        return replace(self.matching, adversarial_weight=self.weight)

    def critic_loss(self, batch: Batch) -> Tensor:
        return self.both.critic_loss(batch)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return self.both.terms(batch)
