"""Distances between scores, and every number that scores give, against closed forms, quadrature and scipy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import huber as scipy_huber
from torch import nn

from minidistill import divergences as dv
from minidistill.distributions import GaussianMixture
from minidistill.divergences import estimators as es
from minidistill.divergences.noise_integral import Levels, integrate, levels_from
from tests.helpers import f64, line, mixture_1d, normal, rng

DISTANCES = [
    dv.squared_l2(), dv.l2(), dv.power(1.5), dv.power(3.0), dv.huber(0.7), dv.huber(5.0), dv.pseudo_huber(0.1),
    dv.pseudo_huber(3.0), dv.from_distance(lambda y: y.abs().flatten(1).sum(1), "l1"),
]
each_distance = pytest.mark.parametrize("distance", DISTANCES, ids=lambda d: d.name)
TWO, THREE = mixture_1d("two"), mixture_1d("three")
QUIET = {"progress": False}


def gaussian(mean, variance):
    """One isotropic Gaussian in 1-D."""
    return GaussianMixture(f64([[mean]]), math.sqrt(variance))


# ------------------------------------------------------------------------------------------------ distances


@each_distance
@pytest.mark.parametrize("shape", [(4, 2), (4, 1, 3, 3)])
def test_score_distance_gradient_is_autograds(distance, shape):
    y = normal(*shape).requires_grad_(True)
    value = distance.value(y)
    assert value.shape == (4,)
    torch.testing.assert_close(distance.gradient(y.detach()), torch.autograd.grad(value.sum(), y)[0])
    assert distance.gradient(y.detach()).shape == shape


@each_distance
def test_distances_vanish_only_at_zero_and_have_no_gradient_there(distance):
    for dtype in (torch.float32, torch.float64):
        zero = torch.zeros(2, 3, dtype=dtype)
        assert float(distance.value(zero).abs().max()) < 1e-12
        assert float(distance.gradient(zero).abs().max()) == 0
    assert float(distance.value(normal(5, 3)).min()) > 0


def test_distances_are_the_formulas():
    y = normal(6, 3)
    length = y.norm(dim=1)
    for got, wanted in (
        (dv.squared_l2(), length**2), (dv.l2(), length), (dv.power(3.0), length**3),
        (dv.huber(1.2), torch.from_numpy(scipy_huber(1.2, length.numpy()))),
        (dv.pseudo_huber(0.4), (length**2 + 0.16).sqrt() - 0.4),
    ):
        torch.testing.assert_close(got.value(y), wanted)
    custom = dv.from_distance(lambda y: y.square().flatten(1).sum(1))
    torch.testing.assert_close(custom.gradient(y), dv.squared_l2().gradient(y))


def test_your_own_distance_is_differentiable_twice():
    custom = dv.from_distance(lambda y: y.pow(4).flatten(1).sum(1))
    y = normal(3, 2).requires_grad_(True)
    torch.testing.assert_close(torch.autograd.grad(custom.gradient(y).sum(), y)[0], 12 * y.detach() ** 2)
    with torch.no_grad():
        torch.testing.assert_close(custom.gradient(y), 4 * y**3)


@settings(max_examples=50, deadline=None)
@given(log_scale=st.floats(-6, 6), log_c=st.floats(-4, 4), seed=st.integers(0, 99))
def test_both_hubers_are_bounded_and_between_their_asymptotes(log_scale, log_c, seed):
    """Pseudo-Huber: |d'| <= 1, and d <= |y| and d <= |y|^2 / 2c: quadratic below c, linear above. Huber is c times as
    steep, and the larger of the two."""
    c, y = 10**log_c, 10**log_scale * normal(3, 2, seed=seed)
    d, norm_y = dv.pseudo_huber(c), y.norm(dim=1)
    assert (d.gradient(y).norm(dim=1) <= 1 + 1e-12).all()
    slack = 1e-12 * (c + norm_y)
    assert (d.value(y) <= norm_y + slack).all()
    assert (d.value(y) <= norm_y.square() / (2 * c) + slack).all()
    assert (dv.huber(c).gradient(y).norm(dim=1) <= c * (1 + 1e-12)).all()
    assert (dv.huber(c).value(y) >= c * d.value(y) - c * slack).all()


# ------------------------------------------------------------------------------------------------ Fisher


@each_distance
def test_fisher_is_the_integral_over_noised_samples(distance):
    """sum_i w_i E_{q_sigma} d(s_p - s_q) by the trapezoid rule; 20,000 samples come within 5 standard errors."""
    sigmas, weights = f64([0.3, 1.0, 2.5]), f64([0.2, 1.0, 3.0])
    x, cell = line(-16, 16, 4001)
    wanted = 0.0
    for sigma, weight in zip(sigmas.tolist(), weights.tolist(), strict=True):
        p, q = TWO.noised(sigma), THREE.noised(sigma)
        gap = p.score(x[:, None]) - q.score(x[:, None])
        wanted += weight * float((q.log_prob(x[:, None]).exp() * distance.value(gap)).sum() * cell)
    got = dv.fisher(TWO, THREE, THREE, sigmas, weights, distance, n=20_000, generator=rng(), **QUIET)
    assert abs(got.value - wanted) < 5 * got.standard_error
    assert got.standard_error < 0.05 * wanted


def test_fisher_of_shifted_gaussians_is_exact():
    """s_p - s_q = delta / (1 + sigma^2) everywhere, so every sample gives the answer; no weights: the average."""
    sigmas, x0 = f64([0.5, 2.0]), gaussian(0.0, 1.0).sample(50, rng())
    expected = 0.7**2 / (1 + sigmas**2) ** 2
    p, q = gaussian(0.7, 1.0), gaussian(0.0, 1.0)
    for weights, wanted in ((None, expected.mean()), (lambda s: s**4, (expected * sigmas**4).sum())):
        got = dv.fisher(p, q, x0, sigmas, weights, batch_size=17, **QUIET)
        assert got.value == pytest.approx(float(wanted), rel=1e-10)
        assert got.standard_error < 1e-10
        assert got.n == 50


# ------------------------------------------------------------------------------------------------ KL


@pytest.mark.parametrize("law", ["log_logistic", "log_uniform"])
@pytest.mark.parametrize(("tail", "high"), [(False, 20.0), (False, 3.0), (True, 20.0)])
def test_kl_of_shifted_gaussians_has_no_sampling_noise_but_the_levels(law, tail, high):
    """Equal variances s^2: sigma |y|^2 integrates to delta^2 / 2 [1 / (s^2 + low^2) - 1 / (s^2 + high^2)], and with
    the tail to the KL above `low`. Stratified levels leave an error of order n^-3/2."""
    s2, delta, low = 0.8, 1.1, 0.02
    got = dv.kl_from_scores(gaussian(delta, s2), gaussian(0.0, s2), gaussian(delta, s2), n=4000, sigma_min=low,
                            sigma_max=high, law=law, tail=tail, generator=rng(), **QUIET)
    wanted = delta**2 / 2 * (1 / (s2 + low**2) - (0 if tail else 1 / (s2 + high**2)))
    assert got.value == pytest.approx(wanted, rel=2e-4)
    assert got.standard_error < 1e-3 * wanted


@pytest.mark.parametrize(("p", "q"), [((0.7, 0.6), (-0.3, 1.4)), ((0.0, 1.0), (0.5, 0.3))])
def test_kl_of_two_gaussians_within_one_per_cent(p, q):
    """300,000 draws: 1 % is three standard errors or more."""
    wanted = (p[1] + (p[0] - q[0]) ** 2) / q[1] / 2 - 0.5 + math.log(q[1] / p[1]) / 2
    got = dv.kl_from_scores(gaussian(*p), gaussian(*q), gaussian(*p), n=300_000, generator=rng(), **QUIET)
    assert got.value == pytest.approx(wanted, rel=0.01)
    assert got.standard_error < 0.0034 * wanted


@pytest.mark.parametrize("swap", [False, True])
def test_kl_of_two_mixtures_within_three_per_cent(swap):
    p, q = (THREE, TWO) if swap else (TWO, THREE)
    exact = es.on_grid(dv.F["forward_kl"], p, q).value
    got = dv.kl_from_scores(p, q, p, n=40_000, generator=rng(), **QUIET)
    assert got.value == pytest.approx(exact, rel=0.03)
    assert abs(got.value - exact) < 4 * got.standard_error


def test_kl_of_images_and_of_samples_used_in_turn():
    """(n, 1, 2, 2) Gaussians in closed form; 500 samples serve 3000 draws."""
    def of(mean):
        return lambda x, sigma, label=None: mean + (x - mean) / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    x0 = 0.5 + normal(500, 1, 2, 2)
    got = dv.kl_from_scores(of(0.5), of(0.0), x0, n=3000, batch_size=700, generator=rng(), **QUIET)
    assert got.value == pytest.approx(4 * 0.5**2 / 2, rel=1e-2)


@pytest.mark.parametrize("law", ["log_logistic", "log_uniform"])
@pytest.mark.parametrize("stratified", [True, False])
def test_the_standard_error_is_the_spread_of_repetitions(law, stratified):
    """60 repetitions: their spread over the reported error is 1 +- 0.09, within 0.3."""
    exact = es.on_grid(dv.F["forward_kl"], TWO, THREE).value
    runs = [dv.kl_from_scores(TWO, THREE, TWO, n=600, law=law, stratified=stratified, generator=rng(seed), **QUIET)
            for seed in range(60)]
    z = f64([(run.value - exact) / run.standard_error for run in runs])
    assert 0.7 < float(z.square().mean().sqrt()) < 1.3
    assert abs(float(z.mean())) < 4 / 60**0.5


def test_importance_and_strata_both_cut_the_error():
    error = {
        (law, stratified): dv.kl_from_scores(TWO, THREE, TWO, n=20_000, law=law, stratified=stratified,
                                             generator=rng(), **QUIET).standard_error
        for law in ("log_logistic", "log_uniform") for stratified in (True, False)
    }
    for law in ("log_logistic", "log_uniform"):
        assert error[law, True] < 0.9 * error[law, False]
    for stratified in (True, False):
        assert error["log_logistic", stratified] < 0.95 * error["log_uniform", stratified]


def test_the_order_of_the_samples_does_not_matter():
    """Sorted samples: taken in their order, the low ones alone would get the low noise levels."""
    exact = es.on_grid(dv.F["forward_kl"], TWO, THREE).value
    got = dv.kl_from_scores(TWO, THREE, TWO.sample(20_000, rng()).sort(0).values, n=20_000, generator=rng(), **QUIET)
    assert abs(got.value - exact) < 4 * got.standard_error


def test_kl_repeats_itself_and_is_zero_between_equals():
    runs = [dv.kl_from_scores(TWO, THREE, TWO, n=100, generator=rng(3), **QUIET) for _ in range(2)]
    assert runs[0] == runs[1]
    assert dv.kl_from_scores(TWO, TWO, TWO, n=100, generator=rng(), **QUIET).value == 0


# ------------------------------------------------------------------------------------------------ entropy, information


def test_entropy_of_a_gaussian_and_of_a_mixture():
    cov = f64([[1.0, 0.3], [0.3, 0.5]])
    correlated = GaussianMixture(f64([[0.5, 0.2]]), cov[None])
    wanted = math.log(2 * math.pi * math.e) + float(torch.logdet(cov)) / 2
    got = dv.entropy_from_scores(correlated, correlated, n=50_000, generator=rng(), **QUIET)
    assert abs(got.value - wanted) < 4 * got.standard_error
    assert got.standard_error < 0.01

    def surprise(x):
        log_p = float(TWO.log_prob(f64([[x]])))
        return -math.exp(log_p) * log_p

    wanted = quad(surprise, -8, 8, epsabs=1e-9, limit=200)[0]
    got = dv.entropy_from_scores(TWO, TWO, n=50_000, generator=rng(), **QUIET)
    assert abs(got.value - wanted) < 4 * got.standard_error
    assert got.standard_error < 0.01


def test_the_errors_of_both_parts_of_an_entropy_add_up():
    x0 = TWO.sample(20_000, rng())
    mean, variance = x0.mean(), x0.var()

    def reference(x, sigma):
        return mean + variance / (variance + sigma[:, None] ** 2) * (x - mean)

    kl = dv.kl_from_scores(TWO, reference, x0, generator=rng(1), **QUIET)
    got = dv.entropy_from_scores(TWO, x0, generator=rng(1), **QUIET)
    of_samples = float(((x0 - mean).square() / (2 * variance)).std()) / 20_000**0.5
    assert got.standard_error**2 == pytest.approx(kl.standard_error**2 + of_samples**2, rel=1e-6)
    assert kl.standard_error > 0.1 * of_samples


def correlated_pairs(rho, n=20_000, dtype=torch.float64):
    """Standard normals with correlation rho, and I(X; Y) = -log(1 - rho^2) / 2."""
    x, e = normal(n, 1, seed=1), normal(n, 1, seed=2)
    return x.to(dtype), (rho * x + math.sqrt(1 - rho**2) * e).to(dtype), -0.5 * math.log(1 - rho**2)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.6, 0.9])
def test_mutual_information_of_correlated_gaussians_in_both_forms(rho):
    """Exact scores, 40,000 draws: both forms within 4 standard errors, which are below 2 %."""
    x, y, exact = correlated_pairs(rho)
    joint = GaussianMixture(f64([[0.0, 0.0]]), f64([[[1.0, rho], [rho, 1.0]]]))

    def given(xt, sigma, condition):
        v = 1 - rho**2
        return rho * condition + v / (v + sigma.reshape(-1, 1) ** 2) * (xt - rho * condition)

    levels = {"n": 40_000, "generator": rng(), **QUIET}
    for got in (
        dv.mutual_information(given, gaussian(0.0, 1.0), x, y, **levels),
        dv.mutual_information_joint(joint, given, given, x, y, **levels),
    ):
        assert abs(got.value - exact) <= 4 * got.standard_error + 1e-12
        assert got.standard_error <= 0.02 * exact + 1e-12


def test_the_joint_form_hands_images_to_the_conditional_denoisers():
    """x (n, 1, 2, 2) and y (n, 1, 1): the conditional denoisers see those shapes, the joint one a flat z; the number
    is that of the same pairs flattened."""
    x, y, joint_cov = normal(300, 1, 2, 2), normal(300, 1, 1, seed=1), torch.eye(5, dtype=torch.float64)[None]
    joint, seen = GaussianMixture(torch.zeros(1, 5, dtype=torch.float64), joint_cov), set()

    def given(xt, sigma, condition):
        seen.add((tuple(xt.shape[1:]), tuple(condition.shape[1:])))
        flat = condition.flatten(1).sum(1).reshape(-1, *[1] * (xt.ndim - 1))
        return xt / 2 + 0.1 * flat

    images = dv.mutual_information_joint(joint, given, given, x, y, n=400, generator=rng(), **QUIET)
    assert seen == {((1, 2, 2), (1, 1)), ((1, 1), (1, 2, 2))}
    flat = dv.mutual_information_joint(joint, given, given, x.flatten(1), y.flatten(1), n=400, generator=rng(), **QUIET)
    assert images.value == pytest.approx(flat.value, rel=1e-12)
    assert flat.value > 0.01


class TwoDenoisers(nn.Module):
    """D(x_sigma, sigma, y) and D(x_sigma, sigma) in one network, as in MINDE: what both get wrong cancels."""

    def __init__(self, hidden=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )

    def forward(self, x, sigma, y=None):
        s = sigma.reshape(-1, 1)
        c_in = (1 + s**2).rsqrt()
        known = torch.zeros_like(x) if y is None else (~y.isnan()).to(x)
        y = torch.zeros_like(x) if y is None else y.nan_to_num()
        return c_in**2 * x + s * c_in * self.layers(torch.cat([c_in * x, y, known, c_in, s * c_in, s.log() / 2], 1))


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
def test_mutual_information_from_learned_scores_within_ten_per_cent(rho):
    torch.manual_seed(0)
    generator, model, steps, n = rng(), TwoDenoisers(), 800, 512
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        x, e, y_noise, level = torch.randn(4, n, 1, generator=generator)
        y = rho * x + math.sqrt(1 - rho**2) * y_noise
        sigma = torch.exp(1.3 * level - 0.3).clamp(0.05, 10)
        out = model((x + sigma * e).repeat(2, 1), sigma.repeat(2, 1), torch.cat([y, torch.full_like(y, math.nan)]))
        loss = ((out - x.repeat(2, 1)) ** 2 * (1 + sigma**-2).repeat(2, 1)).mean()  # EDM's weight at sigma_data = 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y, exact = correlated_pairs(rho, dtype=torch.float32)
    got = dv.mutual_information(model, model, x, y, n=40_000, sigma_min=0.05, sigma_max=10.0, generator=rng(), **QUIET)
    assert got.value == pytest.approx(exact, rel=0.1)


# ------------------------------------------------------------------------------------------------ any f


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "squared_hellinger", "le_cam",
                                  "pearson", "jeffreys"])
def test_uni_instructs_expansion_is_the_divergence(name):
    """int sigma E_q h(r) |s_p - s_q|^2 d sigma = D_f(p || q), within 4 standard errors of 2 % at most."""
    row = dv.F[name]
    exact = es.on_grid(row, TWO, THREE).value
    got = dv.from_scores(row, TWO, THREE, n=40_000, generator=rng(), **QUIET)
    assert abs(got.value - exact) < 4 * got.standard_error
    assert got.standard_error < 0.02 * exact


def test_expansion_of_forward_kl_is_kl_from_scores_and_takes_a_ratio():
    """h = r moves the expectation from q to p; and a given log-ratio is used as the densities' own is."""
    def ratio(x, sigma):
        return TWO.noised(sigma).log_prob(x) - THREE.noised(sigma).log_prob(x)

    options = {"n": 4000, "n_levels": 50, "sigma_min": 0.1, "sigma_max": 8.0}
    kl = dv.kl_from_scores(TWO, THREE, TWO, n=40_000, sigma_min=0.1, sigma_max=8.0, generator=rng(), **QUIET)
    runs = [dv.from_scores(dv.F["forward_kl"], TWO, THREE, log_ratio=given, generator=rng(1), **options, **QUIET)
            for given in (None, ratio)]
    assert runs[0] == runs[1]
    assert abs(runs[0].value - kl.value) < 4 * math.hypot(runs[0].standard_error, kl.standard_error)
    wrong = dv.from_scores(dv.F["forward_kl"], TWO, THREE, log_ratio=lambda x, s: 1 + ratio(x, s), generator=rng(1),
                           **options, **QUIET)
    assert wrong.value > 1.3 * kl.value  # h q / m = 2 r / (1 + r) grows with r


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("n_levels", [None, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 10_000])
def test_batches_are_bounded_in_levels_and_tail_and_change_nothing(n_levels, batch_size):
    """A gap without noise: what is left of batch_size is how many draws come at once. 2000 draws, and 200 in the tail;
    one call sees one level where levels are shared, and its draws are even in number, for `from_scores` halves them."""
    x0, sizes, calls = normal(50, 2), [], []

    def gap(rows, sigma):
        sizes.append(len(rows))
        calls.append(sigma)
        return (1 + (rows % 7)) / (1 + sigma**2)

    def run(size):
        return integrate(gap, x0, levels_from({"n": 2000, "n_levels": n_levels, "batch_size": size, **QUIET}), rng())

    whole = run(10_000)
    sizes.clear()
    calls.clear()
    got = run(batch_size)
    assert got.value == pytest.approx(whole.value, rel=1e-12)
    assert got.standard_error == pytest.approx(whole.standard_error, rel=1e-12)
    assert max(sizes) <= max(2, batch_size)
    assert sum(sizes) == got.n + 2 * (got.n // 20)
    if n_levels:
        assert all(bool((sigma == sigma[0]).all()) for sigma in calls)
        assert all(size % 2 == 0 for size in sizes)


def test_options_of_levels():
    at = levels_from({"n": 4, "n_levels": 4, "sigma_min": 0.5, "sigma_max": 2.0, "tail": False})
    assert (at.n, at.n_levels, at.sigma_min, at.sigma_max, at.tail) == (4, 4, 0.5, 2.0, False)
    assert levels_from({}) == Levels()


X = torch.zeros(5, 1, dtype=torch.float64)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: dv.pseudo_huber(0.0), ValueError, "c=0.0"),
    (lambda: dv.huber(-1.0), ValueError, "delta=-1.0"),
    (lambda: dv.power(0.5), ValueError, "p=0.5: wanted a finite number >= 1"),
    (lambda: dv.from_distance(lambda y: y.square()), ValueError, r"d gave shape \(3, 2\)"),
    (lambda: dv.from_distance(lambda y: y.square().sum(1) + 1), ValueError, "wanted 0 and two positive"),
    (lambda: dv.from_distance(lambda y: -y.square().sum(1)), ValueError, "wanted 0 and two positive"),
    (lambda: dv.fisher(TWO, TWO, TWO, f64([0.0])), ValueError, "sigmas"),
    (lambda: dv.fisher(TWO, TWO, TWO, f64([1.0]), f64([1.0, 2.0])), ValueError, "weights has shape"),
    (lambda: dv.fisher(TWO, TWO, "data", f64([1.0])),  # type: ignore[arg-type]
     TypeError, "sample_q is str"),
    (lambda: dv.kl_from_scores(TWO, TWO, TWO, sigma_min=2.0, sigma_max=1.0), ValueError, "sigma_min=2 is not below"),
    (lambda: dv.kl_from_scores(TWO, TWO, TWO, sigma_min=-1.0), ValueError, "sigma_min=-1.0"),
    (lambda: dv.kl_from_scores(TWO, TWO, TWO, law="uniform"), ValueError, "law='uniform' is not known"),
    (lambda: dv.kl_from_scores(TWO, TWO, TWO, sigma_mn=1.0), TypeError, "did you mean 'sigma_m"),
    (lambda: dv.kl_from_scores(TWO, TWO, TWO, n=0), ValueError, "n=0"),
    (lambda: dv.mutual_information(TWO, TWO, X, X[:3]), ValueError, "x has 5 samples and y 3"),
    (lambda: dv.mutual_information_joint(TWO, TWO, TWO, X, X[:, 0]), ValueError, r"y has shape \(5,\)"),
    (lambda: dv.kl_from_scores(TWO, TWO, TWO, n=3), ValueError, "n=3: wanted a whole number >= 4"),
    (lambda: dv.kl_from_scores(TWO, TWO, TWO, batch_size=0), ValueError, "batch_size=0"),
    (lambda: dv.kl_from_scores(TWO, TWO, TWO, n_levels=1), ValueError, "n_levels=1: wanted a whole number >= 2"),
    (lambda: dv.kl_from_scores(TWO, TWO, TWO, n=10, n_levels=11), ValueError, "n_levels=11: wanted at most n=10"),
    (lambda: dv.kl_from_scores(TWO, TWO, TWO, sigma_max=0.0), ValueError, "sigma_max=0.0"),
    (lambda: dv.from_scores(dv.total_variation, TWO, TWO), ValueError, "total_variation has no curvature"),
    (lambda: dv.from_scores(dv.F["pearson"], TWO, TWO, n=300), ValueError, "n=300 and n_levels=200"),
])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
