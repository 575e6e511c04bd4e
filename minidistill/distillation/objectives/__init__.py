"""What a distillation minimises: one file a family, and all of them by name.

    matching.py      f-distill, Diff-Instruct: h(r) (s_p - s_q), alone or with an adversarial term
    adversarial.py   the term through a discriminator that three of them share
    dmd.py           DMD (regression on pairs), DMD2 (adversarial)
    implicit.py      SIM, SiD, SiDA, RealUID: distances between scores
    regression.py    the teacher's own map, pair by pair
    consistency.py   CD, CT, iCT, ECT: one answer all along a path of the probability flow
    scm.py           the same in continuous time
    ctm.py           jumps from any level to any other, along a teacher's solver
    flow_maps.py     mean flow and its kin: the mean velocity of a jump
    progressive.py   two steps become one, again and again
    reflow.py        a flow between partners, whose ways are straight
    samples.py       drifting: samples moved towards real ones and apart, no network but the student
    distances.py     MMD, energy score, Sinkhorn: the same rule, down the gradient of a distance between samples
    embedding.py     MMD in features of random networks, alone or as a term of another
    moments.py       inductive moment matching: jumps that make one law
    ratios.py        class ratios and GAN: a classifier of real and made samples
    mismatching.py   score mismatching: a denoiser of real samples only
    flow_steps.py    Wasserstein gradient flow: down an f-divergence, a proximal step at a time
    frozen.py        SDS, ASD: nothing trained but the student, and the teacher asked twice
    forgetting.py    one class's requests held against another's teacher
    bounded.py       any objective, no sample pulled harder than a bound
    mixture.py       score of mixture: all skews at once, from a teacher or from data
    uni_instruct.py  the divergence of the clean laws, expanded
"""

from minidistill import divergences
from minidistill.distillation.objective import Objective
from minidistill.distillation.objectives.bounded import BoundedPull
from minidistill.distillation.objectives.consistency import Consistency, EasyConsistency
from minidistill.distillation.objectives.ctm import ConsistencyTrajectory
from minidistill.distillation.objectives.distances import EnergyScore, MeanDiscrepancy, SinkhornDivergence
from minidistill.distillation.objectives.dmd import DMD, DMD2
from minidistill.distillation.objectives.embedding import EmbeddingLoss
from minidistill.distillation.objectives.flow_maps import AlphaFlow, FlowMap, ImprovedMeanFlow, MeanFlow
from minidistill.distillation.objectives.flow_steps import WassersteinFlow
from minidistill.distillation.objectives.forgetting import ScoreForgetting
from minidistill.distillation.objectives.frozen import AsynchronousScore, ScoreDistillation
from minidistill.distillation.objectives.implicit import (
    AdversarialScoreIdentity,
    RealUID,
    ScoreIdentity,
    ScoreImplicitMatching,
)
from minidistill.distillation.objectives.matching import DistributionMatching, fake_loss, ratio_loss
from minidistill.distillation.objectives.mismatching import ScoreMismatching
from minidistill.distillation.objectives.mixture import ScoreOfMixture, ScoreOfMixtureTraining
from minidistill.distillation.objectives.moments import MomentMatching
from minidistill.distillation.objectives.progressive import Progressive
from minidistill.distillation.objectives.ratios import GAN, ClassRatio
from minidistill.distillation.objectives.reflow import Reflow
from minidistill.distillation.objectives.regression import Regression
from minidistill.distillation.objectives.samples import Drifting
from minidistill.distillation.objectives.scm import ContinuousConsistency
from minidistill.distillation.objectives.uni_instruct import UniInstruct

__all__ = [
    "DMD", "DMD2", "GAN", "OBJECTIVES", "AdversarialScoreIdentity", "AlphaFlow", "AsynchronousScore", "BoundedPull",
    "ClassRatio", "Consistency", "ConsistencyTrajectory", "ContinuousConsistency", "DistributionMatching", "Drifting",
    "EasyConsistency", "EmbeddingLoss", "EnergyScore", "FlowMap", "ImprovedMeanFlow", "MeanDiscrepancy", "MeanFlow",
    "MomentMatching", "Progressive", "RealUID", "Reflow", "Regression", "ScoreDistillation", "ScoreForgetting",
    "ScoreIdentity", "ScoreImplicitMatching", "ScoreMismatching", "ScoreOfMixture", "ScoreOfMixtureTraining",
    "SinkhornDivergence", "UniInstruct", "WassersteinFlow", "fake_loss", "ratio_loss",
]
#: Every objective by name: distribution matching with each f-divergence, reverse KL in its other clothes, the line of
#: skew Jensen-Shannon divergences, the score-implicit family, and trajectories.
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
    "real_uid": RealUID(),
    "regression": Regression(),
    "drifting": Drifting(),
    "sinkhorn": SinkhornDivergence(),
    "mmd": MeanDiscrepancy(),
    "energy_score": EnergyScore(),
    "embedding_loss": EmbeddingLoss(),
    "moment_matching": MomentMatching(),
    "class_ratio": ClassRatio(),
    "gan": GAN(),
    "wasserstein_flow": WassersteinFlow(),
    "sds": ScoreDistillation(),
    "asd": AsynchronousScore(),
    "score_forgetting": ScoreForgetting(),
    "score_mismatching": ScoreMismatching(),
    "score_of_mixture_training": ScoreOfMixtureTraining(),
    "uni_instruct": UniInstruct(divergences.F["jensen_shannon"]),
    "consistency_distillation": Consistency(18, 18, lognormal=False, huber=None, teacher_step=True, scattered=True),
    "consistency_training": Consistency(first=2, last=150, lognormal=False, huber=None),
    "ict": Consistency(),
    "ect": EasyConsistency(),
    "scm": ContinuousConsistency(),
    "ctm": ConsistencyTrajectory(),
    "mean_flow": MeanFlow(),
    "improved_mean_flow": ImprovedMeanFlow(),
    "alpha_flow": AlphaFlow(),
    "flow_map": FlowMap(),
    "progressive": Progressive(),
    "reflow": Reflow(),
}
