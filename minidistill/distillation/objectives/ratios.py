"""No critic of scores: one that tells real samples from the student's is all there is.

Told apart at every noise level they give log r = log p / q, and its gradient in x is the difference of the two scores:
class-ratio distillation puts it in the place of both denoisers. A GAN descends a function of log r itself. Whichever
function that is, its gradient is h(r) times the gradient of log r (`FDivergence`), so that a GAN of the right one is
distribution matching, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from minidistill.distillation.batch import Batch, column, no_weights
from minidistill.distillation.objective import Terms
from minidistill.distillation.objectives.matching import DistributionMatching, ratio_loss
from minidistill.distillation.settings import Settings
from minidistill.divergences import F, FDivergence

__all__ = ["GAN", "ClassRatio", "freeze", "gaussian_scale", "gradient_penalty"]


@dataclass(frozen=True)
class ClassRatio(DistributionMatching):
    """Gradient -E[ h(r) grad log r dx/dtheta ] of D_f(p_sigma || q_sigma), averaged over noise levels, log r learned as
    a classifier's logit (Zhang 2025, arXiv 2502.08005): neither the teacher's score nor the student's.

    Everything else is as in `DistributionMatching`, but for its scale: DMD's mean |x0 - D_p| is taken as it were of
    Gaussian data (`gaussian_scale`). r1: of `gradient_penalty` on the classifier.
    """

    divergence: FDivergence = field(default_factory=lambda: F["reverse_kl"])
    r1: float = 0.0
    needs_fake = False

    @property
    def needs_ratio(self) -> bool:
        return True

    def critic_loss(self, batch: Batch) -> Tensor:
        return ratio_loss(batch) + (self.r1 * gradient_penalty(batch) if self.r1 else 0)

    @torch.no_grad()
    def pull(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.ratio is not None
        xt = batch.xt.detach().requires_grad_()
        with torch.enable_grad():
            gradient = torch.autograd.grad(batch.ratio(xt, batch.sigma, batch.label).sum(), xt)[0]
        scale = gaussian_scale(batch) if self.normalise and self.scale else no_weights(xt)
        h = self._weight(batch, xt).reshape(scale.shape) if self.weighs else self._constant()
        # sigma^2 times a difference of scores is one of denoisers.
        return scale * h * column((batch.sigma / batch.sigma_data).square(), xt) * gradient, scale


@dataclass(frozen=True)
class GAN(Terms):
    """A GAN and nothing else: the non-saturating loss softplus(-logit) with R1 (Mescheder 2018), on samples with noise
    of every level. At the exact ratio its pull is (s_p - s_q) / (1 + r), that of the softened reverse KL.

    r1: of `gradient_penalty` on the discriminator.
    frozen: most of a student from the teacher's weights stays as it is (D2O, arXiv 2506.09376: with 85 % frozen there,
        a GAN alone makes a one-step generator of a diffusion model): see `freeze`. For a new student that is no use.
    """

    r1: float = 0.1
    frozen: bool = False
    needs_ratio = True
    needs_fake = False

    def before_training(self, run: Any, settings: Settings) -> None:
        if self.frozen:
            freeze(run.generator)

    def critic_loss(self, batch: Batch) -> Tensor:
        return ratio_loss(batch) + self.r1 * gradient_penalty(batch)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.ratio is not None
        return {"adversarial": softplus(-batch.ratio(batch.xt, batch.sigma, batch.label))}


def gradient_penalty(batch: Batch, step: float = 0.1) -> Tensor:
    """R1, sigma^2 |grad logit|^2 / 2 at noised real samples, (n,): in units of the noise, so that it bounds all levels
    alike. It keeps the logit from growing without end where no sample of the student's is left.

    The square's mean over a random direction e, (logit(x + step sigma e) - logit(x))^2 / (2 step^2), and so without a
    second derivative, which fused attention does not have.
    """
    assert batch.real is not None
    assert batch.ratio is not None
    sigma = column(batch.sigma, batch.real)
    x = batch.real + sigma * batch.noise
    e = torch.randn(x.shape, generator=batch.generator, dtype=x.dtype, device=x.device)
    label = batch.real_label if batch.label is not None else None
    logit, beside = (batch.ratio(at, batch.sigma, label) for at in (x, x + step * sigma * e))
    return ((beside - logit) / step).square() / 2


def gaussian_scale(batch: Batch) -> Tensor:
    """sqrt(sigma^2 + sigma_data^2) / sigma, (n, 1, ..., 1): sigma_data over the root mean square of x0 - E[x0 | x_t],
    were the data Gaussian. It is the level's part of DMD's scale, without a teacher to ask."""
    return column((batch.sigma.square() + batch.sigma_data**2).sqrt() / batch.sigma, batch.x0)


def freeze(generator: nn.Module) -> float:
    """Hold the weights of all inner linear and convolutional layers; what stays free are biases, normalisations,
    embeddings, and the layers that read and write samples. Returns the share of the parameters that is held.

    Raises ValueError if it finds no such layer.
    """
    held = 0
    for name, module in generator.named_modules():
        outer = name.rsplit(".", 1)[-1] in ("first", "inward", "outward")
        if isinstance(module, nn.Linear | nn.Conv2d) and not outer:
            module.weight.requires_grad_(False)
            held += module.weight.numel()
    if not held:
        raise ValueError(f"generator is {type(generator).__name__} without inner layers to freeze; wanted frozen=False")
    return held / sum(parameter.numel() for parameter in generator.parameters())
