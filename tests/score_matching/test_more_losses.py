"""What all losses share: shapes, labels, weights, levels, gradients that reach a network, cost, errors by name."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import linear, silu
from torch.utils.flop_counter import FlopCounterMode

from minidistill import score_matching as sm
from minidistill.networks import Denoiser
from minidistill.networks.unet import UNet
from tests.helpers import f64, mixture_2d, normal, rng, small_denoiser


def all_losses(D, x, noise, slices, sigma, label, weight):
    """Each loss by name, of the same arrays."""
    classes = lambda x, s, y=None: x.flatten(1)[:, :3] * 0.5  # noqa: E731
    logit = lambda x, s, y=None: x.flatten(1).tanh().sum(1)  # noqa: E731
    drift = lambda x, t: x - x**3  # noqa: E731
    return {
        "explicit": sm.explicit_loss(D, x, sigma, noise, label, weight),
        "implicit": sm.implicit_loss(D, x, sigma, label, weight),
        "sliced": sm.sliced_loss(D, x, sigma, slices, label, weight),
        "sliced_vr": sm.sliced_loss(D, x, sigma, slices, label, weight, variance_reduced=True),
        "finite_difference": sm.finite_difference_loss(D, x, sigma, slices, label, weight),
        "lcss": sm.lcss_loss(D, x, sigma, noise, label, weight),
        "sure": sm.sure_loss(D, x, sigma, slices, label, weight),
        "denoising": sm.denoising_loss(D, x, sigma, noise, label, weight),
        "target": sm.target_loss(D, x, sigma, noise, -x, label, weight),
        "mixed": sm.mixed_target_loss(D, x, sigma, noise, -x, sm.optimal_share(sigma, 1.0), label, weight),
        "tiw": sm.tiw_loss(D, x, sigma, noise, logit, label, weight),
        "local_dsm": sm.local_dsm_loss(D, x, sigma, noise, drift, 0.8, 0.0, 0.1, label, weight),
        "penalty": sm.conservative_penalty(D, x, sigma, slices, label, weight),
        "fokker_planck": sm.fokker_planck_loss(D, x, sigma, label, torch.stack([slices, noise]), weight),
        "fokker_planck_exact": sm.fokker_planck_loss(D, x, sigma, label, None, weight),
        "dlsm": sm.dlsm_loss(lambda x, s, y=None: D(x, s, label), x, sigma, noise, classes, label % 3, weight),
    }


def test_images_labels_and_weights():
    """(n, c, h, w) gives what the flat samples give; each sample has its own sigma, label and weight."""
    g = rng()
    x, noise = torch.randn(2, 4, 1, 2, 3, generator=g, dtype=torch.float64)
    slices = sm.rademacher(x, g)
    sigma, weight, label = f64([0.2, 0.5, 1.0, 2.0]), f64([1.0, 2.0, 0.5, 3.0]), torch.tensor([0, 2, 1, 0])
    flat = small_denoiser(shape=(6,), n_classes=3).double()
    image = lambda x, s, y=None: flat(x.flatten(1), s, y).reshape(x.shape)  # noqa: E731
    images = all_losses(image, x, noise, slices, sigma, label, weight)
    vectors = all_losses(flat, *(v.flatten(1) for v in (x, noise, slices)), sigma, label, weight)
    for name, loss in images.items():
        assert loss.shape == (4,)
        torch.testing.assert_close(loss, vectors[name], msg=name)
    for i in range(4):  # one sample at a time is the same
        one = [v[[i]] for v in (x, noise, slices)]
        alone = all_losses(image, *one, float(sigma[i]), label[[i]], weight[[i]])
        for name, loss in images.items():
            torch.testing.assert_close(alone[name], loss[[i]], msg=name)
    other = all_losses(image, x, noise, slices, sigma, (label + 1) % 3, weight)
    assert all((loss != images[name]).all() for name, loss in other.items())


def test_edms_weight_makes_the_networks_error_the_loss():
    """w(sigma) |D_a - D_b|^2 = |F_a - F_b|^2 for two networks in one preconditioning: unit targets at every level."""
    x, sigma = normal(9, 2), torch.logspace(-2, 2, 9, dtype=torch.float64)
    models = [small_denoiser(seed).double() for seed in (0, 1)]
    a, b = (model(x, sigma) for model in models)
    inside = x / (sigma.square() + 0.49).sqrt()[:, None]
    raw_a, raw_b = (model.network(inside, sigma.log() / 4) for model in models)
    weighted = sm.edm_weight(sigma, 0.7)[:, None] * (a - b).square()
    torch.testing.assert_close(weighted, (raw_a - raw_b).square(), rtol=1e-8, atol=1e-10)


def test_noise_levels_in_training_follow_their_laws():
    """Kolmogorov-Smirnov: sup |F_n - F| sqrt(n) exceeds 2 with probability 7e-4."""
    n, standard = 20_000, torch.distributions.Normal(0.0, 1.0)
    bell = standard.cdf((sm.log_normal_sigma(n, -0.7, 1.4, rng(1), "cpu").log() + 0.7) / 1.4)
    flat = (sm.log_uniform_sigma(n, 0.02, 8.0, rng(1), "cpu") / 0.02).log() / math.log(400)
    for u in (bell, flat):
        assert (u.sort().values - (torch.arange(n) + 0.5) / n).abs().max() * math.sqrt(n) < 2


def test_gradients_reach_the_network_and_are_right():
    """Each loss's derivative along a direction of the weights, against a central difference."""
    g = rng()
    x, noise = torch.randn(2, 4, 3, generator=g, dtype=torch.float64)
    slices, sigma, label = sm.rademacher(x, g), f64([0.2, 0.5, 1.0, 2.0]), torch.tensor([0, 1, 2, 0])
    flat = small_denoiser(shape=(3,), hidden=32, depth=2).double()
    D = lambda x, s, y=None: flat(x, s)  # noqa: E731
    weight = flat.network.inward.weight
    direction = torch.randn(weight.shape, generator=g, dtype=torch.float64)

    def losses_at(h):
        with torch.no_grad():
            weight.add_(h * direction)
            out = all_losses(D, x, noise, slices, sigma, label, 1.0)
            weight.sub_(h * direction)
        return out

    ahead, behind = losses_at(1e-5), losses_at(-1e-5)
    losses = all_losses(D, x, noise, slices, sigma, label, 1.0)
    assert not losses.pop("dlsm").requires_grad
    for name, loss in losses.items():
        (slope,) = torch.autograd.grad(loss.mean(), weight)
        numeric = (ahead[name] - behind[name]).mean() / 2e-5
        torch.testing.assert_close((slope * direction).sum(), numeric, rtol=1e-6, atol=1e-7, msg=name)


def test_a_unet_can_be_matched_by_every_loss():
    torch.manual_seed(0)
    net = UNet((1, 4, 4), channels=32, multipliers=(1, 2), blocks=1, attention=(4,), n_classes=3)
    torch.nn.init.normal_(list(net.parameters())[-2], std=0.1)
    g = rng()
    x, noise = torch.randn(2, 2, 1, 4, 4, generator=g)
    slices, sigma, label = sm.rademacher(x, g), torch.tensor([0.5, 1.0]), torch.tensor([0, 2])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        losses = all_losses(Denoiser(net, 0.5), x, noise, slices, sigma, label, 1.0)
        losses.pop("dlsm")
        for name, loss in losses.items():
            assert torch.isfinite(loss).all(), name
            (gradient,) = torch.autograd.grad(loss.mean(), next(net.parameters()), retain_graph=True)
            assert torch.isfinite(gradient).all(), name


def test_trace_free_losses_cost_at_most_three_denoising_steps():
    """Multiplications of a step, forward and backward, in d = 128; the exact trace costs dim times more."""
    g = rng()
    weights = [torch.randn(a, b, generator=g).requires_grad_() for a, b in ((256, 128), (256, 256), (128, 256))]
    x, noise = torch.randn(2, 16, 128, generator=g)

    def D(x, sigma, label=None):  # no Module, whose hooks FlopCounterMode cannot follow into torch.func
        return linear(silu(linear(silu(linear(x, weights[0])), weights[1])), weights[2])

    slices = sm.rademacher(x, g)
    steps = {
        "denoising": lambda: sm.denoising_loss(D, x, torch.tensor(0.5), noise),
        "target": lambda: sm.target_loss(D, x, 0.5, noise, -x),
        "mixed": lambda: sm.mixed_target_loss(D, x, 0.5, noise, -x, 0.5),
        "sliced": lambda: sm.sliced_loss(D, x, 0.5, slices),
        "sliced_vr": lambda: sm.sliced_loss(D, x, 0.5, slices, variance_reduced=True),
        "finite_difference": lambda: sm.finite_difference_loss(D, x, 0.5, slices),
        "lcss": lambda: sm.lcss_loss(D, x, 0.5, noise),
        "sure": lambda: sm.sure_loss(D, x, 0.5, slices),
        "penalty": lambda: sm.conservative_penalty(D, x, 0.5, slices),
        "exact": lambda: sm.implicit_loss(D, x, 0.5, chunk_size=32),
    }
    cost = {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step().mean().backward()
        cost[name] = counter.get_total_flops()
    ratio = {name: value / cost["denoising"] for name, value in cost.items()}
    exact = ratio.pop("exact")
    assert max(ratio.values()) <= 3, ratio
    assert exact > 60


X = torch.zeros(4, 2)
NUMBER: Any = 3.0
BAD = {
    "x is a number": (lambda: sm.implicit_loss(mixture_2d(), NUMBER, 1.0), TypeError, "x is float"),
    "x is whole": (lambda: sm.lcss_loss(mixture_2d(), X.int(), 1.0, X), TypeError, "x is a tensor of torch.int32"),
    "x is flat": (lambda: sm.sliced_loss(mixture_2d(), X[0], 1.0, X[0]), ValueError, "x has shape"),
    "sigma 0": (lambda: sm.implicit_loss(mixture_2d(), X, 0.0), ValueError, "sigma holds 0"),
    "sigma's shape": (lambda: sm.sure_loss(mixture_2d(), X, torch.ones(3)), ValueError, "sigma has shape"),
    "score": (lambda: sm.explicit_loss(mixture_2d(), X, 1.0, X[:, :1]), ValueError, "score has shape"),
    "slices": (lambda: sm.sliced_loss(mixture_2d(), X, 1.0, X[:1]), ValueError, "slices has shape"),
    "SURE's slices": (lambda: sm.sure_loss(mixture_2d(), X, 1.0, X[:1]), ValueError, "slices has shape"),
    "noise": (lambda: sm.target_loss(mixture_2d(), X, 1.0, X[:1], X), ValueError, "noise has shape"),
    "clean_score": (lambda: sm.target_loss(mixture_2d(), X, 1.0, X, NUMBER), TypeError, "clean_score is float"),
    "share": (lambda: sm.mixed_target_loss(mixture_2d(), X, 1.0, X, X, torch.ones(2)), ValueError, "share has shape"),
    "step": (lambda: sm.finite_difference_loss(mixture_2d(), X, 1.0, X, step=0.0), ValueError, "step=0"),
    "tau": (lambda: sm.lcss_loss(mixture_2d(), X, 1.0, X, tau=-1.0), ValueError, "tau=-1"),
    "weight": (lambda: sm.lcss_loss(mixture_2d(), X, 1.0, X, weight=torch.ones(4, 1)), ValueError, "weight has shape"),
    "implicit's weight": (
        lambda: sm.implicit_loss(mixture_2d(), X, 1.0, weight=torch.ones(4, 1)), ValueError, "weight has shape"),
    "denoiser": (lambda: sm.lcss_loss(lambda x, s, y: x[:, :1], X, 1.0, X), ValueError, "denoiser returned shape"),
    "label": (lambda: sm.dlsm_loss(mixture_2d(), X, 1.0, X, lambda x, s: x, torch.ones(4)), ValueError,
              "label is torch.float32"),
    "diffusion": (
        lambda: sm.local_dsm_loss(mixture_2d(), X, 1.0, X, lambda x, t: x, 0.0, 0.0, 0.1), ValueError, "diffusion=0"),
    "drift": (
        lambda: sm.local_step(X, X, lambda x, t: x[:, 0], 1.0, 0.0, 0.1), ValueError, r"drift\(x, t\) has shape"),
    "curl": (lambda: sm.curl(mixture_2d(), torch.zeros(4, 3), 1.0), ValueError, "wanted \\(n, 2\\)"),
    "pair": (
        lambda: sm.fokker_planck_loss(mixture_2d(), X, 1.0, slices=X), ValueError, "slices has shape .* two for each"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
