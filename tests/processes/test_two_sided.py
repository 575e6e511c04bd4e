"""Two-sided interpolants: exact marginals, velocity and score against samples, and one law for every epsilon."""

import pytest
import torch

from minidistill import processes
from minidistill.distributions import GaussianMixture
from minidistill.metrics import over_floor
from tests.helpers import f64, rng


def bridge(latent=1.0):
    turned = f64([[[0.5, 0.2], [0.2, 0.3]], [[0.2, 0.0], [0.0, 0.4]]])
    return processes.TwoSided(
        GaussianMixture(f64([[-1.0, 0.0], [0.5, 1.0]]), turned, f64([0.3, 0.7])),
        GaussianMixture(f64([[2.0, 0.0], [0.0, -2.0], [-2.0, 1.0]]), f64([0.3, 0.5, 0.4])), latent,
    )


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_marginals_are_those_of_samples(t):
    paths = bridge(0.7)
    x0, x1, z = paths.draw(100_000, rng())
    x, law = (1 - t) * x0 + t * x1 + paths.gamma(f64(t)) * z, paths.marginal(t)
    torch.testing.assert_close(x.mean(0), law.mean, rtol=0, atol=0.02)
    second = (law.weights[:, None, None] * (law.covs + law.means[:, :, None] * law.means[:, None])).sum(0)
    torch.testing.assert_close(x.T @ x / len(x), second, rtol=0, atol=0.05)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_velocity_and_score_minimise_their_losses(t):
    """A conditional mean is orthogonal to what it leaves: E[(rate - b(x)) phi(x)] = 0 for any phi, and the same for the
    score and -z / gamma."""
    paths, t_ = bridge(), f64(t)
    x0, x1, z = paths.draw(100_000, rng(1))
    x = (1 - t) * x0 + t * x1 + paths.gamma(t_) * z
    left = {
        "velocity": x1 - x0 + paths.gamma_rate(t_) * z - paths.velocity(x, t),
        "score": -z / paths.gamma(t_) - paths.score(x, t),
    }
    for rest in left.values():
        for phi in (torch.ones_like(x), x, x.flip(1), x.sin(), (x**2).cos()):
            product = (rest * phi).sum(1)
            assert abs(float(product.mean())) < 4 * float(product.std()) / len(x) ** 0.5


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_every_epsilon_brings_the_start_to_the_end(epsilon):
    paths, steps, generator = bridge(), 60, rng(3)
    x = paths.start.sample(4000, generator)
    for k in range(steps):
        drift = paths.velocity(x, k / steps) + epsilon * paths.score(x, k / steps)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = x + drift / steps + (2 * epsilon / steps) ** 0.5 * noise
    assert over_floor(paths.end, x) < 2


def test_with_a_gaussian_at_the_end_it_is_the_named_process():
    """x_t = (1 - t) x0 + t x1 + gamma z with normal x1 has the law of `interpolant`'s x_t, and its velocity."""
    data = bridge().start
    paths = processes.TwoSided(data, GaussianMixture(f64([[0.0, 0.0]]), f64([1.0])), 2.0)
    named = processes.interpolant(2.0)
    x = data.sample(20, rng())
    torch.testing.assert_close(paths.score(x, 0.4), named.marginal(data, 0.4).score(x))
    torch.testing.assert_close(paths.velocity(x, 0.4), processes.as_model(data, named, "velocity")(x, 0.4))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: bridge(0.0), "latent"),
    (lambda: processes.TwoSided(bridge().start, GaussianMixture(f64([[0.0]]), f64([1.0]))), r"shape \(1,\); wanted"),
    (lambda: bridge().marginal(1.5), "t=1.5"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
