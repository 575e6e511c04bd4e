"""The denoiser of an energy: its gradient, its symmetry, its preconditioning, and what distillation recovers."""

import pytest
import torch
from torch import nn

from minidistill.distributions import GaussianMixture, ring
from minidistill.networks import MLP, Denoiser
from minidistill.score_matching import asymmetry
from minidistill.teachers import EnergyDenoiser, distil_energy
from tests.helpers import f64, normal, rng, states_equal


def network(kind, shape=(3,), n_classes=0):
    torch.manual_seed(0)
    return MLP(shape, hidden=16, depth=2, n_classes=n_classes, out_features=1 if kind == "scalar" else None).double()


X, SIGMA = 1.5 * normal(7, 3), torch.linspace(0.1, 4, 7, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["scalar", "inner product"])
def test_the_denoiser_is_the_energys_gradient_and_conservative(kind):
    model = EnergyDenoiser(network(kind), 0.7)
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model.energy(x, SIGMA).sum(), x)
    got = model(X, SIGMA)
    torch.testing.assert_close(got, X - SIGMA[:, None] ** 2 * slope)
    with torch.no_grad():  # samplers call it so
        torch.testing.assert_close(model(X, SIGMA), got)
    assert asymmetry(model, X, SIGMA).max() < 1e-24
    assert asymmetry(Denoiser(network("vector"), 0.7), X, SIGMA).max() > 1e-5  # what a plain network has
    one = torch.stack([model(X[k : k + 1], float(s))[0] for k, s in enumerate(SIGMA)])
    torch.testing.assert_close(one, got)


def test_it_has_edms_preconditioning():
    """D = c_skip x + c_out grad f(c_in x), with the coefficients of the plain `Denoiser`."""
    net = network("scalar")

    class Gradient(nn.Module):
        shape, n_classes = (3,), 0

        def forward(self, u, c_noise, label=None):
            return torch.func.vjp(lambda v: net(v, c_noise).sum(), u)[1](f64(1.0))[0]

    torch.testing.assert_close(EnergyDenoiser(net, 0.7)(X, SIGMA), Denoiser(Gradient(), 0.7)(X, SIGMA))


def test_without_a_network_it_is_gaussian_datas_energy():
    """f = 0 leaves the exact energy and denoiser of N(0, sigma_data^2)."""
    model, exact = EnergyDenoiser(network("scalar"), 0.7), GaussianMixture(torch.zeros(1, 3).double(), 0.7)
    nn.init.zeros_(model.network.outward.weight)
    nn.init.zeros_(model.network.outward.bias)
    torch.testing.assert_close(model(X, SIGMA), exact(X, SIGMA))
    level = exact.noised(0.4)
    difference = model.energy(X, 0.4) - model.energy(0 * X, 0.4)
    torch.testing.assert_close(difference, level.log_prob(0 * X) - level.log_prob(X))


def test_a_class_conditional_energy_of_images():
    model = EnergyDenoiser(network("inner product", (1, 2, 2), n_classes=3), 0.5)
    x, label = normal(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    assert (model.shape, model.n_classes) == ((1, 2, 2), 3)
    assert model.energy(x, 0.5, label).shape == (4,)
    assert model(x, 0.5, label).shape == x.shape
    assert not torch.allclose(model(x, 0.5, label), model(x, 0.5, (label + 1) % 3))
    with pytest.raises(ValueError, match="wanted a class"):
        model(x, 0.5)


class Bare(nn.Module):
    """A network without `out_features`."""

    n_classes = 0

    def __init__(self, shape, function):
        super().__init__()
        self.shape, self.function = shape, function

    def forward(self, u, c_noise, label=None):
        return self.function(u)


def test_a_network_need_not_say_how_many_outputs_it_has():
    """One output is f, outputs like x are F of f = u'F(u); for single numbers `out_features` tells them apart."""
    scalar, vector = Bare((3,), lambda u: u.cos().sum(1, keepdim=True)), Bare((3,), torch.sin)
    for model, f in ((scalar, lambda u: u.cos().sum(1)), (vector, lambda u: (u * u.sin()).sum(1))):
        variance = SIGMA**2 + 0.7**2
        wanted = X.square().sum(1) / (2 * variance) - 0.7 / SIGMA * f(X / variance.sqrt()[:, None])
        torch.testing.assert_close(EnergyDenoiser(model, 0.7).energy(X, SIGMA), wanted)
    one = Bare((1,), torch.cos)
    u = X[:, :1] / (SIGMA**2 + 0.7**2).sqrt()[:, None]
    quadratic = (u.square() / 2)[:, 0]
    product = EnergyDenoiser(one, 0.7).energy(X[:, :1], SIGMA)
    torch.testing.assert_close(product, quadratic - 0.7 / SIGMA * (u * u.cos())[:, 0])
    one.out_features = 1
    scalar = EnergyDenoiser(one, 0.7).energy(X[:, :1], SIGMA)
    torch.testing.assert_close(scalar, quadratic - 0.7 / SIGMA * u.cos()[:, 0])
    with pytest.raises(ValueError, match=r"network returned shape \(7, 2\); wanted \(7, 1\) or \(7, 3\)"):
        EnergyDenoiser(Bare((3,), lambda u: u[:, :2]), 0.7).energy(X, SIGMA)


def test_a_distilled_energy_knows_the_log_density():
    """Mode centres of an uneven ring: differences of energy against the exact ones, mean absolute error below 0.1
    nats at moderate noise (0.01 to 0.03 here; the differences' own mean is 0.3 to 0.7). Lower noise is harder: between
    the modes there is no data, and a difference of energies is an integral across."""
    target = ring(weights=[1.0, 2, 3, 4, 5, 6, 7, 8])
    data = target.sample(10_000, rng())
    model = distil_energy(target, data, MLP((2,), hidden=64, depth=2, out_features=1), steps=600, batch_size=256,
                          sigma_min=0.1, sigma_max=10, learning_rate=4e-3, ema_halflife=10_000, progress=False)
    for sigma in (0.4, 0.7, 1.5):
        exact = target.noised(sigma).log_prob(target.means)
        energy = model.energy(target.means, sigma).detach()
        error = (exact[:, None] - exact) - (energy - energy[:, None])
        assert float(error.abs().mean()) < 0.1, sigma
        assert float((exact[:, None] - exact).abs().mean()) > 0.25
        x = target.noised(sigma).sample(1000, rng(1))
        gap, size = (model(x, sigma) - target(x, sigma)).square().mean(), (x - target(x, sigma)).square().mean()
        assert float(gap) < 0.02 * float(size), sigma


def test_distillation_is_reproducible_and_takes_labels_and_bytes():
    images = torch.randint(256, (30, 1, 2, 2), generator=rng(), dtype=torch.uint8)
    labels = torch.arange(30) % 2
    teacher = lambda x, s, y: x / (1 + s.reshape(-1, 1, 1, 1)) + y.reshape(-1, 1, 1, 1)  # noqa: E731
    one, two = (distil_energy(teacher, images, labels=labels, steps=2, batch_size=8, progress=False) for _ in range(2))
    assert states_equal(one.state_dict(), two.state_dict())
    assert (one.shape, one.n_classes, one.training) == ((1, 2, 2), 2, False)


class Shaped(torch.nn.Linear):
    """Takes samples of shape (2,) and says nothing of classes."""

    shape = (2,)

    def __init__(self):
        super().__init__(2, 1)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"data": torch.zeros(4)}, ValueError, "data has shape"),
    ({"data": torch.zeros(4, 2).long()}, TypeError, "data is a tensor of torch.int64"),
    ({"labels": torch.zeros(3).long()}, ValueError, "labels is"),
    ({"steps": 0}, ValueError, "steps=0"),
    ({"sigma_min": 0.0}, ValueError, "sigma_min=0.0"),
    ({"sigma_min": 30.0}, ValueError, "sigma_min=30.0 is above sigma_max=20.0"),
    ({"network": MLP((3,), out_features=1)}, ValueError, "network takes samples of shape"),
    ({"network": torch.nn.Linear(2, 1)}, TypeError, "network is Linear; wanted one with .shape and .n_classes"),
    ({"network": Shaped()}, TypeError, "network is Shaped; wanted one with .shape and .n_classes"),
    ({"network": MLP((2,), n_classes=3, out_features=1)}, ValueError, "network has 3 classes, but labels has 0"),
    ({"network": MLP((2,), n_classes=3, out_features=1), "labels": torch.full((20,), 3)}, ValueError, "labels has 4"),
])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        distil_energy(**{"teacher": ring(), "data": torch.randn(20, 2), "steps": 2, "progress": False, **change})
