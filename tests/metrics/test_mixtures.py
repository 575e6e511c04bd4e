"""Wasserstein distances and metrics against scipy, POT, torchmetrics and closed forms."""

import math

import numpy as np
import ot
import pytest
import scipy.linalg
import torch
from scipy.stats import norm, wasserstein_distance
from torchmetrics.functional.classification import multiclass_calibration_error
from torchmetrics.image.fid import _compute_fid

from minidistill.distributions import GaussianMixture, ring
from minidistill.metrics import (
    cdf,
    expected_calibration_error,
    frechet_distance,
    kl_both_ways,
    kl_on_grid,
    mode_coverage,
    over_floor,
    quantile,
    reverse_kl_on_grid,
)
from minidistill.transport import sliced_wasserstein, wasserstein_1d
from tests.helpers import f64, line, mixture_1d, normal, rng


@pytest.mark.parametrize(("n", "m"), [(10, 10), (7, 12), (30, 1), (13, 26)])
def test_wasserstein_1d_is_scipys_and_pots(n, m):
    x, y = normal(n), 0.5 * normal(m, seed=1) + 1
    assert float(wasserstein_1d(x, y, p=1)) == pytest.approx(wasserstein_distance(x, y), rel=1e-10)
    for p in (1, 2, 3):
        wanted = float(ot.wasserstein_1d(x.numpy(), y.numpy(), p=p)) ** (1 / p)
        assert float(wasserstein_1d(x, y, p=p)) == pytest.approx(wanted, rel=1e-10)


def test_wasserstein_1d_handles_columns_separately():
    x, y = normal(9, 4), normal(5, 4, seed=1)
    each = torch.stack([wasserstein_1d(x[:, i], y[:, i]) for i in range(4)])
    torch.testing.assert_close(wasserstein_1d(x, y), each, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(200, 200), (150, 210)])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_sliced_wasserstein_is_pots_with_the_same_projections(n, m, p):
    x, y = normal(n, 3), normal(m, 3, seed=1) @ torch.diag(f64([1.0, 2.0, 0.5])) + 1
    directions = torch.randn(3, 64, generator=rng(7))
    directions = (directions.double() / directions.double().norm(dim=0)).numpy()
    wanted = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=directions, p=int(p))
    assert float(sliced_wasserstein(x, y, 64, rng(7), p)) == pytest.approx(float(wanted), rel=1e-6)


def test_sliced_wasserstein_is_a_distance():
    x, y, z = normal(60, 2), normal(80, 2, seed=1) + 1, 2 * normal(60, 2, seed=2)

    def d(a, b):
        return float(sliced_wasserstein(a, b, 32, rng()))

    assert d(x, x) == 0
    assert d(x, x.flip(0)) == 0
    assert d(x, y) == pytest.approx(d(y, x), rel=1e-12)
    assert d(x, z) <= d(x, y) + d(y, z)
    assert d(3 * x, 3 * y) == pytest.approx(3 * d(x, y), rel=1e-12)


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_translation_costs_its_length_over_root_d(dim):
    """SW2^2 = |v|^2 mean (direction . v/|v|)^2; its mean is |v|^2 / d, its variance 2 (d-1) / (d^2 (d+2))."""
    n, v = 4000, torch.arange(1.0, dim + 1, dtype=torch.float64)
    x = normal(5, dim)
    share = float(sliced_wasserstein(x, x + v, n, rng())) ** 2 / float(v.square().sum())
    assert abs(share - 1 / dim) < 4 * math.sqrt(2 * (dim - 1) / (dim**2 * (dim + 2)) / n)


def test_sliced_wasserstein_is_differentiable_and_flattens_images():
    x = normal(6, 1, 2, 2).requires_grad_(True)
    y = normal(6, 1, 2, 2, seed=1)
    value = sliced_wasserstein(x, y, 16, rng())
    flat = sliced_wasserstein(x.detach().flatten(1), y.flatten(1), 16, rng())
    assert float(value.detach()) == pytest.approx(float(flat), rel=1e-12)
    step = 1e-6 * normal(6, 1, 2, 2, seed=2)
    gradient, x = torch.autograd.grad(value, x)[0], x.detach()
    change = (sliced_wasserstein(x + step, y, 16, rng()) - sliced_wasserstein(x - step, y, 16, rng())) / 2
    assert float(change) == pytest.approx(float((gradient * step).sum()), rel=1e-5)


def direct_grid_kl(target, samples, sigma):
    """Both KLs by logsumexp over the kernels, on a grid of this test's own."""
    p = target.to(torch.float64).noised(sigma)
    x = samples.double()
    a, cell = line(-5, 5, 241)
    points = torch.cartesian_prod(a, a)
    log_q = torch.cat([
        torch.logsumexp(-0.5 * torch.cdist(part, x).square() / sigma**2, 1) for part in points.split(10_000)
    ]) - math.log(len(x) * 2 * math.pi * sigma**2)
    log_p = p.log_prob(points)
    log_q = log_q.clamp(min=math.log(1e-300))
    forward, reverse = (log_p.exp() * (log_p - log_q)).sum(), (log_q.exp() * (log_q - log_p)).sum()
    return float(forward) * cell**2, float(reverse) * cell**2


def test_grid_kl_is_the_direct_kernel_density_sum():
    target = ring(k=4, radius=1.0, std=0.3)
    samples = ring(k=4, radius=1.1, std=0.35).sample(300, rng())
    got, (forward, reverse) = kl_both_ways(target, samples, 0.15), direct_grid_kl(target, samples, 0.15)
    assert got.kl == pytest.approx(forward, rel=1e-4)
    assert got.reverse_kl == pytest.approx(reverse, rel=1e-6)
    assert got.outside < 1e-5
    assert (kl_on_grid(target, samples, 0.15), reverse_kl_on_grid(target, samples, 0.15)) == (got.kl, got.reverse_kl)


def second_order_bias(target, sigma, n):
    """(1/2n) (int E k(x - X)^2 / p(x) dx - 1), k the kernel: k^2 is a kernel of sigma / sqrt 2 over 4 pi sigma^2."""
    a, cell = line(-5, 5, 401)
    points, exact = torch.cartesian_prod(a, a), target.to(torch.float64)
    ratio = (exact.noised(sigma / math.sqrt(2)).log_prob(points) - exact.noised(sigma).log_prob(points)).exp()
    return (float(ratio.sum()) * cell**2 / (4 * math.pi * sigma**2) - 1) / (2 * n)


@pytest.mark.parametrize("n", [5_000, 20_000])
def test_exact_samples_have_the_stated_bias_and_no_more(n):
    target = ring()
    got = kl_both_ways(target, target.sample(n, rng()), 0.1)
    bias = second_order_bias(target, 0.1, n)
    assert 0.3 * bias < got.kl < 2 * bias
    assert 0.3 * bias < got.reverse_kl < 2 * bias


def test_grid_kl_of_a_shift_is_the_gaussians_closed_form():
    """KL = |shift|^2 / 2 (std^2 + sigma^2) both ways, up to the bias of n samples."""
    n, std, sigma, shift = 40_000, 0.5, 0.3, 0.4
    target = GaussianMixture([[0.0, 0.0]], std)
    got = kl_both_ways(target, GaussianMixture([[shift, 0.0]], std).sample(n, rng()), sigma)
    total = std**2 + sigma**2
    exact = shift**2 / (2 * total)
    error = 4 * shift / math.sqrt(total * n) + 2 * second_order_bias(target, sigma, n)
    assert abs(got.kl - exact) < 2 * error
    assert abs(got.reverse_kl - exact) < 2 * error


def test_a_missed_mode_costs_much_forward_and_its_share_backward():
    """Reverse KL of 7 of 8 modes is log(8/7); forward KL counts the missing eighth at the density's floor."""
    target, n = ring(std=0.1), 8000
    x, label = target.sample_with_labels(n, rng())
    got = kl_both_ways(target, x[label != 0], 0.1)
    assert got.reverse_kl == pytest.approx(math.log(8 / 7), abs=0.02)
    assert got.kl > 1


def test_mass_off_the_grid_is_reported():
    target = ring()
    x = target.sample(1000, rng())
    x[:250] += 100
    assert kl_both_ways(target, x).outside == pytest.approx(0.25, abs=1e-3)
    assert kl_both_ways(target, x[250:]).outside < 1e-4


def test_mode_coverage_of_exact_samples():
    target, n = ring(std=0.1, weights=[1, 2, 3, 4, 4, 3, 2, 1]), 20_000
    got = mode_coverage(target, target.sample(n, rng()))
    assert (got.covered, got.total) == (8, 8)
    assert ((got.shares - target.weights).abs() < 4 * (target.weights * (1 - target.weights) / n).sqrt()).all()
    inside = 1 - math.exp(-4.5)  # P(|z| <= 3) in the plane
    assert abs(got.high_quality - inside) < 4 * math.sqrt(inside * (1 - inside) / n)
    assert got.worst == pytest.approx(float((got.shares / target.weights - 1).abs().max()), rel=1e-6)


def test_mode_coverage_sees_a_dropped_mode_and_a_far_off_student():
    target = ring(std=0.1)
    x, label = target.sample_with_labels(4000, rng())
    got = mode_coverage(target, x[label != 3])
    assert got.covered == 7
    assert got.shares[3] == 0
    assert got.worst == pytest.approx(1)
    assert mode_coverage(target, 10 * x).high_quality == 0


def test_mode_coverage_measures_in_each_components_own_axes():
    """A long thin component claims the point on its axis that is nearer, in Euclid's sense, to the round one."""
    covs = f64([[[4.0, 0.0], [0.0, 0.01]], [[0.01, 0.0], [0.0, 0.01]]])
    target = GaussianMixture(f64([[0.0, 0.0], [3.0, 0.0]]), covs)
    assert mode_coverage(target, f64([[2.0, 0.0]])).shares.tolist() == [1.0, 0.0]


def fid_inputs(d=5):
    x, y = normal(200, d), normal(150, d, seed=1) @ normal(d, d, seed=2) + 0.5
    return x, y


def test_over_floor_is_one_for_exact_samples_and_grows_with_a_shift():
    """Means over pairs of sets leave about a tenth of noise (one floor alone varies by half). By hand for two sets."""
    target = ring(k=4, std=0.3)
    fresh = [target.sample(1000, torch.Generator().manual_seed(seed)) for seed in range(10, 15)]
    ratios = [over_floor(target, x) for x in fresh]
    assert sum(ratios) / 5 == pytest.approx(1, abs=0.25)
    shifted = over_floor(target, fresh[0] + torch.tensor([0.4, 0.0]))
    assert shifted > 2 * max(ratios)
    rng, a = torch.Generator().manual_seed(7), fresh[0]
    b, c = target.sample(1000, rng), target.sample(1000, rng)

    def distance(x, y):
        return float(sliced_wasserstein(x, y, generator=torch.Generator().manual_seed(0)))

    wanted = (distance(a, b) + distance(a, c)) / 2 / distance(c, b)
    assert over_floor(target, a, seed=7, sets=2) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="sets=1: wanted"):
        over_floor(target, a, sets=1)
    with pytest.raises(ValueError, match="samples has shape"):
        over_floor(target, a[:, :1])


def test_frechet_distance_is_scipys_and_torchmetrics():
    x, y = fid_inputs()
    cov_x, cov_y = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    wanted = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(cov_x + cov_y - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-8)
    reference = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert frechet_distance(x, y) == pytest.approx(float(reference), rel=1e-8)


def test_frechet_distance_in_closed_form():
    """Zero on itself; |v|^2 for a shift; (c-1)^2 tr C for a scaling; also in one dimension and at deficient rank."""
    x, _ = fid_inputs()
    v = f64([1.0, 2.0, 0.0, 0.0, -1.0])
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(x, x + v) == pytest.approx(6, rel=1e-9)
    centred = x - x.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * float(x.T.cov().trace()), rel=1e-9)
    a, b = normal(50, 1), 2 * normal(40, 1, seed=1)
    wanted = float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(x[:3], x[:3] + v) == pytest.approx(6, rel=1e-6)


X = torch.zeros(4, 2)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: wasserstein_1d(X, X, p=0.0), ValueError, "p=0.0"),
    (lambda: sliced_wasserstein(X, torch.zeros(4, 3)), ValueError, r"y has shape \(4, 3\); wanted \(n, 2\)"),
    (lambda: sliced_wasserstein(X * math.nan, X), ValueError, "x holds a NaN"),
    (lambda: sliced_wasserstein(X, X[:0]), ValueError, "y has 0 samples"),
    (lambda: sliced_wasserstein(X, X, n_projections=0), ValueError, "n_projections=0"),
    (lambda: sliced_wasserstein(X.long(), X), TypeError, "x is a tensor of torch.int64"),
    (lambda: kl_both_ways(GaussianMixture([[0.0]], 1.0), X[:, :1]), ValueError, "target has samples of shape"),
    (lambda: kl_both_ways(ring(), torch.zeros(4, 3)), ValueError, "samples has shape"),
    (lambda: kl_both_ways(ring(), X / 0), ValueError, "samples holds a NaN or infinite"),
    (lambda: kl_both_ways(ring(), X, sigma=0.0), ValueError, "sigma=0.0"),
    (lambda: mode_coverage(ring(), torch.zeros(4, 3)), ValueError, "samples has shape"),
    (lambda: frechet_distance(X[:1], X), ValueError, "x has 1 samples; wanted at least 2"),
    (lambda: frechet_distance(X, torch.zeros(4, 3)), ValueError, "y has shape"),
])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("k", "n_bins"), [(2, 5), (10, 15), (10, 1)])
def test_calibration_error_is_torchmetrics(k, n_bins):
    probabilities, labels = (2 * normal(300, k)).softmax(1), torch.randint(k, (300,), generator=rng(1))
    wanted = multiclass_calibration_error(probabilities, labels, k, n_bins)
    assert expected_calibration_error(probabilities, labels, n_bins) == pytest.approx(float(wanted), rel=1e-5)


def test_calibration_error_of_the_sure():
    """Sure and always right: 0; sure and right half of the time: 1/2."""
    sure = torch.eye(3)[[0, 1, 2, 0]]
    assert expected_calibration_error(sure, torch.tensor([0, 1, 2, 0])) == 0
    assert expected_calibration_error(sure, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.5)


@pytest.mark.parametrize(("bad", "labels", "text"), [
    (torch.ones(2, 3), [0, 1], "probabilities has rows"), (torch.eye(3), [0, 1, 3], "labels runs"),
    (torch.tensor([[1.5, -0.5]]), [0], "probabilities has rows"),
])
def test_calibration_error_refuses(bad, labels, text):
    with pytest.raises(ValueError, match=text):
        expected_calibration_error(bad, torch.tensor(labels))


def test_distribution_function_and_quantiles_on_the_line():
    """Against scipy's normal law, component by component; quantiles are its inverse, far out too."""
    mixture, x = mixture_1d(), f64([[-30.0], [-1.0], [0.2], [0.9], [4.0]])
    parts = [norm(float(m), float(v) ** 0.5).cdf(x[:, 0].numpy())
             for m, v in zip(mixture.means, mixture.variances, strict=True)]
    expected = sum(float(w) * torch.from_numpy(part) for w, part in zip(mixture.weights, parts, strict=True))
    torch.testing.assert_close(cdf(mixture, x), expected, rtol=1e-12, atol=1e-15)
    share = f64([1e-9, 0.01, 0.5, 0.99])
    torch.testing.assert_close(cdf(mixture, quantile(mixture, share)), share, rtol=1e-6, atol=0)
    normal_law = quantile(GaussianMixture(f64([[3.0]]), 2.0), share)
    torch.testing.assert_close(normal_law[:, 0], 3 + 2 * torch.special.ndtri(share))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: cdf(ring(), torch.zeros(3, 1)), r"samples of shape \(2,\); wanted a mixture on the line"),
    (lambda: quantile(ring(), torch.zeros(3)), r"samples of shape \(2,\); wanted a mixture on the line"),
    (lambda: cdf(mixture_1d(), torch.zeros(3)), "x has shape"),
])
def test_quantiles_are_for_the_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
