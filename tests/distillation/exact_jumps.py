"""Flow maps that are known, for the trajectory objectives: of a Gaussian in closed form, of a mixture by quantiles."""

import torch

from minidistill.distillation import Batch
from tests.helpers import mixture_1d, normal

STD = 1.7


def radius(s):
    return (STD**2 + s**2).sqrt()


def flow(x, sigma, label=None, to=0.0, aim=False):
    """Of N(0, STD^2): J = x R(to) / R(sigma), R(s)^2 = STD^2 + s^2, and its aim, where the line through both ends,
    with the cancellation at to = sigma taken out by hand."""
    s, r = (torch.as_tensor(v, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1)) for v in (sigma, to))
    if not aim:
        return x * radius(r) / radius(s)
    return x * STD**2 * (s + r) / (radius(s) * (s * radius(r) + r * radius(s)))


def denoiser(x, sigma, label=None):
    """Of N(0, STD^2)."""
    s = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return x * STD**2 / radius(s) ** 2


def cdf(mixture, x, sigma):
    """Of a 1-D mixture's noised law, (n, 1) at levels (n,)."""
    std = (mixture.covs[:, 0, 0] + sigma[:, None] ** 2).sqrt()
    return (mixture.weights * torch.special.ndtr((x - mixture.means[:, 0]) / std)).sum(1, keepdim=True)


def quantile_jump(x, sigma, label=None, to=0.0, aim=False):
    """Of `mixture_1d()`: in one dimension paths do not cross, so the flow keeps every point's quantile (n, 1)."""
    mixture = mixture_1d()
    sigma, to = (torch.as_tensor(v, dtype=x.dtype).expand(len(x)) for v in (sigma, to))
    wanted = cdf(mixture, x, sigma)
    low, high = x - 200 * (1 + sigma[:, None]), x + 200 * (1 + sigma[:, None])
    for _ in range(80):
        middle = (low + high) / 2
        below = cdf(mixture, middle, to) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    landed, share = (low + high) / 2, (to / sigma)[:, None]
    return (landed - share * x) / (1 - share) if aim else landed


def batch_of(rule, n=64, progress=0.5, student=flow, teacher=denoiser, std=STD, d=3, **more):
    """What `distill` would hand over, in float64, for data N(0, std^2)."""
    generator = torch.Generator().manual_seed(0)
    settings = type("S", (), {"sigma_data": std, "sigma_init": rule.sigma_init * std})()
    sigma = rule.noise_levels(n, settings, progress, generator).double()
    real = std * normal(n, d, seed=1)
    return Batch(torch.zeros_like(real), sigma, normal(n, d, seed=2), teacher, real=real, sigma_data=std,
                 uniform=torch.rand(n, generator=generator).double(), student=student, progress=progress, **more)


class Bent:
    """A student of two numbers whose jumps are wrong: its aim is the exact one times 1 + a sin(x + sigma - b to)."""

    def __init__(self, a=0.3, b=0.5):
        self.a, self.b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b))

    def __call__(self, x, sigma, label=None, to=0.0, aim=False):
        s, r = (torch.as_tensor(v, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1)) for v in (sigma, to))
        g = flow(x, sigma, None, to, aim=True) * (1 + self.a * (x / radius(s) + 1 / (1 + s) - self.b / (1 + r)).sin())
        return g if aim else r / s * x + (1 - r / s) * g

    def gradient(self, loss):
        return torch.stack(torch.autograd.grad(loss, [self.a, self.b], allow_unused=True, materialize_grads=True,
                                               retain_graph=True))
