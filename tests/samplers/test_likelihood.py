"""Log-likelihood by the probability flow: against exact densities, in one to twelve dimensions."""

import math

import pytest
import torch

from minidistill.distributions import ring
from minidistill.samplers import log_likelihood
from minidistill.teachers import GaussianTeacher
from tests.helpers import f64, mixture_1d, mixture_2d, normal, rng, small_denoiser


def levels(n, low=0.002, high=80.0):
    return torch.linspace(math.log(low), math.log(high), n, dtype=torch.float64).exp()


def gaussian(shape=(3,), n_classes=0):
    dim = math.prod(shape)
    data = normal(60, dim)
    data = data @ normal(dim, dim, seed=1) + 1.0
    labels = torch.arange(60) % n_classes if n_classes else None
    return GaussianTeacher(data.reshape(60, *shape), labels)


def test_the_ring_to_a_hundredth_of_a_nat():
    """The issue asks for 0.02 nats on average; the default levels leave 1e-4 once their own noise is counted."""
    target = ring()
    x = target.sample(500, rng())
    error = (log_likelihood(target, x) - target.noised(0.004 * target.sigma_data).log_prob(x)).abs()
    assert float(error.mean()) < 5e-4
    assert float(error.max()) < 5e-3
    even = (log_likelihood(target, x, levels(33)) - target.log_prob(x)).abs()
    assert float(even.mean()) < 0.02


@pytest.mark.parametrize("shape", [(1,), (3,), (3, 2, 2)])
def test_a_gaussian_to_the_solvers_error(shape):
    """With the exact law at the top as the prior all that is left is Runge-Kutta's error, of fourth order."""
    teacher = gaussian(shape)
    x = teacher.sample(20, rng(2))
    exact = teacher.noised(0.01).log_prob(x)
    top = teacher.noised(40.0).log_prob
    runs = [log_likelihood(teacher, x, levels(n, 0.01, 40.0), prior=top) for n in (41, 81)]
    errors = [float((run - exact).abs().max()) for run in runs]
    assert errors[1] < 2e-4
    assert 12 < errors[0] / errors[1] < 20


def test_it_is_the_density_at_the_lowest_level():
    """From sigmas[0] = 0.3, the density of the mixture noised by 0.3, labels and unequal classes included."""
    target = mixture_2d()
    x, label = 1.5 * torch.randn(30, 2, generator=rng(), dtype=torch.float64), torch.arange(30) % 3
    sigmas = levels(97, 0.3, 400.0)
    torch.testing.assert_close(log_likelihood(target, x, sigmas), target.noised(0.3).log_prob(x), atol=2e-3, rtol=0)
    of_class = torch.stack([  # log N(x; mu_c, Sigma_c + 0.09 I)
        torch.distributions.MultivariateNormal(target.means[c], target.covs[c] + 0.09 * torch.eye(2)).log_prob(u)
        for u, c in zip(x, label, strict=True)])
    torch.testing.assert_close(log_likelihood(target, x, sigmas, label=label), of_class, atol=2e-3, rtol=0)


def test_hutchinson_is_unbiased():
    """Each estimate's mean over 400 draws of the probe within 4 standard errors of the exact divergence's value; with
    more probes the variance falls as their number."""
    teacher = gaussian((5,))
    x, sigmas = teacher.sample(4, rng(2)), levels(17, 0.3, 30.0)
    exact = log_likelihood(teacher, x, sigmas)
    variances = []
    for probes in (1, 4):
        options = {"divergence": "hutchinson", "probes": probes, "generator": rng()}
        many = log_likelihood(teacher, x.repeat(400, 1), sigmas, **options).reshape(400, 4)
        assert ((many.mean(0) - exact).abs() < 4 * many.std(0) / 20).all()
        variances.append(many.var(0))
    assert ((variances[0] / variances[1] - 4).abs() < 2).all()  # a ratio of variances of 400: 10 % standard error
    assert variances[0].min() > 1e-3


def test_in_one_dimension_hutchinson_is_exact():
    target, x = mixture_1d(), torch.linspace(-3, 3, 9, dtype=torch.float64)[:, None]
    both = [log_likelihood(target, x, divergence=d, generator=rng()) for d in ("exact", "hutchinson")]
    torch.testing.assert_close(*both)
    torch.testing.assert_close(both[0], target.log_prob(x), atol=2e-3, rtol=0)


def test_a_networks_density_integrates_to_1():
    """Any denoiser's flow carries a density: on a line, an untrained network's sums to 1."""
    net = small_denoiser(shape=(1,), hidden=8).double()
    torch.nn.init.normal_(net.network.outward.weight, std=0.3, generator=rng())
    nodes = torch.linspace(-8, 8, 1601, dtype=torch.float64)[:, None]
    density = log_likelihood(net, nodes, levels(49, 0.05, 40.0)).exp()
    assert float(density.sum() * 0.01) == pytest.approx(1.0, abs=1e-3)
    assert float(density.max()) > 0.05
    assert all(p.grad is None for p in net.parameters())


def test_batches_and_precision():
    teacher = gaussian((2, 2), n_classes=2)
    x, label = teacher.sample(7, rng()), torch.arange(7) % 2
    whole = log_likelihood(teacher, x, levels(17), label=label)
    pieces = log_likelihood(teacher, x, levels(17), label=label, batch_size=3, chunk_size=1)
    torch.testing.assert_close(pieces, whole)
    single = log_likelihood(teacher, x.float(), levels(17), label=label)
    assert single.dtype == torch.float32
    assert whole.dtype == torch.float64
    torch.testing.assert_close(single.double(), whole, atol=1e-3, rtol=0)
    assert log_likelihood(teacher, x[:0]).shape == (0,)


@pytest.mark.parametrize(("change", "message"), [
    ({"x": f64([1.0, 2.0])}, "x has shape"),
    ({"x": f64([[1.0, math.nan]])}, "x holds a NaN"),
    ({"sigmas": f64([1.0, 0.5])}, "wanted two levels or more, rising"),
    ({"sigmas": f64([0.0, 0.5])}, "wanted two levels or more, rising"),
    ({"divergence": "exacte"}, "did you mean 'exact'"),
    ({"probes": 0}, "probes=0"),
    ({"label": torch.zeros(3).long()}, "label is"),
    ({"label": [0, 1]}, "label is list; wanted an integer tensor"),
    ({"batch_size": 0}, "batch_size=0: wanted"),
    ({"batch_size": -2}, "batch_size=-2: wanted"),
])
def test_bad_input_is_named_before_any_work(change, message):
    error = TypeError if isinstance(change.get("label"), list) else ValueError
    calls = []
    with pytest.raises(error, match=message):
        log_likelihood(lambda *a: calls.append(a), **{"x": torch.zeros(2, 2).double(), **change})
    assert not calls
