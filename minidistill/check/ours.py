"""What stands in for an exercise that is not solved yet, where later cells use what it made: same names, same results.

    if not check.one_call(one_call):
        one_call = check.ours.one_call  # the package's own, until yours is correct
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from minidistill import score_matching as sm
from minidistill import training
from minidistill._autodiff import jvp
from minidistill.distillation.batch import Batch, dmd_scale
from minidistill.distillation.objectives import fake_loss, ratio_loss
from minidistill.distributions import GaussianMixture
from minidistill.samplers.ode import heun_step
from minidistill.teachers.closed_form import GaussianTeacher

__all__ = [
    "OwnObjective", "add_noise", "aligned_share", "asd_stand_in", "best_cover", "best_share", "bridge_velocity",
    "chi_squared_conjugate", "class_gradient", "consistency_loss", "cut", "ddim_step", "denoising_loss",
    "distillation_loop", "divergence_weight", "dmd_gradient", "drift", "energy_loss", "energy_pull", "euler_step",
    "even_weight", "flipped_weight", "forgetting_teacher", "gamma_step", "gauge_defect", "gaussian_fisher",
    "gaussian_flow", "heun_solver", "implicit_loss", "kl_integrand", "linear_step", "mean_flow_target",
    "mixture_denoiser", "mixture_score", "one_call", "pseudo_huber_slope", "ratio_pull", "reverse_kl_gradient",
    "score_gap", "stage_at", "stein_trace", "step_score", "training_loop", "tweedie", "unbiased_loss",
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


# ------------------------------------------------- 07_divergences

def flipped_weight(weight: Callable[[Tensor], Tensor], r: Tensor) -> Tensor:
    """The weight at r, (n,), of the divergence with p and q exchanged: h°(u) = u h(1 / u)."""
    return r * weight(1 / r)


def chi_squared_conjugate(u: Tensor) -> Tensor:
    """sup over r >= 0 of u r - (r - 1)^2, (n,)."""
    best = (1 + u / 2).clamp(min=0)
    return u * best - (best - 1).square()


def kl_integrand(p_x0: Tensor, q_x0: Tensor, sigma: Tensor) -> Tensor:
    """|D_p - D_q|^2 / sigma^2, (n,): what samples of p_sigma contribute to KL(p || q) per unit of ln sigma."""
    return (p_x0 - q_x0).square().sum(1) / sigma.square()


# ------------------------------------------------- 07b_from_samples

def energy_loss(first: Tensor, second: Tensor, y: Tensor, alpha: float) -> Tensor:
    """E|X - y|^alpha - E|X - X'|^alpha / 2 from two draws, (n,): first, second and y (n, d)."""
    to_data = ((first - y).norm(dim=1) ** alpha + (second - y).norm(dim=1) ** alpha) / 2
    return to_data - (first - second).norm(dim=1) ** alpha / 2


# ------------------------------------------------- 08_from_divergence_to_gradient

def divergence_weight(f: Callable[[Tensor], Tensor], r: Tensor) -> Tensor:
    """h(r) = r^2 f''(r), (n,), of any differentiable f."""
    at = r.detach().requires_grad_()
    slope = torch.autograd.grad(f(at).sum(), at, create_graph=True)[0]
    return r.detach().square() * torch.autograd.grad(slope.sum(), at)[0]


def reverse_kl_gradient(score_p: Callable[[Tensor], Tensor], mean: Any, std: Any, z: Tensor) -> Tensor:
    """The mean of (s_q - s_p)(x) d x / d (mean, std), (2,), at x = mean + std z, z (n,)."""
    gap = -z / std - score_p(mean + std * z)
    return torch.stack([gap.mean(), (gap * z).mean()])


def best_cover(means: Tensor, stds: Tensor, weights: Tensor) -> Tensor:
    """Mean and standard deviation, (2,), of a mixture on the line, all three (k,)."""
    mean = (weights * means).sum()
    variance = (weights * (stds.square() + (means - mean).square())).sum()
    return torch.stack([mean, variance.sqrt()])


# ------------------------------------------------- 09_distribution_matching

def dmd_gradient(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """The loss's gradient in x0, (n, d): fake less teacher, over how far the teacher moves each sample."""
    return (fake_x0 - teacher_x0) * dmd_scale(x0, teacher_x0)


class OwnObjective:
    """Distribution matching with any weight h, a function of ratios (n,), at DMD's scale."""

    needs_ratio = True

    def __init__(self, weight: Callable[[Tensor], Tensor]) -> None:
        self.weight = weight

    def critic_loss(self, batch: Batch) -> Tensor:
        """The fake network's denoising loss and the ratio network's logistic one, (n,)."""
        return fake_loss(batch) + ratio_loss(batch)

    def generator_loss(self, batch: Batch) -> Tensor:
        """-pull . x0, (n,), the pull held constant."""
        assert batch.ratio is not None
        with torch.no_grad():
            teacher_x0, fake_x0 = batch.denoise_both(batch.xt)
            log_ratio = batch.ratio(batch.xt, batch.sigma, batch.label).clamp(-5, 5)
            gradient = self.weight(log_ratio.exp())[:, None] * dmd_gradient(batch.x0, teacher_x0, fake_x0)
        return (gradient * batch.x0).sum(1)


def mixture_denoiser(teacher_x0: Tensor, fake_x0: Tensor, log_ratio: Tensor, alpha: float) -> Tensor:
    """E[x0 | x] of alpha p + (1 - alpha) q, (n, d): the mean of both, by the probability that x came from p."""
    rho = torch.sigmoid(log_ratio + math.log(alpha / (1 - alpha)))[:, None]
    return rho * teacher_x0 + (1 - rho) * fake_x0


# ------------------------------------------------- 10_score_implicit_matching

def pseudo_huber_slope(y: Tensor, c: float) -> Tensor:
    """d'(y), (n, d), of d(y) = sqrt(|y|^2 + c^2) - c, one for each row of y."""
    return y / (y.square().sum(1, keepdim=True) + c**2).sqrt()


def implicit_loss(
    x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, value: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor], alpha: float,
) -> Tensor:
    """2 (1 - alpha) d(y) - d'(y) . (D_q - x0), (n,), with y = D_q - D_p."""
    y = fake_x0 - teacher_x0
    return 2 * (1 - alpha) * value(y) - (slope(y) * (fake_x0 - x0)).sum(1)


def gaussian_fisher(mean_p: Any, std_p: Any, mean_q: Any, std_q: Any, sigma: Any) -> Any:
    """E (s_p - s_q)^2 over q_sigma, for two Gaussians on the line with noise sigma on both."""
    p, q = std_p**2 + sigma**2, std_q**2 + sigma**2
    return q * (1 / q - 1 / p) ** 2 + ((mean_p - mean_q) / p) ** 2


# ------------------------------------------------- 11_trajectories

def consistency_loss(
    student: Denoise, x: Tensor, below: Tensor, upper: Tensor, lower: Tensor, lowest: float
) -> Tensor:
    """|f(x, upper) - f(below, lower)|^2, (n,), the second held fixed; at the lowest level it is `below` itself."""
    with torch.no_grad():
        answer = torch.where((lower == lowest)[:, None], below, student(below, lower))
    return (student(x, upper) - answer).square().sum(1)


def gamma_step(jump: Denoise, x: Tensor, sigma: Any, after: Any, gamma: float, z: Tensor) -> Tensor:
    """From level sigma to `after`, (n, d), of whose noise the share gamma is new."""
    return jump(x, sigma, (1 - gamma**2) ** 0.5 * after) + gamma * after * z


def mean_flow_target(u: Denoise, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """v - (t - r) du/dt, (n, d), the derivative along dz/dt = v with r held."""
    rate = jvp(u, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))[1]
    return v - (t - r)[:, None] * rate


# ------------------------------------------------- 12_without_a_teacher_score

def drift(x: Tensor, real: Tensor, width: float) -> Tensor:
    """The mean of real samples near each of x, (n, d), less that of the other x near it."""
    def mean_near(squared: Tensor, y: Tensor) -> Tensor:
        return (-squared / (2 * width**2)).softmax(1) @ y

    to_own = torch.cdist(x, x).square().fill_diagonal_(torch.inf)
    return mean_near(torch.cdist(x, real).square(), real) - mean_near(to_own, x)


def energy_pull(x: Tensor, real: Tensor) -> Tensor:
    """The mean unit vector to the real samples less that to the other x, (n, d)."""
    def towards(y: Tensor) -> Tensor:
        way = y - x[:, None]
        return way / way.norm(dim=2, keepdim=True).clamp(min=1e-12)

    return towards(real).mean(1) - towards(x).sum(1) / (len(x) - 1)


def ratio_pull(
    log_ratio: Callable[[Tensor], Tensor], x: Tensor, weight: Callable[[Tensor], Tensor]
) -> Tensor:
    """h(r) grad log r at each of x, (n, d)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        log_r = log_ratio(x)
        slope = torch.autograd.grad(log_r.sum(), x)[0]
    return weight(log_r.detach().exp())[:, None] * slope


# ------------------------------------------------- 13_paths_and_forgetting

def stage_at(progress: float, stages: int, share: float) -> int:
    """The number of the target when so much of the run is over: stages - 1 to 1, then 0."""
    targets = stages - 1
    return 0 if progress >= share else targets - int(progress / share * targets)


def asd_stand_in(teacher: Denoise, x0: Tensor, sigma: Tensor, noise: Tensor, later: Tensor) -> Tensor:
    """What the teacher's noise at the level `later` leaves of x_t, (n, d)."""
    x = x0 + later[:, None] * noise
    seen = (x - teacher(x, later)) / later[:, None]
    return x0 + sigma[:, None] * (noise - seen)


def forgetting_teacher(
    teacher: Denoise, x: Tensor, sigma: Tensor, label: Tensor, forget: int, safe: int
) -> Tensor:
    """The teacher's answer, (n, d), for `safe` where it is asked for `forget`."""
    return teacher(x, sigma, torch.where(label == forget, safe, label))


def cut(pull: Tensor, most: float) -> Tensor:
    """Rows longer than `most` shortened to it, (n, d)."""
    length = pull.norm(dim=1, keepdim=True).clamp(min=torch.finfo(pull.dtype).tiny)
    return pull * (most / length).clamp(max=1)
