"""minidistill: one-step diffusion distillation, small enough to read in an afternoon."""

from minidistill.distillation import Distilled, distill
from minidistill.distributions import GaussianMixture, grid, ring

__version__ = "0.1.0"
__all__ = ["Distilled", "GaussianMixture", "distill", "grid", "ring"]
