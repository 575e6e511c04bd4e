"""Of notebooks 07 to 13: divergences and what a student descends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidistill._autodiff import jvp
from minidistill.distillation.batch import Batch, dmd_scale
from minidistill.distillation.objectives import fake_loss, ratio_loss

__all__ = [
    "OwnObjective", "asd_stand_in", "best_cover", "chi_squared_conjugate", "consistency_loss", "cut",
    "divergence_weight", "dmd_gradient", "drift", "energy_loss", "energy_pull", "flipped_weight", "forgetting_teacher",
    "gamma_step", "gaussian_fisher", "implicit_loss", "kl_integrand", "mean_flow_target", "mixture_denoiser",
    "pseudo_huber_slope", "ratio_pull", "reverse_kl_gradient", "stage_at",
]

Denoise = Callable[..., Tensor]


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
