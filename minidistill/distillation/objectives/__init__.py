"""What a distillation minimises: one file a family, and all of them by name.

    matching.py      f-distill, Diff-Instruct: h(r) (s_p - s_q), alone or with an adversarial term
    adversarial.py   the term through a discriminator that three of them share
    dmd.py           DMD (regression on pairs), DMD2 (adversarial)
    implicit.py      SIM, SiD, SiDA: distances between scores
    regression.py    the teacher's own map, pair by pair
    consistency.py   CD, CT, iCT, ECT: one answer all along a path of the probability flow
    samples.py       drifting: samples moved towards real ones and apart, no network but the student
    mixture.py       score of mixture: all skews at once
    uni_instruct.py  the divergence of the clean laws, expanded
"""

from minidistill import divergences
from minidistill.distillation.objective import Objective
from minidistill.distillation.objectives.consistency import Consistency, EasyConsistency
from minidistill.distillation.objectives.dmd import DMD, DMD2
from minidistill.distillation.objectives.implicit import AdversarialScoreIdentity, ScoreIdentity, ScoreImplicitMatching
from minidistill.distillation.objectives.matching import DistributionMatching, fake_loss, ratio_loss
from minidistill.distillation.objectives.mixture import ScoreOfMixture
from minidistill.distillation.objectives.regression import Regression
from minidistill.distillation.objectives.samples import Drifting
from minidistill.distillation.objectives.uni_instruct import UniInstruct

__all__ = [
    "DMD", "DMD2", "OBJECTIVES", "AdversarialScoreIdentity", "Consistency", "DistributionMatching", "Drifting",
    "EasyConsistency", "Regression", "ScoreIdentity", "ScoreImplicitMatching", "ScoreOfMixture", "UniInstruct",
    "fake_loss", "ratio_loss",
]
#: Every objective by name: distribution matching with each f-divergence, reverse KL in its other clothes, the line of
#: skew Jensen-Shannon divergences, and the score-implicit family.
OBJECTIVES: dict[str, Objective] = {
    **{name: DistributionMatching(row) for name, row in divergences.F.items()},
    "diff_instruct": DistributionMatching(divergences.F["reverse_kl"], normalise=False),
    "dmd": DMD(),
    "dmd2": DMD2(),
    # All of Xu 2025: the divergence that did best there, and DMD2's adversarial term, weight and critic steps.
    "f_distill": DistributionMatching(divergences.F["jensen_shannon"], adversarial_weight=1.0, critic_steps=5),
    # Their weights, r^2 and 1 / r, are largest where one of the two is alone and the ratio least known.
    "pearson": DistributionMatching(divergences.F["pearson"], clip=2.0),
    "neyman": DistributionMatching(divergences.F["neyman"], clip=1.0),
    "skew_jensen_shannon": DistributionMatching(divergences.skew_jensen_shannon(0.25)),
    "score_of_mixture": ScoreOfMixture(),
    "sim": ScoreImplicitMatching(divergences.pseudo_huber(0.1)),
    "sim_l2": ScoreImplicitMatching(divergences.squared_l2(), normalise=True, warmup=100, gradient_clip=1.0),
    "sid": ScoreIdentity(),  # alpha = 1.2 for images, 1 for all else
    "sida": AdversarialScoreIdentity(),
    "fisher": ScoreIdentity(alpha=0.5),
    "regression": Regression(),
    "drifting": Drifting(),
    "uni_instruct": UniInstruct(divergences.F["jensen_shannon"]),
}
