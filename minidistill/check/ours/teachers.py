"""Of notebooks 00 to 06: scores, the losses that learn them, samplers, and the loop of the first distillation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from minidistill import score_matching as sm
from minidistill import training
from minidistill.distillation.batch import dmd_scale
from minidistill.distributions import GaussianMixture
from minidistill.samplers.ode import heun_step
from minidistill.teachers.closed_form import GaussianTeacher

__all__ = [
    "add_noise", "aligned_share", "best_share", "bridge_velocity", "class_gradient", "ddim_step", "denoising_loss",
    "distillation_loop", "euler_step", "even_weight", "gauge_defect", "gaussian_flow", "heun_solver", "linear_step",
    "mixture_score", "one_call", "score_gap", "stein_trace", "step_score", "training_loop", "tweedie", "unbiased_loss",
    "uniform_time_density", "velocity", "weighted_denoiser",
]

Denoise = Callable[..., Tensor]


# ------------------------------------------------- 00_quickstart

def one_call(denoiser: Denoise, z: Tensor, sigma: float) -> Tensor:
    """One Euler step of the probability flow from sigma z, (n, d), to level 0: it lands on the denoiser."""
    return denoiser(sigma * z, sigma)


def score_gap(teacher_x0: Tensor, fake_x0: Tensor, sigma: Tensor) -> Tensor:
    """s_p - s_q from two denoised points (n, d) and their noise levels (n,)."""
    return (teacher_x0 - fake_x0) / sigma.square().unsqueeze(1)


def distillation_loop(
    teacher: GaussianMixture, student: torch.nn.Module, fake: torch.nn.Module, steps: int, rng: torch.Generator
) -> torch.nn.Module:
    """Train the student in place by reverse KL with DMD's weight, and return it: a denoiser that is called once, at
    half the data's standard deviation. The fake network learns the student's own denoiser, three updates for each of
    the student's."""
    n, scale = 256, teacher.sigma_data
    student_optimizer = torch.optim.Adam(student.parameters(), 2e-3, betas=(0.0, 0.99))
    fake_optimizer = torch.optim.Adam(fake.parameters(), 5e-3, betas=(0.0, 0.99))
    for _ in range(steps):
        x0 = one_call(student, torch.randn(n, 2, generator=rng), 0.5 * scale)
        for _ in range(3):
            sigma, noise = _levels(n, scale, rng), torch.randn(n, 2, generator=rng)
            loss = sm.denoising_loss(fake, x0.detach(), sigma, noise, weight=sm.edm_weight(sigma, scale))
            training.optimizer_step(loss.mean(), fake_optimizer)
        sigma = _levels(n, scale, rng)
        xt = add_noise(x0, sigma, torch.randn(n, 2, generator=rng))
        with torch.no_grad():
            teacher_x0 = teacher(xt, sigma)
            gap = score_gap(teacher_x0, fake(xt, sigma), sigma)
            pull = sigma[:, None].square() * gap * dmd_scale(x0, teacher_x0)
        training.optimizer_step(-(pull * x0).sum(1).mean(), student_optimizer)
    return student


def _levels(n: int, scale: float, rng: torch.Generator) -> Tensor:
    return sm.log_uniform_sigma(n, 0.035 * scale, 5 * scale, rng, "cpu")


# ------------------------------------------------- 01_scores_and_mixtures

def add_noise(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x0 + sigma noise, (n, d), for noise levels (n,)."""
    return x0 + sigma.unsqueeze(1) * noise


def mixture_score(x: Tensor, means: Tensor, stds: Tensor, weights: Tensor) -> Tensor:
    """The score (n, d) of sum_k w_k N(mu_k, s_k^2 I)."""
    return GaussianMixture(means, stds, weights).score(x)


def tweedie(score: Callable[[Tensor], Tensor], x: Tensor, sigma: float) -> Tensor:
    """E[x0 | x] from the score of the noised law."""
    return x + sigma**2 * score(x)


def euler_step(denoiser: Denoise, x: Tensor, sigma: float, after: float) -> Tensor:
    """One Euler step of the probability flow, from level sigma to the level after it."""
    return x + (after - sigma) * (x - denoiser(x, sigma)) / sigma


# ------------------------------------------------- 02_score_matching

def denoising_loss(denoiser: Denoise, x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """|D(x0 + sigma noise, sigma) - x0|^2 / d, (n,)."""
    return (denoiser(add_noise(x0, sigma, noise), sigma) - x0).square().mean(1)


def even_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """One over the variance of x0 given x = x0 + sigma e, for x0 from N(0, sigma_data^2): the precisions add, (n,)."""
    return 1 / sigma**2 + 1 / sigma_data**2


def training_loop(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """So many steps of the optimizer on loss(), a fresh scalar each time; all losses."""
    losses: list[float] = []
    for _ in range(steps):
        value: Any = loss()
        training.optimizer_step(value, optimizer)
        losses.append(value.item())
    return losses


# ------------------------------------------------- 02b_more_losses

def stein_trace(field: Callable[[Tensor], Tensor], x: Tensor, noise: Tensor, radius: float) -> Tensor:
    """e . (s(x + r e) - s(x)) / r, (n,), whose mean is the trace of the field's Jacobian, up to O(r^2)."""
    return (noise * (field(x + radius * noise) - field(x))).sum(1) / radius


def best_share(target: float, denoising: float, covariance: float) -> float:
    """The share of the first in the mix of two unbiased targets that varies least."""
    return (denoising - covariance) / (target + denoising - 2 * covariance)


# ------------------------------------------------- 03_conditional_and_curl_free

def class_gradient(W: Tensor, probabilities: Tensor, label: Tensor) -> Tensor:
    """The gradient (n, d) in x of log softmax(W x + b)[label]: the label's row of W less the mean row."""
    return W[label] - probabilities @ W


def gauge_defect(jacobian: Tensor, r: Tensor, score: Tensor) -> Tensor:
    """div r + r . score, (n,), which is 0 where adding r to the score leaves the density as it is."""
    return jacobian.diagonal(dim1=1, dim2=2).sum(1) + (r * score).sum(1)


# ------------------------------------------------- 03b_nonlinear_drift

def step_score(after: Tensor, before: Tensor, drift: Tensor, g: float, step: float) -> Tensor:
    """The score (n, d) at `after` of an Euler step from `before`: that of N(before + drift step, g^2 step)."""
    return -(after - before - drift * step) / (g**2 * step)


def linear_step(x: Tensor, drift: Tensor, slope: Tensor, g: float, step: float) -> tuple[Tensor, Tensor]:
    """Mean and variance, (n, 1) each, after `step` of dx = (drift + slope (x - x_s)) dt + g dW from x_s."""
    return x + drift * torch.expm1(slope * step) / slope, g**2 * torch.expm1(2 * slope * step) / (2 * slope)


# ------------------------------------------------- 04_processes

def velocity(x: Tensor, x0: Tensor, alpha: Any, sigma: Any, d_alpha: Any, d_sigma: Any) -> Tensor:
    """alpha' x0 + sigma' e with the noise e = (x - alpha x0) / sigma that x and x0 imply, (n, d)."""
    return d_alpha * x0 + d_sigma * (x - alpha * x0) / sigma


def uniform_time_density(level: Any) -> Any:
    """Density of ln level for level = t / (1 - t) and t uniform on [0, 1]: the logistic law, t (1 - t)."""
    return level / (1 + level) ** 2


def bridge_velocity(x0: Tensor, x1: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """d x_t / dt of x_t = (1 - t) x0 + t x1 + sqrt(t (1 - t)) z, (n, d), for t (n, 1)."""
    return x1 - x0 + (1 - 2 * t) / (2 * (t * (1 - t)).sqrt()) * z


# ------------------------------------------------- 05_teachers, 05b_biased_and_guided

def weighted_denoiser(x: Tensor, data: Tensor, weights: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x], (n, d), for points (m, d) with probabilities (m,) at noise levels (n,)."""
    square = (x[:, None] - data).square().sum(2)
    return (weights.log() - square / (2 * sigma[:, None].square())).softmax(1) @ data


def aligned_share(scales: Tensor) -> Tensor:
    """The rho that minimises the mean of (w rho - 1)^2 over the scales w, (m,)."""
    return scales.mean() / scales.square().mean()


def unbiased_loss(denoised: Tensor, x0: Tensor, sigma: Tensor, log_ratio: Tensor, slope: Tensor) -> Tensor:
    """r |D - (x0 + sigma^2 grad log r)|^2 / d, (n,): denoising biased data for the unbiased law's denoiser."""
    target = x0 + sigma[:, None].square() * slope
    return log_ratio.exp() * (denoised - target).square().mean(1)


# ------------------------------------------------- 06_samplers

def heun_solver(denoiser: Denoise, x: Tensor, levels: Tensor) -> Tensor:
    """Heun's method from levels[0] down to the last one, Euler's step where that is 0."""
    for sigma, after in pairwise(levels):
        x = heun_step(denoiser, x, sigma, after)
    return x


def ddim_step(x: Tensor, x0: Tensor, sigma: Any, after: Any, eta: float, z: Tensor) -> Tensor:
    """x0 with noise of level `after`, of which a part is z and the rest what x already has."""
    fresh = eta * after * (1 - (after / sigma) ** 2) ** 0.5
    return x0 + (after**2 - fresh**2) ** 0.5 * (x - x0) / sigma + fresh * z


def gaussian_flow(
    x: Tensor, sigma: float, after: float, mean: Tensor, variances: Tensor, axes: Tensor
) -> Tensor:
    """The probability flow of N(mean, U diag(variances) U'), with U = axes, from level sigma to `after`, (n, d)."""
    return GaussianTeacher.from_moments(mean, (axes * variances) @ axes.T).flow(x, sigma, after)
