"""Distill a diffusion teacher to one step: `distill(teacher, objective="reverse_kl", steps=...)`.

    start.py       `distill`: arguments checked, networks prepared, the loop run
    objectives/    what is minimised, one file a family
    objective.py   what an objective is, and what it may ask for
    batch.py       what an objective sees
    settings.py    the numbers of a run, checked once
    prepare.py     the networks to start from
    empirical.py   the student's own denoiser without a network
    pairs.py       noise and the teacher's samples of it
    loop.py        critic steps, a generator step, an average
    student.py     what `distill` returns
    plateau.py     when to stop
    diagnosis.py   a look into a running distillation
    way_back.py    DisBack: any objective, its targets on the way back to the teacher
    particles.py   flows of samples without a student
"""

from minidistill.distillation.batch import Batch
from minidistill.distillation.diagnosis import Diagnosis, diagnose
from minidistill.distillation.objective import Needs, Objective, Terms, term_gradients
from minidistill.distillation.objectives import (
    DMD,
    DMD2,
    GAN,
    OBJECTIVES,
    AdversarialScoreIdentity,
    AlphaFlow,
    AsynchronousScore,
    BoundedPull,
    ClassRatio,
    Consistency,
    ConsistencyTrajectory,
    ContinuousConsistency,
    DistributionMatching,
    Drifting,
    EasyConsistency,
    EmbeddingLoss,
    EnergyScore,
    FlowMap,
    ImprovedMeanFlow,
    MeanDiscrepancy,
    MeanFlow,
    MomentMatching,
    Progressive,
    RealUID,
    Reflow,
    Regression,
    ScoreDistillation,
    ScoreForgetting,
    ScoreIdentity,
    ScoreImplicitMatching,
    ScoreMismatching,
    ScoreOfMixture,
    ScoreOfMixtureTraining,
    SinkhornDivergence,
    UniInstruct,
    WassersteinFlow,
)
from minidistill.distillation.particles import Flow, particle_flow, wasserstein_flow
from minidistill.distillation.settings import SCHEDULES, Settings
from minidistill.distillation.start import distill
from minidistill.distillation.student import Distilled
from minidistill.distillation.way_back import backtracking
from minidistill.networks import draw

__all__ = [
    "DMD", "DMD2", "GAN", "OBJECTIVES", "SCHEDULES", "AdversarialScoreIdentity", "AlphaFlow", "AsynchronousScore",
    "Batch", "BoundedPull", "ClassRatio", "Consistency", "ConsistencyTrajectory", "ContinuousConsistency", "Diagnosis",
    "Distilled", "DistributionMatching", "Drifting", "EasyConsistency", "EmbeddingLoss", "EnergyScore", "Flow",
    "FlowMap", "ImprovedMeanFlow", "MeanDiscrepancy", "MeanFlow", "MomentMatching", "Needs", "Objective", "Progressive",
    "RealUID", "Reflow", "Regression", "ScoreDistillation", "ScoreForgetting", "ScoreIdentity", "ScoreImplicitMatching",
    "ScoreMismatching", "ScoreOfMixture", "ScoreOfMixtureTraining", "Settings", "SinkhornDivergence", "Terms",
    "UniInstruct", "WassersteinFlow", "backtracking", "diagnose", "distill", "draw", "particle_flow", "term_gradients",
    "wasserstein_flow",
]
