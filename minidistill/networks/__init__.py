"""Networks, and the thin wrappers that give them a noise level.

    contract.py         what a teacher is, probed once
    mlp.py              a residual MLP, F(x, c_noise, label)
    unet.py             a U-Net for images, in three sizes
    denoisers.py        EDM's preconditioning; `Denoiser`, `Generator`, `Correction`, `Affine`
    jumps.py            from any level to any other: J(x, sigma, to)
    draws.py            samples of a student, whoever asks for them
    discriminators.py   log p_sigma / q_sigma: a network of its own, or a head on a denoiser's features
"""

from minidistill.networks.contract import Teacher, estimate_sigma_data, probe
from minidistill.networks.denoisers import (
    Affine,
    Correction,
    Denoiser,
    Generator,
    Preconditioned,
    check_input,
    reserve_null_class,
)
from minidistill.networks.discriminators import Discriminator, FeatureDiscriminator
from minidistill.networks.draws import calls_of, device_of, draw
from minidistill.networks.jumps import jump, told_where
from minidistill.networks.mlp import MLP, NoiseEmbedding
from minidistill.networks.unet import PRESETS, UNet, grow, preset

__all__ = [
    "MLP", "PRESETS", "Affine", "Correction", "Denoiser", "Discriminator", "FeatureDiscriminator", "Generator",
    "NoiseEmbedding", "Preconditioned", "Teacher", "UNet", "calls_of", "check_input", "device_of", "draw",
    "estimate_sigma_data", "grow", "jump", "preset", "probe", "reserve_null_class", "told_where",
]
