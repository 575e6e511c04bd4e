"""The exact targets: density, score, denoiser and samples agree with each other and with scipy and torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from torch import distributions as td

from minidistill import distributions as md
from minidistill.distributions import GaussianMixture, grid, ring
from tests.helpers import f64, line, mixture_1d, mixture_2d, normal_log_prob


def isotropic():
    return GaussianMixture(f64([[-1.0, 0.5], [1.5, 0.0], [0.0, -1.0]]), f64([0.3, 0.5, 0.8]), f64([2.0, 5.0, 3.0]))


def in_3d():
    root = f64([[1.0, 0.2, -0.3], [0.0, 0.7, 0.4], [0.1, 0.0, 0.5]])
    covs = torch.stack([root @ root.T, torch.eye(3, dtype=torch.float64)])
    return GaussianMixture(f64([[0.0, 1.0, 2.0], [-1.0, 0.0, 0.5]]), covs)


MIXTURES = {"isotropic": isotropic, "full": mixture_2d, "3d": in_3d, "1d": mixture_1d}


@pytest.fixture(params=MIXTURES)
def mixture(request):
    return MIXTURES[request.param]()


def points(mixture, n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, *mixture.shape, generator=generator, dtype=torch.float64)


def test_log_prob_is_scipys(mixture):
    x = points(mixture)
    density = sum(
        float(w) * multivariate_normal(mu.numpy(), cov.numpy()).pdf(x.numpy())
        for w, mu, cov in zip(mixture.weights, mixture.means, mixture.covs, strict=True)
    )
    torch.testing.assert_close(mixture.log_prob(x), torch.log(torch.as_tensor(density)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 2.0])
def test_noised_log_prob_is_torchs(mixture, sigma):
    eye = torch.eye(mixture.shape[0], dtype=torch.float64)
    components = td.MultivariateNormal(mixture.means, mixture.covs + sigma**2 * eye)
    referee = td.MixtureSameFamily(td.Categorical(mixture.weights), components)
    x = points(mixture)
    torch.testing.assert_close(mixture.noised(sigma).log_prob(x), referee.log_prob(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.0, 0.7])
def test_score_is_the_gradient_of_log_prob(mixture, sigma):
    noised = mixture.noised(sigma)
    x = points(mixture).requires_grad_(True)
    gradient = torch.autograd.grad(noised.log_prob(x).sum(), x)[0]
    torch.testing.assert_close(noised.score(x.detach()), gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0])
def test_tweedie(mixture, sigma):
    x = points(mixture)
    expected = x + sigma**2 * mixture.noised(sigma).score(x)
    torch.testing.assert_close(mixture.denoise(x, sigma), expected, rtol=1e-11, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(sigma=st.floats(1e-2, 1e2), seed=st.integers(0, 1000), shift=st.floats(-5, 5))
def test_denoiser_commutes_with_translation(sigma, seed, shift):
    mixture = mixture_2d()
    moved = GaussianMixture(mixture.means + shift, mixture.covs, mixture.weights)
    x = points(mixture, 5, seed)
    torch.testing.assert_close(moved(x + shift, sigma), mixture(x, sigma) + shift, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["two", "three"])
@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_noised_is_the_convolution_and_denoise_the_posterior_mean(kind, sigma):
    """Both by quadrature over x0: p_sigma(x) = int p(x0) N(x; x0, sigma^2), E[x0 | x] = int x0 ... / p_sigma(x)."""
    mixture = mixture_1d(kind)
    x0, step = line(-12, 12, 4001)
    x = f64([-3.0, -1.0, 0.2, 1.0, 4.0])
    joint = mixture.log_prob(x0[:, None]).exp() * normal_log_prob(x[:, None], x0, sigma).exp() * step
    density = joint.sum(1)
    torch.testing.assert_close(mixture.noised(sigma).log_prob(x[:, None]).exp(), density, rtol=1e-10, atol=0)
    torch.testing.assert_close(mixture(x[:, None], sigma).flatten(), (joint @ x0) / density, rtol=1e-9, atol=1e-10)


def test_density_integrates_to_one():
    a, step = line(-10, 10, 401)
    density = mixture_2d().log_prob(torch.cartesian_prod(a, a)).exp()
    assert float(density.sum() * step**2) == pytest.approx(1, abs=1e-10)


def test_sigma_per_sample_equals_float_sigma(mixture):
    x = points(mixture, 6)
    sigma = f64([0.1, 0.5, 1.0, 2.0, 5.0, 0.1])
    each = torch.cat([mixture(x[i : i + 1], float(s)) for i, s in enumerate(sigma)])
    torch.testing.assert_close(mixture(x, sigma), each, rtol=1e-12, atol=1e-12)
    resp = torch.cat([mixture.responsibilities(x[i : i + 1], float(s)) for i, s in enumerate(sigma)])
    torch.testing.assert_close(mixture.responsibilities(x, sigma), resp, rtol=1e-12, atol=1e-12)


def test_denoise_with_label_is_the_single_components(mixture):
    x = points(mixture, 12)
    label = torch.arange(12) % mixture.n_components
    got = mixture(x, 0.6, label)
    for k in range(mixture.n_components):
        alone = GaussianMixture(mixture.means[k : k + 1], mixture.covs[k : k + 1])
        torch.testing.assert_close(got[label == k], alone(x[label == k], 0.6), rtol=1e-12, atol=1e-12)


def test_label_denoisers_average_to_the_denoiser(mixture):
    """E[x0 | x] = sum_k P(k | x) E[x0 | x, k]."""
    x = points(mixture, 9)
    whole = torch.full((9,), 0)
    parts = torch.stack([mixture(x, 0.8, whole + k) for k in range(mixture.n_components)], 1)
    mixed = (mixture.responsibilities(x, 0.8).unsqueeze(-1) * parts).sum(1)
    torch.testing.assert_close(mixture(x, 0.8), mixed, rtol=1e-12, atol=1e-12)


def test_responsibilities_are_bayes_rule(mixture):
    x = points(mixture)
    joint = torch.stack([
        w * td.MultivariateNormal(mu, cov).log_prob(x).exp()
        for w, mu, cov in zip(mixture.weights, mixture.means, mixture.covs, strict=True)
    ], 1)
    torch.testing.assert_close(mixture.responsibilities(x), joint / joint.sum(1, keepdim=True), rtol=1e-9, atol=1e-12)


def test_sample_moments_within_four_standard_errors(mixture):
    n = 40_000
    x = mixture.sample(n, torch.Generator().manual_seed(1))
    centred = mixture.means - mixture.mean
    cov = (mixture.weights[:, None, None] * (mixture.covs + centred[:, :, None] * centred[:, None, :])).sum(0)
    assert ((x.mean(0) - mixture.mean).abs() < 4 * (cov.diagonal() / n).sqrt()).all()
    products = (x - mixture.mean)[:, :, None] * (x - mixture.mean)[:, None, :]
    assert ((products.mean(0) - cov).abs() < 4 * products.std(0) / math.sqrt(n)).all()
    assert mixture.sigma_data == pytest.approx(float(cov.diagonal().mean().sqrt()), rel=1e-12)


def test_sampled_labels_follow_the_weights_and_their_components():
    mixture, n = mixture_2d(), 30_000
    x, label = mixture.sample_with_labels(n, torch.Generator().manual_seed(2))
    share = torch.bincount(label, minlength=3) / n
    assert ((share - mixture.weights).abs() < 4 * (mixture.weights * (1 - mixture.weights) / n).sqrt()).all()
    for k in range(3):
        mine = x[label == k]
        assert ((mine.mean(0) - mixture.means[k]).abs() < 4 * mine.std(0) / math.sqrt(len(mine))).all()


def test_samples_are_reproducible_and_differ_by_seed():
    def draw(seed):
        return ring().sample(50, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert ring().sample(0).shape == (0, 2)


def test_dtype_conversion_keeps_the_law():
    x = points(mixture_2d(), 10)
    single = mixture_2d().to(torch.float32)
    assert single(x.float(), 0.5).dtype == torch.float32
    torch.testing.assert_close(single.log_prob(x.float()).double(), mixture_2d().log_prob(x), rtol=1e-4, atol=1e-4)


def test_noise_levels_add_in_variance():
    x = points(mixture_2d(), 10)
    twice, once = mixture_2d().noised(0.3).noised(0.4), mixture_2d().noised(0.5)
    torch.testing.assert_close(twice.log_prob(x), once.log_prob(x), rtol=1e-12, atol=1e-12)


def test_ring_and_grid_means():
    means = ring(k=8, radius=2.0).means
    torch.testing.assert_close(means.norm(dim=1), torch.full((8,), 2.0))
    torch.testing.assert_close(means[2], torch.tensor([0.0, 2.0]), atol=1e-6, rtol=0)
    lattice = grid(n=3, spacing=2.0).means
    assert {tuple(m) for m in lattice.tolist()} == {(a, b) for a in (-2.0, 0.0, 2.0) for b in (-2.0, 0.0, 2.0)}


def inside_region(name, x):
    radius = x.norm(dim=1)
    if name == "checkerboard":
        cell = x.floor().long()
        return (x.abs() <= 2).all(1) & ((cell.sum(1) % 2) == (cell[0].sum() % 2))
    if name == "two_moons":  # without noise every point lies on one of the two half circles
        upper = ((x + torch.tensor([0.5, 0.25])).norm(dim=1) - 1).abs() < 1e-5
        lower = ((x - torch.tensor([0.5, 0.25])).norm(dim=1) - 1).abs() < 1e-5
        return upper | lower
    if name == "swiss_roll":  # radius = 2 angle / (4.5 pi), angle from 1.5 pi to 4.5 pi
        turned = radius * 4.5 * math.pi / 2
        direction = torch.stack([turned.cos(), turned.sin()], 1)
        return ((x / radius[:, None] - direction).norm(dim=1) < 1e-3) & (radius <= 2.001)
    arm = math.pi * radius  # spirals: radius 2t, angle 2 pi t, and the same turned by pi
    direction = torch.stack([arm.cos(), arm.sin()], 1)
    return (torch.minimum((x - radius[:, None] * direction).norm(dim=1),
                          (x + radius[:, None] * direction).norm(dim=1)) < 1e-4) & (radius <= 2.001)


@pytest.mark.parametrize("name", md.SHAPES)
def test_shapes_lie_where_they_should(name):
    options = {} if name == "checkerboard" else {"noise": 0.0}
    x = md.SHAPES[name](2000, torch.Generator().manual_seed(0), **options)
    assert x.shape == (2000, 2)
    assert torch.isfinite(x).all()
    assert inside_region(name, x).all()
    assert torch.equal(x, md.SHAPES[name](2000, torch.Generator().manual_seed(0), **options))


@pytest.mark.parametrize("name", ["two_moons", "swiss_roll", "spirals"])
def test_shape_noise_has_the_stated_standard_deviation(name):
    n, noise = 20_000, 0.3
    clean = md.SHAPES[name](n, torch.Generator().manual_seed(0), noise=0.0)
    gap = md.SHAPES[name](n, torch.Generator().manual_seed(0), noise=noise) - clean
    assert abs(float(gap.std()) - noise) < 4 * noise / math.sqrt(2 * 2 * n)


def test_checkerboard_fills_its_eight_squares_evenly():
    n = 16_000
    x = md.checkerboard(n, torch.Generator().manual_seed(5))
    cells = (x.floor().long() + 2) @ torch.tensor([4, 1])
    counts = torch.bincount(cells, minlength=16)
    assert (counts > 0).sum() == 8
    assert ((counts[counts > 0] / n - 1 / 8).abs() < 4 * math.sqrt(1 / 8 * 7 / 8 / n)).all()


EYE = [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(("arguments", "message"), [
    (([1.0, 2.0], 0.1), "means has shape"),
    (([[math.nan, 0.0]], 0.1), "means holds a NaN"),
    (([[[0.0]]], 0.1), "means has shape"),
    (([[0.0, 0.0]], -0.1), "stds_or_covs"),
    (([[0.0, 0.0]], 0.0), "stds_or_covs"),
    (([[0.0, 0.0]], math.inf), "stds_or_covs holds"),
    (([[0.0, 0.0]], [0.1, 0.2]), "stds_or_covs has shape"),
    (([[0.0, 0.0]], [[[1.0, 0.5], [0.0, 1.0]]]), "symmetric"),
    (([[0.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]]), "positive definite"),
    (([[0.0, 0.0]], 0.1, [0.0]), "weights"),
    (([[0.0, 0.0], [1.0, 1.0]], 0.1, [1.0, -1.0]), "weights"),
    (([[0.0, 0.0], [1.0, 1.0]], 0.1, [1.0]), "weights"),
    (([[0.0, 0.0]], [EYE], [math.nan]), "weights"),
])
def test_bad_mixtures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*(torch.tensor(a) if isinstance(a, list) else a for a in arguments))


@pytest.mark.parametrize(("call", "message"), [
    (lambda m: m.log_prob(torch.zeros(3, 3)), r"x has shape \(3, 3\); wanted \(n, 2\)"),
    (lambda m: m.score(torch.zeros(2)), "x has shape"),
    (lambda m: m(torch.zeros(3, 2), -1.0), "sigma holds -1"),
    (lambda m: m(torch.zeros(3, 2), math.nan), "sigma holds nan"),
    (lambda m: m(torch.zeros(3, 2), torch.ones(2)), "sigma has shape"),
    (lambda m: m.noised(-0.1), "sigma=-0.1"),
    (lambda m: m(torch.zeros(3, 2), 1.0, torch.tensor([0, 1, 99])), "label runs from 0 to 99"),
    (lambda m: m(torch.zeros(3, 2), 1.0, torch.tensor([0, -1, 1])), "label runs from -1"),
    (lambda m: m(torch.zeros(3, 2), 1.0, torch.tensor([0, 1])), "label is"),
    (lambda m: m(torch.zeros(3, 2), 1.0, torch.zeros(3)), "label is"),
    (lambda m: m.sample(-1), "n=-1"),
    (lambda m: ring(k=0), "k=0"),
    (lambda m: ring(radius=-1.0), "radius"),
    (lambda m: grid(n=0), "n=0"),
    (lambda m: grid(spacing=0.0), "spacing"),
    (lambda m: md.two_moons(-1), "n=-1"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(ring())
