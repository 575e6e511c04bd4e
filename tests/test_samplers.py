"""Solvers against the closed-form flow of a Gaussian, their orders, calls, noise and errors."""

import itertools
import math
from typing import Any

import pytest
import torch

from minidistill.distributions import GaussianMixture
from minidistill.samplers import SOLVERS, ddim, euler, euler_maruyama, heun, karras_sigmas, sample
from tests.helpers import f64, mixture_2d

MU, STD = 0.5, 0.8
TARGET = GaussianMixture(f64([[MU]]), STD)
STOCHASTIC: dict[str, dict[str, Any]] = {"euler_maruyama": {}, "ddim": {"eta": 1.0}}


def levels(n, low=0.002, high=80.0, **options):
    return karras_sigmas(n, low, high, dtype=torch.float64, **options)


def start(n=4, sigma=80.0, seed=0, d=1):
    return sigma * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "rho"), [(2, 7.0), (10, 7.0), (10, 1.0), (33, 3.0)])
def test_karras_sigmas_formula(n, rho):
    """Equation 5 of Karras 2022, and 0 at the end."""
    wanted = [(80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(n)]
    torch.testing.assert_close(levels(n, rho=rho), f64([*wanted, 0.0]), rtol=1e-12, atol=1e-12)
    assert (levels(n, rho=rho).diff() < 0).all()


def test_one_karras_level_is_the_largest():
    assert levels(1).tolist() == [pytest.approx(80.0), 0.0]


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(solver, order):
    """x(s') = mu + (x - mu) sqrt((std^2 + s'^2) / (std^2 + s^2)) on a Gaussian: the error there falls as n^-order."""
    low, high, x = 0.05, 5.0, start(sigma=5.0)
    exact = MU + (x - MU) * math.sqrt((STD**2 + low**2) / (STD**2 + high**2))
    counts = [64, 128, 256, 512]
    errors = [float((solver(TARGET, x, levels(n, low, high), trajectory=True)[-2] - exact).norm()) for n in counts]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(slope - order) < 0.15 for slope in slopes)


def test_ddim_without_noise_is_euler():
    x, mixture = start(8, d=2), mixture_2d()
    torch.testing.assert_close(ddim(mixture, x, levels(12)), euler(mixture, x, levels(12)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_last_step_lands_on_the_denoiser(name):
    mixture, x, sigmas = mixture_2d(), start(8, d=2), levels(6)
    path = SOLVERS[name](mixture, x, sigmas, trajectory=True, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(path[-1], mixture(path[-2], sigmas[-2]), rtol=1e-11, atol=1e-11)


def chain_moments(name, sigmas):
    """Mean and variance that the discrete chain has for the Gaussian target: each step is affine in x."""
    mean, variance = 0.0, float(sigmas[0]) ** 2
    for s, t in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        shrink = STD**2 / (STD**2 + s**2)  # D(x) = mu + shrink (x - mu)
        if name == "euler_maruyama":
            pull = (s**2 - t**2) / s**2
            factor, fresh = 1 - pull * (1 - shrink), (s**2 - t**2 if t > 0 else 0.0)
        else:  # x0 | x replaced by D: x_after ~ N(D + (t/s)^2 (x - D), t^2 (1 - t^2/s^2))
            factor, fresh = shrink + t**2 / s**2 * (1 - shrink), t**2 * (1 - t**2 / s**2)
        mean, variance = MU + factor * (mean - MU), factor**2 * variance + fresh
    return mean, variance


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_solvers_reproduce_a_gaussian(name):
    """Within 4 standard errors of the discrete chain's exact moments, whose own bias is below 3%."""
    n, sigmas = 20_000, levels(400, 0.01, 40.0)
    x = SOLVERS[name](TARGET, start(n, 40.0, seed=1), sigmas, generator=torch.Generator().manual_seed(2),
                      **STOCHASTIC[name])
    mean, variance = chain_moments(name, sigmas)
    assert abs(mean - MU) < 0.03
    assert abs(variance / STD**2 - 1) < 0.03
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(variance / n)
    assert abs(float(x.var()) - variance) < 4 * variance * math.sqrt(2 / (n - 1))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_bias_of_the_stochastic_chains_falls_as_one_over_n(name):
    """The chain that the package is tested against tends to the target, with an error of O(1/n)."""
    coarse, fine = (abs(chain_moments(name, levels(n, 1e-4, 40.0))[1] - STD**2) for n in (200, 400))
    assert coarse / fine == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(("name", "calls"), [("euler", 7), ("heun", 13), ("ddim", 7), ("euler_maruyama", 7)])
def test_number_of_network_calls(name, calls):
    seen = []

    def counting(x, sigma):
        seen.append(float(sigma))
        return TARGET(x, sigma)

    sample(counting, start(), levels(7), name)
    assert len(seen) == calls
    assert set(seen) == set(levels(7)[:-1].tolist())


@pytest.mark.parametrize("name", SOLVERS)
def test_trajectory_runs_from_x_to_the_samples(name):
    x = start(5, d=2)

    def run(trajectory):
        rng = torch.Generator().manual_seed(0)
        return sample(mixture_2d(), x, levels(6), name, trajectory=trajectory, generator=rng)

    path = run(True)
    assert path.shape == (7, 5, 2)
    assert torch.equal(path[0], x)
    assert torch.equal(path[-1], run(False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SOLVERS)
def test_dtype_is_kept(name, dtype):
    assert sample(TARGET.to(dtype), start().to(dtype), levels(4), name).dtype == dtype


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_follows_the_generator(name):
    def run(seed):
        rng = torch.Generator().manual_seed(seed)
        return sample(TARGET, start(), levels(5), name, generator=rng, **STOCHASTIC[name])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("name", SOLVERS)
def test_label_reaches_the_denoiser(name):
    """With a label the samples go to that component: within 6 of its standard deviations."""
    mixture = GaussianMixture(f64([[-5.0, 0.0], [5.0, 0.0], [0.0, 9.0]]), 0.1)
    label = torch.arange(30) % 3
    x = sample(mixture, start(30, d=2), levels(60), name, label=label, generator=torch.Generator().manual_seed(0))
    assert ((x - mixture.means[label]).norm(dim=1) < 0.6).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_no_graph_is_kept_and_x_is_untouched(name):
    x = start().requires_grad_(True)
    before = x.detach().clone()
    assert not sample(TARGET, x, levels(4), name).requires_grad
    assert torch.equal(x.detach(), before)


X = torch.zeros(3, 1, dtype=torch.float64)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: sample(TARGET, X, levels(3), "huen"), ValueError,
     "solver='huen'.*did you mean 'heun'.*Valid names: ddim, euler, euler_maruyama, heun"),
    (lambda: heun(TARGET, X, f64([1.0, 2.0, 0.0])), ValueError, "sigmas=.*descending"),
    (lambda: heun(TARGET, X, f64([1.0, 1.0, 0.0])), ValueError, "sigmas="),
    (lambda: heun(TARGET, X, f64([2.0, 1.0])), ValueError, "and then 0"),
    (lambda: heun(TARGET, X, f64([1.0, -1.0, 0.0])), ValueError, "sigmas="),
    (lambda: heun(TARGET, X, f64([1.0, math.nan, 0.0])), ValueError, "sigmas="),
    (lambda: heun(TARGET, X, f64([0.0])), ValueError, "at least one level"),
    (lambda: heun(TARGET, X, f64([[1.0, 0.0]])), ValueError, "sigmas="),
    (lambda: heun(TARGET, X * math.nan, levels(3)), ValueError, "x holds a NaN"),
    (lambda: heun(TARGET, X.long(), levels(3)), TypeError, "x is a tensor of torch.int64"),
    (lambda: heun(TARGET, X[:, 0], levels(3)), ValueError, "x has shape"),
    (lambda: ddim(TARGET, X, levels(3), eta=1.5), ValueError, "eta=1.5"),
    (lambda: karras_sigmas(0), ValueError, "n=0"),
    (lambda: karras_sigmas(5, sigma_min=0.0), ValueError, "sigma_min=0.0"),
    (lambda: karras_sigmas(5, 2.0, 1.0), ValueError, "sigma_min=2.0 is above sigma_max=1.0"),
    (lambda: karras_sigmas(5, rho=-1.0), ValueError, "rho=-1.0"),
    (lambda: euler_maruyama(TARGET, X, f64([1.0, 2.0])), ValueError, "sigmas="),
])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
