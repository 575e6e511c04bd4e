"""Quadrature rules, small mixtures and small networks that several test files share."""

import math

import torch

from minidistill.distributions import GaussianMixture, ring
from minidistill.networks import MLP, Denoiser


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


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


def small_denoiser(seed=0, shape=(2,), n_classes=0, hidden=16):
    torch.manual_seed(seed)
    return Denoiser(MLP(shape, hidden=hidden, depth=1, n_classes=n_classes), 0.7)


def states_equal(a, b):
    """Whether two state_dicts hold the same tensors to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def clone_state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}
