"""Distil a diffusion teacher to one step: `distill(teacher, objective="reverse_kl", steps=...)`.

    start.py       `distill`: arguments checked, networks prepared, the loop run
    batch.py       what an objective sees            objectives/   what is minimised, one file a family
    prepare.py     the networks to start from        plateau.py    when to stop
    pairs.py       noise and the teacher's samples   diagnosis.py  a look into a running distillation
    student.py     one step or several               loop.py       critic and generator steps
"""

from minidistill.distillation.batch import Batch, Terms, term_gradients
from minidistill.distillation.diagnosis import Diagnosis, diagnose
from minidistill.distillation.loop import SCHEDULES, Objective
from minidistill.distillation.objectives import (
    DMD,
    DMD2,
    OBJECTIVES,
    AdversarialScoreIdentity,
    DistributionMatching,
    ScoreIdentity,
    ScoreImplicitMatching,
    ScoreOfMixture,
    UniInstruct,
)
from minidistill.distillation.prepare import Needs
from minidistill.distillation.start import distill
from minidistill.distillation.student import Distilled, draw

__all__ = [
    "DMD", "DMD2", "OBJECTIVES", "SCHEDULES", "AdversarialScoreIdentity", "Batch", "Diagnosis", "Distilled",
    "DistributionMatching", "Needs", "Objective", "ScoreIdentity", "ScoreImplicitMatching", "ScoreOfMixture", "Terms",
    "UniInstruct", "diagnose", "distill", "draw", "term_gradients",
]
