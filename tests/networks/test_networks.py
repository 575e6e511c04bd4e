"""Networks: EDM's preconditioning, shapes, gradients, the fake network's start, and input checks."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from minidistill.distributions import ring
from minidistill.networks import MLP, Affine, Correction, Denoiser, Discriminator, FeatureDiscriminator, Generator
from minidistill.networks.unet import UNet
from tests.helpers import small_denoiser


class Recorder(nn.Module):
    """Stands in for a network: keeps what it was given and answers with a fixed function of it."""

    shape, n_classes = (2,), 0

    def forward(self, x, c_noise, label=None):
        self.x, self.c_noise = x, c_noise
        return torch.sin(x) + c_noise[:, None]


@pytest.mark.parametrize("sigma_data", [0.5, 3.0])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
def test_denoiser_is_edms_table(sigma, sigma_data):
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = sigma**2 + sigma_data**2
    inside = torch.sin(x / math.sqrt(total)) + math.log(sigma) / 4
    wanted = sigma_data**2 / total * x + sigma * sigma_data / math.sqrt(total) * inside
    for level in (sigma, torch.full((5,), sigma, dtype=torch.float64)):
        torch.testing.assert_close(Denoiser(Recorder(), sigma_data)(x, level), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 30.0])
def test_network_input_and_target_have_unit_variance(sigma):
    """Var c_in x = 1 and Var (x0 - c_skip x) / c_out = 1, within 4 standard errors, for data of std sigma_data."""
    n, sigma_data = 50_000, 1.7
    x0, e = torch.randn(2, n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = sigma_data * x0
    x, network = x0 + sigma * e, Recorder()
    out = Denoiser(network, sigma_data)(x, sigma)
    error = 4 * math.sqrt(2 / (2 * n))
    assert abs(float(network.x.var()) - 1) < error
    c_out = sigma * sigma_data / math.hypot(sigma, sigma_data)
    skipped = out - c_out * (torch.sin(network.x) + network.c_noise[:, None])
    assert abs(float(((x0 - skipped) / c_out).var()) - 1) < error


def test_denoiser_tends_to_the_identity_without_noise():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    gaps = [float((small_denoiser()(x, s) - x).detach().abs().max()) for s in (1e-1, 1e-3, 1e-5)]
    assert gaps[1] < 0.1 * gaps[0]
    assert gaps[2] < 1e-4


def test_generator_is_its_denoiser_at_sigma_init():
    z, denoiser = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), small_denoiser()
    assert torch.equal(Generator(denoiser, 3.0)(z), denoiser(3.0 * z, 3.0))
    label, conditional = torch.arange(6) % 3, small_denoiser(n_classes=3)
    out = Generator(conditional, 3.0)(z, label)
    assert torch.equal(out, conditional(3.0 * z, 3.0, label))
    assert not torch.equal(out, conditional(3.0 * z, 3.0, (label + 1) % 3))


def test_discriminator_gives_one_logit_a_sample_at_its_own_level():
    torch.manual_seed(0)
    ratio = Discriminator(MLP((2,), hidden=8, depth=1, out_features=1), 1.0)
    x, sigma = torch.randn(4, 2), torch.tensor([0.1, 0.5, 1.0, 5.0])
    out = ratio(x, sigma)
    assert out.shape == (4,)
    each = torch.cat([ratio(x[i : i + 1], float(s)) for i, s in enumerate(sigma)])
    torch.testing.assert_close(out, each, rtol=1e-5, atol=1e-6)


def test_correction_starts_as_its_teacher_and_does_not_hold_it():
    """Equal to the teacher at first; not after a change; the teacher's weights are neither saved nor trained."""
    teacher = small_denoiser(seed=1)
    network = MLP((2,), hidden=8, depth=1)
    fake = Correction(teacher, network, 0.7)
    x, sigma = torch.randn(5, 2), torch.tensor([0.05, 0.3, 1.0, 5.0, 30.0])
    torch.testing.assert_close(fake(x, sigma), teacher(x, sigma), rtol=1e-5, atol=1e-5)
    assert all(key.startswith("denoiser.network.") for key in fake.state_dict())
    assert not {id(p) for p in fake.parameters()} & {id(p) for p in teacher.parameters()}
    nn.init.constant_(network.outward.bias, 1.0)
    gap = fake(x, sigma) - teacher(x, sigma)  # F = 1 adds c_out
    c_out = sigma * 0.7 / (sigma**2 + 0.7**2).sqrt()
    torch.testing.assert_close(gap, c_out[:, None].expand(5, 2), rtol=1e-4, atol=1e-4)


def test_correction_of_an_exact_mixture():
    target, x = ring(), torch.randn(5, 2)
    fake = Correction(target, MLP((2,), hidden=8, depth=1), 1.4)
    torch.testing.assert_close(fake(x, 0.5), target(x, 0.5), rtol=1e-5, atol=1e-5)


UNETS: dict[str, dict[str, Any]] = {
    "8x8x1": {"shape": (1, 8, 8), "channels": 8, "blocks": 1},
    "attention": {"shape": (1, 8, 8), "channels": 8, "blocks": 1, "attention": (8, 4)},
    "classes": {"shape": (1, 8, 8), "channels": 8, "blocks": 2, "n_classes": 10},
    "32x32x3": {"shape": (3, 32, 32), "channels": 8, "multipliers": (1, 2, 2), "blocks": 1, "attention": (8,),
                "n_classes": 3},
    "heads": {"shape": (2, 8, 4), "channels": 128, "multipliers": (1,), "blocks": 1},
}


@pytest.mark.parametrize("name", UNETS)
def test_unet_keeps_shapes_and_gradients_reach_every_parameter(name):
    """The zero-initialised layers are perturbed first: at zero they stop what is behind them."""
    torch.manual_seed(0)
    network = UNet(**UNETS[name])
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    x, c_noise = torch.randn(2, *network.shape), torch.tensor([0.3, -0.4])
    label = torch.tensor([0, 1]) if network.n_classes else None
    out = network(x, c_noise, label)
    assert out.shape == x.shape
    out.square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", UNETS)
def test_unet_treats_samples_separately(name):
    torch.manual_seed(0)
    network = UNet(**UNETS[name]).eval()
    x, c_noise = torch.randn(3, *network.shape), torch.tensor([0.3, -0.4, 0.9])
    label = torch.tensor([0, 1, 2]) if network.n_classes else None
    with torch.no_grad():
        alone = network(x[1:2], c_noise[1:2], None if label is None else label[1:2])
        torch.testing.assert_close(network(x, c_noise, label)[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [
    lambda: MLP((2,), hidden=8, n_classes=3), lambda: UNet((1, 8, 8), channels=8, n_classes=3),
], ids=["mlp", "unet"])
def test_noise_level_and_label_matter(build):
    torch.manual_seed(0)
    network = build()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, *network.shape)
    base = network(x, torch.tensor([0.1]), torch.tensor([0]))
    assert not torch.equal(base, network(x, torch.tensor([0.9]), torch.tensor([0])))
    assert not torch.equal(base, network(x, torch.tensor([0.1]), torch.tensor([2])))


def test_mlp_works_on_images_and_with_a_given_number_of_outputs():
    x, c_noise = torch.randn(4, 1, 3, 5), torch.zeros(4)
    assert MLP((1, 3, 5), hidden=8)(x, c_noise).shape == (4, 1, 3, 5)
    assert MLP((1, 3, 5), hidden=8, out_features=7)(x, c_noise).shape == (4, 7)


X = torch.zeros(3, 2)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: small_denoiser()(torch.zeros(3, 4), 1.0), r"x has shape \(3, 4\); wanted \(n, 2\)"),
    (lambda: small_denoiser()(X, 0.0), "sigma holds 0; wanted noise levels > 0"),
    (lambda: small_denoiser()(X, torch.ones(2)), "sigma has shape"),
    (lambda: small_denoiser()(X, 1.0, torch.zeros(3).long()), "label: this model has 0 classes; wanted None"),
    (lambda: small_denoiser(n_classes=4)(X, 1.0), "label: this model has 4 classes; wanted a class of 0 to 3"),
    (lambda: small_denoiser(n_classes=4)(X, 1.0, torch.zeros(2).long()), r"label is .* \(2,\); wanted .* \(3,\)"),
    (lambda: Generator(small_denoiser(), 1.0)(torch.zeros(3, 5)), "x has shape"),
    (lambda: Denoiser(MLP((2,)), 0.0), "sigma_data=0.0"),
    (lambda: Generator(small_denoiser(), -1.0), "sigma_init=-1.0"),
    (lambda: MLP((2,), activation="gelu"), "activation='gelu'.*Valid names: relu, silu"),
    (lambda: UNet((1, 9, 8)), r"shape=\(1, 9, 8\): wanted \(c, h, w\) with h and w divisible by 2"),
    (lambda: UNet((8, 8)), "shape="),
    (lambda: UNet((1, 12, 12), multipliers=(1, 2, 2, 2)), "divisible by 8"),
    (lambda: UNet((1, 8, 8), channels=6), "channels=6"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_a_feature_discriminator_reads_a_frozen_denoiser(kind):
    """Its weights are the head's alone; gradients reach the input, through the denoiser, and the head, nothing else."""
    shape = (1, 8, 8)
    torch.manual_seed(0)
    network = MLP(shape, hidden=16, n_classes=3) if kind == "mlp" else UNet(shape, 8, (1, 2), 1, n_classes=3)
    denoiser = Denoiser(network, 0.5).requires_grad_(False)
    ratio = FeatureDiscriminator(denoiser)
    assert all(name.startswith("head.") for name in ratio.state_dict())
    x, label = torch.randn(5, *shape, requires_grad=True), torch.tensor([0, 1, 2, 0, 1])
    logit = ratio(x, torch.full((5,), 0.7), label)
    assert logit.shape == (5,)
    features = denoiser.features(x, torch.full((5,), 0.7), label)  # one for every place of the image, or one at all
    places = ratio.head(features if kind == "unet" else features[:, :, None, None])
    assert places[0].numel() == (16 if kind == "unet" else 1)
    torch.testing.assert_close(logit, places.flatten(1).mean(1))
    logit.sum().backward()
    assert float(x.grad.abs().sum()) > 0
    assert all(p.grad is not None for p in ratio.parameters())
    assert all(p.grad is None for p in denoiser.parameters())


def test_features_are_what_the_output_is_made_of():
    torch.manual_seed(0)
    denoiser = Denoiser(MLP((3,), hidden=16), 0.5)
    x, sigma = torch.randn(4, 3), torch.rand(4) + 0.1
    s = sigma[:, None]
    scale = (s**2 + 0.25).rsqrt()
    by_hand = 0.25 * scale**2 * x + 0.5 * s * scale * denoiser.network.outward(denoiser.features(x, sigma))
    torch.testing.assert_close(denoiser(x, sigma), by_hand)


def test_an_affine_generator_is_one_gaussian():
    """mean + std z; its two parameters learn, and a bad one is named."""
    generator = Generator(Affine((3,), mean=-1.0, std=0.5, sigma_data=2.0), 1.0)
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(generator(z), -1 + 0.5 * z)
    assert (generator.shape, generator.n_classes, generator.denoiser.sigma_data) == ((3,), 0, 2.0)
    assert [tuple(p.shape) for p in generator.parameters()] == [(3,), (3,)]
    gradients = torch.autograd.grad(generator(z).sum(), list(generator.parameters()))
    torch.testing.assert_close(gradients[0], torch.full((3,), 5.0))
    torch.testing.assert_close(gradients[1], 0.5 * z.sum(0))
    with pytest.raises(ValueError, match="std=0"):
        Affine((2,), std=0.0)
    with pytest.raises(ValueError, match="x has shape"):
        generator(z[:, :2])
