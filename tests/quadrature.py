"""The referee of distillation objectives: the student x0 = a z + b in 1-D, with everything exact, by quadrature."""

from typing import Any

import torch

from minidistill.distillation import Batch
from tests.helpers import f64, line, normal_log_prob, normal_pairs

A, B = 0.85, 0.2  # wide enough for Pearson's integral, narrow enough for Neyman's


def student_denoiser(x, a, b, sigma):
    """E[x0 | x] of the Gaussian student N(b, a^2)."""
    return b + a**2 / (a**2 + sigma**2) * (x - b)


class Fake:
    """The student's denoiser, and features whose mean over channels is the log ratio."""

    def __init__(self, a, b, sigma, log_ratio):
        self.a, self.b, self.sigma, self.log_ratio = a, b, sigma, log_ratio

    def __call__(self, x, sigma, label=None):
        return student_denoiser(x, self.a, self.b, self.sigma)

    def features(self, x, sigma, label=None):
        log_r = self.log_ratio(x, sigma, label)[:, None]
        return torch.cat([log_r + x.tanh(), log_r - x.tanh()], 1)


def exact_batch(target, sigma, a, b, z, e, **more: Any):
    """The student's samples a z + b with their graph, noised by e; fake network and ratio exact and frozen, as the
    trained ones are."""
    a0, b0 = a.detach(), b.detach()
    p = target.noised(sigma)

    def log_ratio(x, s, label):
        return p.log_prob(x) - normal_log_prob(x.flatten(), b0, (a0**2 + sigma**2).sqrt())

    return Batch(
        x0=(a * z + b)[:, None], sigma=torch.full_like(z, sigma), noise=e[:, None],
        teacher=lambda x, s, label: target(x, sigma), fake=Fake(a0, b0, sigma, log_ratio), ratio=log_ratio,
        **more,
    )


def loss_gradient(objective, target, sigma, student=(A, B), term=None, **more: Any):
    """d/d(a, b) of the expected generator loss, or of one term of it, by quadrature over z and the noise."""
    a, b = (f64(value).requires_grad_(True) for value in student)
    z, e, weight = normal_pairs()
    batch = exact_batch(target, sigma, a, b, z, e, **more)
    loss = objective.generator_loss(batch) if term is None else objective.terms(batch)[term]
    assert loss.shape == z.shape
    return torch.stack(torch.autograd.grad((weight * loss).sum(), (a, b)))


def exact_gradient(value, student=(A, B)):
    """d/d(a, b) of value(x, a, b, cell), a sum over a fine grid x."""
    a, b = (f64(v).requires_grad_(True) for v in student)
    x, cell = line(-16, 16, 6401)
    return torch.stack(torch.autograd.grad(value(x, a, b, cell), (a, b)))


def relative_error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())
