"""Every estimator of D_f against the exact value, and the dual's promise: a lower bound, tight at the optimum."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn

from minidistill.distributions import GaussianMixture
from minidistill.divergences import F, alpha_divergence, from_function, skew_jensen_shannon, total_variation
from minidistill.divergences import estimators as es
from minidistill.divergences.f_critics import Critic, cut, dual_values, learn_log_ratio, train_critic
from tests.helpers import LargestTensor, f64, line, mixture_1d, mixture_2d, rng

ROWS = {
    **F, "alpha0.3": alpha_divergence(0.3), "skew0.2": skew_jensen_shannon(0.2), "flipped": F["pearson"].flipped(),
    "custom": from_function(lambda r: (r - 1) ** 2 / (r + 1)),
}
SMOOTH_AND_NOT = {**ROWS, "total_variation": total_variation}
P, Q = GaussianMixture(f64([[0.8]]), 1.0), GaussianMixture(f64([[0.0]]), 1.2)
NODES, CELL = line(-14, 14, 4001)


def gaussian(mean, cov):
    return GaussianMixture(f64([mean]), f64([cov]))


def gaussian_kl(p, q):
    """Between two Gaussians (mean, cov), in closed form."""
    (m0, s0), (m1, s1) = ((f64(m), f64(s)) for m, s in (p, q))
    gap, inverse = m1 - m0, torch.linalg.inv(s1)
    log_det = torch.logdet(s1) - torch.logdet(s0)
    return float(torch.trace(inverse @ s0) + gap @ inverse @ gap - len(m0) + log_det) / 2


def expected_bound(row, v):
    """E_p f'(e^v) - E_q f*(f'(e^v)) for a critic's values on NODES: quadrature, no sampling."""
    x = NODES[:, None]
    return float((P.log_prob(x).exp() * row.slope(v) - Q.log_prob(x).exp() * row.cost(v)).sum() * CELL)


# ------------------------------------------------------------------------------------------------ known densities


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "pearson", "total_variation"])
def test_grid_is_scipys_integral(name):
    row = SMOOTH_AND_NOT[name]
    p, q = (lambda x: norm.pdf(x, 0.8, 1.0)), (lambda x: norm.pdf(x, 0.0, 1.2))
    wanted = quad(lambda x: q(x) * float(row.f(f64(p(x) / q(x)))), -12, 12, epsabs=1e-10, limit=300)[0]
    got = es.on_grid(row, P, Q, n_cells=20_001 if name == "total_variation" else 400)
    assert got.value == pytest.approx(wanted, rel=1e-6)
    assert got.outside < 1e-12
    assert got.standard_error == 0


def test_grid_in_two_dimensions_is_the_closed_kl():
    p, q = ([0.3, -0.2], [[0.5, 0.2], [0.2, 0.4]]), ([0.0, 0.1], [[0.8, -0.1], [-0.1, 0.6]])
    got = es.on_grid(F["forward_kl"], gaussian(*p), gaussian(*q), n_cells=300)
    assert got.value == pytest.approx(gaussian_kl(p, q), rel=1e-9)
    assert got.n == 300**2
    flipped = es.on_grid(F["reverse_kl"], gaussian(*q), gaussian(*p), n_cells=300)
    assert flipped.value == pytest.approx(got.value, rel=1e-9)


def test_grid_reports_the_mass_that_it_misses():
    got = es.on_grid(F["forward_kl"], P, Q, bounds=(-1.0, 6.0), n_cells=4000)
    assert got.outside == pytest.approx(norm.cdf(-1 / 1.2), abs=1e-3)  # q's, the larger share
    assert es.on_grid(F["forward_kl"], Q, P, bounds=(-1.0, 6.0), n_cells=4000).outside == pytest.approx(got.outside)


@pytest.mark.parametrize("name", SMOOTH_AND_NOT)
@pytest.mark.parametrize("proposal", [None, "q"])
def test_monte_carlo_is_within_five_standard_errors(name, proposal):
    """Widths alike, so that the variance exists for every row: q^3 / p^2 must vanish at infinity for Neyman's."""
    base, row = mixture_2d(), SMOOTH_AND_NOT[name]
    p, q = base.noised(0.8), GaussianMixture(base.means + 0.4, base.noised(0.9).covs, base.weights)
    exact = es.on_grid(row, p, q).value
    wide = None if proposal is None else q
    got = es.monte_carlo(row, p, q, 20_000, rng(), proposal=wide)
    assert abs(got.value - exact) < 5 * got.standard_error
    assert got.standard_error < 0.1 * exact


def test_monte_carlo_works_where_no_grid_can():
    mean, cov = torch.linspace(-0.4, 0.5, 10).double(), torch.diag(torch.linspace(0.6, 1.2, 10).double())
    p, q = (mean.tolist(), cov.tolist()), ([0.0] * 10, torch.eye(10).tolist())
    got = es.monte_carlo(F["forward_kl"], gaussian(*p), gaussian(*q), 40_000, rng())
    assert abs(got.value - gaussian_kl(p, q)) < 4 * got.standard_error
    assert got.standard_error < 0.02 * got.value
    with pytest.raises(ValueError, match="10 dimensions; a grid wants 3"):
        es.on_grid(F["forward_kl"], gaussian(*p), gaussian(*q))


@pytest.mark.parametrize("proposal", [None, Q])
def test_the_standard_error_is_the_spread_of_repetitions(proposal):
    """200 repetitions: their standard deviation over the reported one is 1 +- 0.05 (chi distribution): within 0.2."""
    exact = es.on_grid(F["forward_kl"], P, Q).value
    runs = [es.monte_carlo(F["forward_kl"], P, Q, 500, rng(seed), proposal=proposal) for seed in range(200)]
    z = f64([(run.value - exact) / run.standard_error for run in runs])
    assert 0.8 < float(z.square().mean().sqrt()) < 1.2
    assert abs(float(z.mean())) < 4 / 200**0.5


def test_monte_carlo_survives_ratios_of_e80_in_float32():
    """Means 12.65 apart: log-ratios of +-80 at the modes. KL is 80 exactly, Jensen-Shannon log 2."""
    p, q = (GaussianMixture(torch.tensor([[m]]), 1.0) for m in (math.sqrt(160.0), 0.0))
    assert es.monte_carlo(F["forward_kl"], p, q, 20_000, rng()).value == pytest.approx(80, rel=0.01)
    assert es.monte_carlo(F["reverse_kl"], p, q, 20_000, rng()).value == pytest.approx(80, rel=0.01)
    assert es.monte_carlo(F["jensen_shannon"], p, q, 20_000, rng()).value == pytest.approx(math.log(2), rel=1e-5)
    assert es.monte_carlo(total_variation, p, q, 20_000, rng()).value == pytest.approx(1, rel=1e-5)


def test_equal_distributions_have_no_divergence_and_no_noise():
    for row in SMOOTH_AND_NOT.values():
        got = es.monte_carlo(row, P, P, 1000, rng())
        assert abs(got.value) + got.standard_error < 1e-12
        assert abs(es.on_grid(row, P, P).value) < 1e-12


# ------------------------------------------------------------------------------------------------ the dual


@pytest.mark.parametrize("name", ROWS)
def test_the_dual_is_tight_at_the_exact_ratio(name):
    row, x = ROWS[name], NODES[:, None]
    exact = es.on_grid(row, P, Q, bounds=(-14.0, 14.0), n_cells=4001).value
    assert expected_bound(row, P.log_prob(x) - Q.log_prob(x)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=15, deadline=None)
@given(a=st.floats(-1, 1), b=st.floats(-0.7, 0.7), c=st.floats(-1, 1))
def test_no_critic_beats_the_exact_value(name, a, b, c):
    row, x = ROWS[name], NODES[:, None]
    exact_v = P.log_prob(x) - Q.log_prob(x)
    v = exact_v + a + b * NODES.clamp(-3, 3) + c * torch.sin(2 * NODES)
    exact = expected_bound(row, exact_v)
    assert expected_bound(row, v) <= exact + 1e-9
    if abs(a) > 0.1:
        assert expected_bound(row, v) < exact - 1e-5


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "pearson"])
def test_a_trained_bound_lies_below_and_within_five_per_cent(name):
    """By quadrature over the trained critic, so without sampling error; and the held-out answer agrees with that."""
    row = F[name]
    exact = es.on_grid(row, P, Q).value
    p, q = P.to(torch.float32).sample(20_000, rng(0)), Q.to(torch.float32).sample(20_000, rng(1))
    critic = train_critic(row, p[:10_000], q[:10_000], steps=500, progress=False)
    bound = expected_bound(row, critic(NODES[:, None].float()).double())
    assert 0.95 * exact < bound <= exact
    held_out = es.dual_bound(row, critic, p[10_000:], q[10_000:])
    assert abs(held_out.value - bound) < 4 * held_out.standard_error
    whole = es.variational(row, p, q, steps=500, progress=False)
    assert whole == held_out  # the same split, training and judgement


def test_a_few_samples_cannot_lift_the_bound():
    """Equal p and q, 60 samples a side, 400 steps at a high rate: by quadrature the answer stays just below 0,
    since the kept critic is the one that did best on samples it was not trained on."""
    p, q = P.sample(60, rng(0)), P.sample(60, rng(1))
    critic = train_critic(F["forward_kl"], p, q, steps=400, check_every=10, learning_rate=1e-2, progress=False)
    v, density = critic(NODES[:, None]), P.log_prob(NODES[:, None]).exp()
    bound = float((density * (F["forward_kl"].slope(v) - F["forward_kl"].cost(v))).sum() * CELL)
    assert -0.1 < bound <= 0


def test_the_critic_that_validates_best_is_the_one_returned():
    class Constant(nn.Module):
        """v(x) = a, whose best is 0: it starts too high, and a rate of 1 throws it across at the first step."""

        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(f64(0.5))

        def forward(self, x):
            return self.a.expand(len(x))

    x = P.sample(100, rng())
    critic = train_critic(F["forward_kl"], x, x, Constant(), steps=5, check_every=1, learning_rate=0.5, progress=False)
    assert abs(float(critic.a)) < 0.2
    assert not critic.a.requires_grad


def test_a_reference_gives_kl_from_samples_of_one_side_only():
    """q four standard deviations away: the Gaussian reference makes an easy ratio of it. KL = 5.12 within 2 %."""
    p = GaussianMixture(f64([[-0.5], [0.9]]), f64([0.6, 0.5]))
    q = GaussianMixture(f64([[4.0]]), 1.0)
    exact = es.on_grid(F["forward_kl"], p, q).value
    got = es.kl_with_reference(p.to(torch.float32).sample(16_000, rng()), q.to(torch.float32), generator=rng(1),
                               steps=400, progress=False)
    assert got.value == pytest.approx(exact, rel=0.02)
    assert got.value < exact + 3 * got.standard_error
    exact_critic = es.kl_with_reference(p.sample(4000, rng()), q, reference=p, generator=rng(1), steps=1,
                                        progress=False)
    assert abs(exact_critic.value - exact) < 4 * exact_critic.standard_error + 1e-3


# ------------------------------------------------------------------------------------------------ a ratio


@pytest.mark.parametrize("name", SMOOTH_AND_NOT)
def test_the_exact_ratio_gives_the_exact_value(name):
    row = SMOOTH_AND_NOT[name]
    got = es.with_ratio(row, P, Q, n=20_000, generator=rng(),
                        log_ratio=lambda x: P.log_prob(x) - Q.log_prob(x))
    assert abs(got.value - es.on_grid(row, P, Q).value) < 5 * got.standard_error
    assert got.n == 40_000


def test_a_learned_ratio_is_the_exact_one_where_the_samples_are():
    critic = learn_log_ratio(P.sample(10_000, rng(0)), Q.sample(10_000, rng(1)), steps=500, progress=False)
    x = NODES[(NODES - 0.4).abs() < 2.0][:, None]
    assert float((critic(x) - P.log_prob(x) + Q.log_prob(x)).abs().mean()) < 0.1
    for name in ("jensen_shannon", "squared_hellinger", "total_variation"):
        row = SMOOTH_AND_NOT[name]
        got = es.estimate(row, P, Q, "ratio", log_ratio=critic, n=20_000, generator=rng(2))
        assert got.value == pytest.approx(es.on_grid(row, P, Q, n_cells=4001).value, rel=0.08)


def test_sorted_samples_are_shuffled_where_a_generator_is_given():
    """Sorted, the last half is no sample of p: the held-out bound of p against itself is then far below 0."""
    p, q = (P.sample(2000, rng(seed)).sort(0).values for seed in (0, 1))
    assert torch.equal(torch.cat(cut(p, 0.3)), p)
    kept, held = cut(p, 0.3, rng())
    assert torch.equal(torch.cat([kept, held]).sort(0).values, p)
    assert (len(kept), len(held)) == (1400, 600)
    assert abs(float(held.mean()) - 0.8) < 4 / 600**0.5
    for estimator in (es.variational, es.with_ratio):
        got = estimator(F["jensen_shannon"], p, q, generator=rng(), steps=50, shuffle=True, progress=False)
        assert abs(got.value) < 0.02
    q_far = GaussianMixture(f64([[3.0]]), 1.0)
    exact = es.on_grid(F["forward_kl"], P, q_far).value
    got = es.kl_with_reference(p, q_far, generator=rng(), steps=50, shuffle=True, progress=False)
    assert abs(got.value - exact) < 5 * got.standard_error
    seen = []
    critic = Critic(p)
    critic.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    train_critic(F["forward_kl"], p, q, critic, steps=1, shuffle=True, progress=False)
    assert abs(float(seen[-1].mean()) - 0.8) < 0.3  # the part that judges: 400 of q, as they come
    assert float(seen[-1].std()) > 0.8


# ------------------------------------------------------------------------------------------------ the interface


def test_estimate_dispatches_and_repeats_itself():
    row = F["jensen_shannon"]
    assert es.estimate(row, P, Q) == es.on_grid(row, P, Q)
    assert es.estimate(row, P, Q, "monte_carlo", n=100, generator=rng()) == es.monte_carlo(row, P, Q, 100, rng())
    state = torch.get_rng_state()
    for method in ("variational", "ratio"):
        runs = [es.estimate(row, P, Q, method, n=200, steps=20, generator=rng(), progress=False) for _ in range(2)]
        assert runs[0] == runs[1]
    assert torch.equal(state, torch.get_rng_state())
    assert float(es.Estimate(1.5, 0.1, 10)) == 1.5


def test_images_and_shapes():
    x = torch.randn(64, 1, 4, 4, generator=rng())
    got = es.variational(F["forward_kl"], x, x + 1, steps=20, progress=False)
    assert math.isfinite(got.value)
    assert Critic(x)(x).shape == (64,)
    gain, cost = dual_values(F["forward_kl"], Critic(x), x, x[:10])
    assert (gain.shape, cost.shape) == ((64,), (10,))


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: es.estimate(F["pearson"], P, Q, "grd"), ValueError, "method='grd' is not known; did you mean 'grid'"),
    (lambda: es.on_grid(F["pearson"], torch.zeros(3, 1), Q),  # type: ignore[arg-type]
     TypeError, "p is Tensor; wanted .*log_prob"),
    (lambda: es.monte_carlo(F["pearson"], P, torch.zeros(3, 1)),  # type: ignore[arg-type]
     TypeError, "q is Tensor; wanted .*log_prob"),
    (lambda: es.monte_carlo(F["pearson"], P, Q, n=1), ValueError, "n=1: wanted"),
    (lambda: es.on_grid(F["pearson"], P, Q, bounds=(2.0, 1.0)), ValueError, "bounds="),
    (lambda: es.on_grid(F["pearson"], P, Q, n_cells=1), ValueError, "n_cells=1"),
    (lambda: es.on_grid(F["pearson"], mixture_2d(), mixture_2d(), n_cells=40_000), ValueError,
     r"n_cells=40000 in 2 dimensions is 1.6e\+09 points"),
    (lambda: es.on_grid(F["pearson"], P, mixture_2d()), ValueError, "p has 1 dimensions and q 2"),
    (lambda: es.on_grid(F["pearson"], P, Q, bounds=([0.0, 0.0], [1.0, 1.0])), ValueError,
     "bounds: a corner has 2 numbers; wanted 1"),
    (lambda: es.variational(F["pearson"], "p", Q),  # type: ignore[arg-type]
     TypeError, "p is str; wanted .*sample"),
    (lambda: es.variational(F["pearson"], P.sample(2), Q), ValueError, "p has 2 samples"),
    (lambda: es.variational(F["pearson"], P, Q, held_out=1.0), ValueError, "held_out or validation is 1.0"),
    (lambda: es.variational(total_variation, P, Q), ValueError, "total_variation has a flat slope"),
    (lambda: es.variational(F["pearson"], P, Q, steps=0), ValueError, "steps=0"),
    (lambda: es.variational(F["pearson"], P, mixture_2d()), ValueError, "samples_q has shape"),
])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_grid_for_an_unknown_law_needs_bounds():
    class Law:
        shape = (1,)

        def sample(self, n, generator=None):
            return P.sample(n, generator)

        def log_prob(self, x):
            return P.log_prob(x)

    with pytest.raises(ValueError, match="bounds: p is Law"):
        es.on_grid(F["pearson"], Law(), Q)
    got = es.on_grid(F["pearson"], Law(), Q, bounds=(-12.0, 12.0))
    assert got.value == pytest.approx(es.on_grid(F["pearson"], P, Q).value, rel=1e-9)
    assert mixture_1d().shape == Law.shape


class Law:
    """A density without a shape, whose points must come on one device."""

    device = torch.device("cpu")

    def __init__(self, mixture):
        self.mixture = mixture

    def log_prob(self, x):
        assert x.device == self.device
        return self.mixture.log_prob(x if x.device.type == "cpu" else torch.zeros(x.shape, dtype=x.dtype))


def test_a_grid_takes_its_dimensions_from_a_shape_or_from_the_corners():
    p, q = Law(mixture_2d()), Law(mixture_2d().noised(0.5))
    corners = ([-6.0, -5.0], [7.0, 5.0])
    wanted = es.on_grid(F["pearson"], p.mixture, q.mixture, bounds=corners, n_cells=50)
    for left, right in ((p, q), (p.mixture, q), (p, q.mixture)):
        assert es.on_grid(F["pearson"], left, right, bounds=corners, n_cells=50) == wanted
    with pytest.raises(ValueError, match=r"bounds: neither p nor q has a \.shape"):
        es.on_grid(F["pearson"], p, q, bounds=(-6.0, 6.0))
    with pytest.raises(ValueError, match="bounds has 4 dimensions; a grid wants 3"):
        es.on_grid(F["pearson"], p, q, bounds=([0.0] * 4, [1.0] * 4))


def test_a_grid_is_laid_in_chunks(monkeypatch):
    """The same sum, in any order of memory; no tensor is larger than a chunk's points times the mixture's parts."""
    options = {"bounds": ([-3.0, -4.0, -5.0], [3.0, 5.0, 4.0]), "n_cells": 20, "progress": False}
    root = f64([[1.0, 0.2, -0.3], [0.0, 0.7, 0.4], [0.1, 0.0, 0.5]])
    p, q = gaussian([0.2, -0.3, 0.1], (root @ root.T).tolist()), gaussian([0.0] * 3, torch.eye(3).tolist())
    axes = [torch.linspace(a, b, 20, dtype=torch.float64) for a, b in zip(*options["bounds"], strict=True)]
    x = torch.cartesian_prod(*axes)
    cell = float(torch.stack([axis[1] - axis[0] for axis in axes]).prod())
    wanted = float(F["pearson"].between(p.log_prob(x), q.log_prob(x), cell))
    wanted_mass = 1 - cell * float(p.log_prob(x).exp().sum()), 1 - cell * float(q.log_prob(x).exp().sum())
    monkeypatch.setattr(es, "CHUNK", 77)
    with LargestTensor() as mode:
        got = es.on_grid(F["pearson"], p, q, **options)
    assert got.value == pytest.approx(wanted, rel=1e-10)
    assert got.outside == pytest.approx(max(wanted_mass), rel=1e-9)
    assert got.n == 8000
    assert mode.elements <= 77 * 9


def test_a_grid_stands_where_it_is_asked_to():
    """No accelerator needed: a law that sees points on `meta` and answers on the cpu."""
    class There(Law):
        device = torch.device("meta")

    got = es.on_grid(F["pearson"], There(P), There(P), bounds=([-1.0], [1.0]), n_cells=5, device="meta")
    assert got.n == 5
