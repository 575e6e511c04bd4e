"""Random numbers, quadrature rules, small mixtures, processes and networks that several test files share."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minidistill.distributions import GaussianMixture, ring
from minidistill.networks import MLP, Denoiser
from minidistill.processes import PROCESSES, cosine, ddpm, edm, interpolant, sub_vp, ve, vp
from minidistill.samplers import karras_sigmas


class LargestTensor(TorchDispatchMode):
    """`elements`: how many the largest tensor has that is made inside the `with` and takes memory."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            fresh = isinstance(t, torch.Tensor) and t.device.type != "meta" and all(
                not isinstance(a, torch.Tensor) or a.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()
                for a in args)
            self.elements = max(self.elements, t.numel()) if fresh else self.elements
        return out


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


def start(n, sigma=80.0, seed=0, d=1):
    """Where n samples begin that are to be walked down from the level sigma, (n, d)."""
    return sigma * normal(n, d, seed=seed)


def levels(n, low=0.002, high=80.0, **options):
    return karras_sigmas(n, low, high, dtype=torch.float64, **options)


def fitted_slope(counts, errors):
    """Of log error against log count, by least squares."""
    x, y = f64(counts).log(), f64(errors).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def assert_close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def line(low, high, n):
    """Trapezoid nodes (n,) and the cell's width; spectrally accurate for integrands that vanish at both ends."""
    nodes = torch.linspace(low, high, n, dtype=torch.float64)
    return nodes, float(nodes[1] - nodes[0])


def normal_pairs(reach=12.0, n=201):
    """Nodes z, e and weights, each (n^2,): a rule for E over two independent standard normals, exact far into
    the tails, where ratios of densities are large."""
    nodes, step = line(-reach, reach, n)
    weight = torch.exp(-nodes.square() / 2) * step / math.sqrt(2 * math.pi)
    z, e = torch.cartesian_prod(nodes, nodes).T
    return z, e, torch.outer(weight, weight).flatten()


def normal_log_prob(x, mean, std):
    log_std = torch.log(torch.as_tensor(std, dtype=torch.float64))
    return -0.5 * ((x - mean) / std) ** 2 - log_std - 0.5 * math.log(2 * math.pi)


def mixture_1d(kind="two"):
    """Two 1-D mixtures in float64: unequal weights and widths."""
    if kind == "two":
        return GaussianMixture(f64([[-1.0], [1.2]]), f64([0.5, 0.7]), f64([0.4, 0.6]))
    return GaussianMixture(f64([[-1.3], [0.1], [1.0]]), f64([0.6, 0.4, 0.75]), f64([1.0, 2.0, 3.0]))


def mixture_2d():
    """Three correlated Gaussians in the plane, float64."""
    covs = f64([[[0.5, 0.3], [0.3, 0.4]], [[0.2, -0.1], [-0.1, 0.6]], [[0.3, 0.0], [0.0, 0.1]]])
    return GaussianMixture(f64([[-1.0, 0.5], [1.5, 0.0], [0.0, -1.0]]), covs, f64([0.2, 0.5, 0.3]))


def small_ring():
    return ring(k=4, radius=1.0, std=0.2)


#: Every process with its usual constants, and some with others.
MANY = {
    **PROCESSES, "edm_80": lambda: edm(80.0), "ve_other": lambda: ve(0.1, 5.0), "vp_other": lambda: vp(1.0, 5.0),
    "sub_vp_other": lambda: sub_vp(1.0, 5.0), "ddpm_50": lambda: ddpm(50), "cosine_other": lambda: cosine(0.1),
    "bridge": lambda: interpolant(1.0), "latent_0": lambda: interpolant(0.0), "latent_5": lambda: interpolant(5.0),
}


def times(p, n=25):
    """Times of a process, (n + 4,), four of them next to the ends."""
    share = torch.cat([f64([1e-4, 1e-3]), torch.linspace(0.01, 0.99, n, dtype=torch.float64), f64([0.999, 1 - 1e-5])])
    return p.t_min + (p.t_max - p.t_min) * share


def small_denoiser(seed=0, shape=(2,), n_classes=0, hidden=16, depth=1):
    torch.manual_seed(seed)
    return Denoiser(MLP(shape, hidden=hidden, depth=depth, n_classes=n_classes), 0.7)


def states_equal(a, b):
    """Whether two state_dicts hold the same tensors to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def clone_state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}
