"""Teachers: anything that denoises, D(x, sigma, label). All of them meet in the same samplers and distillations.

    exact        GaussianMixture (distributions.py)             the target's own denoiser, at every noise level
    Gaussian     GaussianTeacher (closed_form.py)               mean and covariance of data, flow in closed form
    empirical    EmpiricalTeacher (closed_form.py)              softmax over the data set; smoothing > 0 generalises
    learned      train_denoiser (learned.py)                    EDM preconditioning around any network
    borrowed     from_diffusers (diffusers_teacher.py)          trained elsewhere
    calibrated   calibrated (guidance.py)                       any denoiser, its mean error taken off
    guided       classifier_free, classifier_guided, autoguided (guidance.py)    extrapolated from a weaker one
    energy       distil_energy (energy.py)                      the gradient of a scalar, distilled from any of these
"""

from minidistill.teachers.closed_form import EmpiricalTeacher, GaussianTeacher
from minidistill.teachers.diffusers_teacher import DiffusersDenoiser, from_diffusers
from minidistill.teachers.energy import EnergyDenoiser, distil_energy
from minidistill.teachers.guidance import (
    Calibrated,
    Guided,
    aligned_guidance_loss,
    autoguided,
    calibrated,
    classifier_free,
    classifier_guided,
)
from minidistill.teachers.learned import train_denoiser

__all__ = [
    "Calibrated", "DiffusersDenoiser", "EmpiricalTeacher", "EnergyDenoiser", "GaussianTeacher", "Guided",
    "aligned_guidance_loss", "autoguided", "calibrated", "classifier_free", "classifier_guided", "distil_energy",
    "from_diffusers", "train_denoiser",
]
