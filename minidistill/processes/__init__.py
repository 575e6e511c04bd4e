"""Forward processes: one process in many clothes, each a change of variables of x = x0 + sigma e.

    named.py         DDPM, VP, VE, sub-VP, cosine, EDM, flow, interpolants, alpha-blending, by their alpha and sigma
    process.py       `Process`: what follows from alpha and sigma; `prior_kl`, how far it ends from its prior
    conversions.py   x0, eps, v, score and velocity, each turned into any other
    models.py        models as denoisers and back; alpha-deblending
    two_sided.py     stochastic interpolants between two mixtures
"""

from minidistill.processes.conversions import FROM_PAIR, FROM_X0, TO_PAIR, TO_X0, convert, score_from_denoiser
from minidistill.processes.models import as_denoiser, as_model, deblend
from minidistill.processes.named import PROCESSES, cosine, ddpm, edm, flow, iadb, interpolant, sub_vp, ve, vp
from minidistill.processes.process import Curve, Process, prior_kl
from minidistill.processes.two_sided import TwoSided

__all__ = [
    "FROM_PAIR", "FROM_X0", "PROCESSES", "TO_PAIR", "TO_X0", "Curve", "Process", "TwoSided", "as_denoiser", "as_model",
    "convert", "cosine", "ddpm", "deblend", "edm", "flow", "iadb", "interpolant", "prior_kl", "score_from_denoiser",
    "sub_vp", "ve", "vp",
]
