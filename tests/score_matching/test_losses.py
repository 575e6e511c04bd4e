"""Every loss is the explicit one plus a constant: quadrature in float64, in 1-D and 2-D, over several models."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from minidistill import score_matching as sm
from minidistill.distributions import GaussianMixture, ring
from minidistill.networks import MLP
from tests.helpers import f64, line, mixture_1d, mixture_2d, normal, normal_pairs, small_denoiser

SIGMA = 0.6
TURN = f64([[0.5, 0.4], [-0.2, 0.3]])  # not symmetric: a model need not be a gradient


NETWORK = small_denoiser(shape=(1,)).double().requires_grad_(False)
MODELS_1D = {
    "linear": lambda x, s, y=None: 0.6 * x + 0.1,
    "tanh": lambda x, s, y=None: 0.8 * torch.tanh(1.3 * x) + 0.1 * x,
    "mixture": mixture_1d("three"),
    "network": lambda x, s, y=None: NETWORK(x, s),
}
MODELS_2D = {  # entire functions, which Gauss-Hermite integrates to rounding
    "linear": lambda x, s, y=None: x @ TURN.T + 0.1,
    "sine": lambda x, s, y=None: 0.5 * x + torch.sin(x @ TURN.T),
    "product": lambda x, s, y=None: 0.2 * x + 0.1 * x.flip(1) * x.cos(),
}


def hermite(n, d):
    """Gauss-Hermite nodes (n^d, d) and weights (n^d,) for a standard normal in d dimensions."""
    nodes, weight = np.polynomial.hermite_e.hermegauss(n)
    grids = torch.cartesian_prod(*[f64(nodes)] * d).reshape(-1, d)
    weights = torch.cartesian_prod(*[f64(weight / weight.sum())] * d).reshape(-1, d)
    return grids, weights.prod(1)


class Rule:
    """Quadrature for one mixture: nodes x with weights of p_sigma, and (x0, noise, component) with theirs."""

    def __init__(self, mixture, sigma, models, x, cell, x0, noise, pair_weight, label=None):
        self.mixture, self.sigma, self.models = mixture, sigma, models
        self.law = mixture.noised(sigma)
        self.x, self.weight = x, self.law.log_prob(x).exp() * cell
        self.x0, self.noise, self.pair_weight, self.label = x0, noise, pair_weight, label

    def over_x(self, loss, *arguments, **options):
        return lambda model: float(self.weight @ loss(model, self.x, self.sigma, *arguments, **options))

    def over_pairs(self, loss, *arguments, **options):
        return lambda model: float(
            self.pair_weight @ loss(model, self.x0, self.sigma, self.noise, *arguments, **options)
        )

    def over_signs(self, loss, **options):
        """E over all slices of signs, of which there are few."""
        signs = [f64(v).expand_as(self.x) for v in itertools.product((-1.0, 1.0), repeat=self.x.shape[1])]
        return lambda model: sum(self.over_x(loss, v, **options)(model) for v in signs) / len(signs)

    def over_noise(self, loss, **options):
        """E over a noise that has nothing to do with x."""
        e, weight = hermite(40, 1)
        x, noise = self.x.repeat_interleave(len(e), 0), e.repeat(len(self.x), 1)
        both = (self.weight[:, None] * weight).flatten()
        return lambda model: float(both @ loss(model, x, self.sigma, noise, **options))

    def explicit(self, model):
        return self.over_x(sm.explicit_loss, self.law.score(self.x))(model)

    def spread(self, expected):
        """How far the difference from the explicit loss is from a constant, over all models."""
        differences = [expected(model) - self.explicit(model) for model in self.models.values()]
        return max(differences) - min(differences)


def rule_1d(kind="two", sigma=SIGMA):
    """Pairs component by component, so that each has its label."""
    mixture, (nodes, cell), (z, e, weight) = mixture_1d(kind), line(-10, 10, 2001), normal_pairs(reach=9.0, n=161)
    k, std = mixture.n_components, mixture.covs.sqrt().flatten()
    x0 = (mixture.means + std[:, None] * z).flatten()[:, None]
    label = torch.arange(k).repeat_interleave(len(z))
    pair_weight = (mixture.weights[:, None] * weight).flatten()
    return Rule(mixture, sigma, MODELS_1D, nodes[:, None], cell, x0, e.repeat(k)[:, None], pair_weight, label)


def rule_2d(sigma=SIGMA):
    mixture, (nodes, cell), (coarse, coarse_cell) = mixture_2d(), line(-8, 8, 161), line(-6, 6, 61)
    x0, (e, weight) = torch.cartesian_prod(coarse, coarse), hermite(12, 2)
    pair_weight = (mixture.log_prob(x0).exp() * coarse_cell**2)[:, None] * weight
    return Rule(mixture, sigma, MODELS_2D, torch.cartesian_prod(nodes, nodes), cell**2, x0.repeat_interleave(len(e), 0),
                e.repeat(len(x0), 1), pair_weight.flatten())


RULES = {"1-D two": rule_1d(), "1-D three": rule_1d("three", 0.9), "2-D": rule_2d()}
EQUAL = {
    "implicit": lambda r: r.over_x(sm.implicit_loss),
    "implicit, in chunks": lambda r: r.over_x(sm.implicit_loss, chunk_size=1),
    "sliced": lambda r: r.over_signs(sm.sliced_loss),
    "sliced, variance reduced": lambda r: r.over_signs(sm.sliced_loss, variance_reduced=True),
    "SURE": lambda r: r.over_x(sm.sure_loss),
    "SURE, sliced": lambda r: r.over_signs(sm.sure_loss),
    "denoising": lambda r: r.over_pairs(sm.denoising_loss),
    "target": lambda r: r.over_pairs(sm.target_loss, r.mixture.score(r.x0)),
    "mixed": lambda r: r.over_pairs(sm.mixed_target_loss, r.mixture.score(r.x0), 0.3),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("loss", EQUAL.values(), ids=EQUAL)
def test_every_loss_is_the_explicit_one_plus_a_constant(loss, rule):
    assert abs(float(rule.weight.sum()) - 1) < 1e-10
    assert rule.spread(loss(rule)) < 1e-8
    assert rule.spread(lambda model: 0.0) > 0.05  # the models differ: a constant is not trivial


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_constants_are_the_ones_that_are_stated(rule):
    """SURE is the denoising loss itself; implicit is Hyvarinen's with 2 sigma^4 / dim; the exact denoiser has 0."""
    dim = rule.x.shape[1]
    information = float(rule.weight @ rule.law.score(rule.x).square().sum(1))
    for model in rule.models.values():
        exact, implicit = rule.explicit(model), rule.over_x(sm.implicit_loss)(model)
        assert abs(rule.over_x(sm.sure_loss)(model) - rule.over_pairs(sm.denoising_loss)(model)) < 1e-8
        assert abs(implicit + rule.sigma**2 - rule.over_x(sm.sure_loss)(model)) < 1e-12
        assert abs(exact - implicit - rule.sigma**4 * information / dim) < 1e-8
    assert rule.explicit(rule.mixture) < 1e-24
    assert abs(rule.over_x(sm.implicit_loss)(rule.mixture) + rule.sigma**4 * information / dim) < 1e-8


def test_the_textbook_factor():
    """dim / (2 sigma^4) times the implicit loss is 1/2 |s|^2 + tr ds/dx, sample by sample."""
    x = normal(7, 2)
    A = (TURN - torch.eye(2)) / SIGMA**2  # the score's Jacobian
    score = (MODELS_2D["linear"](x, SIGMA) - x) / SIGMA**2
    got = sm.implicit_loss(MODELS_2D["linear"], x, SIGMA) * 2 / (2 * SIGMA**4)
    torch.testing.assert_close(got, score.square().sum(1) / 2 + A.trace())


ROUGH = {
    "finite differences": (lambda r, h: r.over_signs(sm.finite_difference_loss, step=h), 0.1),
    "finite differences, variance reduced": (
        lambda r, h: r.over_signs(sm.finite_difference_loss, step=h, variance_reduced=True), 0.1),
    "LCSS": (lambda r, h: r.over_noise(sm.lcss_loss, tau=h), 0.1),
    "LCSS, no control variate": (lambda r, h: r.over_noise(sm.lcss_loss, tau=h, control_variate=False), 0.1),
}


@pytest.mark.parametrize(("loss", "step"), ROUGH.values(), ids=ROUGH)
def test_approximate_losses_are_of_second_order(loss, step):
    rule = RULES["1-D two"]
    spreads = [rule.spread(loss(rule, step / 2**i)) for i in range(3)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(spreads)]
    assert spreads[0] < 0.01
    for order in orders:
        assert 1.9 < order < 2.1, (spreads, orders)


def test_lcss_is_not_denoising():
    """The trap: with the norm at the smoothed point LCSS is DSM. N(0, 1), tau = 0.5, linear scores: -1 against -0.8."""
    x, cell = line(-9, 9, 801)
    e, weight = hermite(20, 1)
    weight = (torch.exp(-x.square() / 2)[:, None] * cell / math.sqrt(2 * math.pi) * weight).flatten()
    x, e = x.repeat_interleave(len(e))[:, None], e.repeat(len(x), 1)

    def best_slope(loss):
        """The minimiser of a parabola in the slope a of the score, from three values."""
        low, mid, high = (float(weight @ loss(lambda x, s, y=None, a=a: x + a * x)) for a in (-1.0, 0.0, 1.0))
        return (low - high) / (2 * (low - 2 * mid + high))

    assert abs(best_slope(lambda model: sm.lcss_loss(model, x, 1.0, e, tau=0.5)) + 1.0) < 1e-10
    shifted = lambda model: (  # noqa: E731
        sm.lcss_loss(model, x, 1.0, e, tau=0.5)
        + (model(x + 0.5 * e, 1.0) - x - 0.5 * e).square().mean(1) - (model(x, 1.0) - x).square().mean(1)
    )
    assert abs(best_slope(shifted) + 0.8) < 1e-10
    denoising = lambda model: sm.denoising_loss(  # noqa: E731
        lambda x, s, y: x + 0.25 * (model(x, s) - x), x, f64(0.5), e)  # the same score, at sigma = 0.5
    assert abs(best_slope(denoising) + 0.8) < 1e-10


def test_the_control_variate_bounds_lcss():
    x = mixture_1d().noised(SIGMA).sample(20_000, torch.Generator().manual_seed(0))
    noise = normal(*x.shape, seed=1)
    variances = {
        (tau, on): float(sm.lcss_loss(mixture_1d(), x, SIGMA, noise, tau=tau, control_variate=on).var())
        for tau in (0.1, 0.01) for on in (True, False)
    }
    assert 0.9 < variances[0.1, True] / variances[0.01, True] < 1.1
    assert 80 < variances[0.01, False] / variances[0.1, False] < 110
    assert variances[0.01, True] < 1e-3 * variances[0.01, False]


SIX = small_denoiser(shape=(6,), hidden=32, depth=2).double()
STOCHASTIC = {
    "sliced": lambda D, x, v: (sm.sliced_loss(D, x, SIGMA, v), sm.implicit_loss(D, x[:1], SIGMA)),
    "variance reduced": lambda D, x, v: (
        sm.sliced_loss(D, x, SIGMA, v, variance_reduced=True), sm.implicit_loss(D, x[:1], SIGMA)),
    "SURE": lambda D, x, v: (sm.sure_loss(D, x, SIGMA, v), sm.sure_loss(D, x[:1], SIGMA)),
    "penalty": lambda D, x, v: (sm.conservative_penalty(D, x, SIGMA, v), sm.asymmetry(D, x[:1], SIGMA)),
    "Fokker-Planck": lambda D, x, v: (
        sm.fokker_planck_loss(D, x, SIGMA, slices=torch.stack([v, v.roll(1, 0)])),
        sm.fokker_planck_loss(D, x[:1], SIGMA)),
}


@pytest.mark.parametrize("kind", ["signs", "Gaussian"])
@pytest.mark.parametrize("both", STOCHASTIC.values(), ids=STOCHASTIC)
def test_sliced_estimates_are_unbiased(both, kind):
    """One point in 6 dimensions, 20,000 slices: within 4 standard errors of the exact value."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(1, 6, generator=rng, dtype=torch.float64).expand(20_000, 6)
    slices = sm.rademacher(x, rng) if kind == "signs" else torch.randn(x.shape, generator=rng, dtype=x.dtype)
    estimates, exact = (value.detach() for value in both(SIX, x, slices))
    error = float(estimates.std()) / math.sqrt(len(x))
    assert estimates.shape == (20_000,)
    assert error > 0
    assert abs(float(estimates.mean() - exact)) < 4 * error


def test_variance_reduction_and_signs_reduce_variance():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, generator=rng, dtype=torch.float64).expand(5000, 6)
    signs, gaussian = sm.rademacher(x, rng), torch.randn(x.shape, generator=rng, dtype=x.dtype)
    plain, reduced, normal_reduced = (
        float(sm.sliced_loss(SIX, x, SIGMA, v, variance_reduced=on).var().detach())
        for v, on in ((signs, False), (signs, True), (gaussian, True))
    )
    assert reduced < plain
    assert reduced < normal_reduced
    assert set(signs.unique().tolist()) == {-1.0, 1.0}


def test_target_and_mix_on_a_gaussian():
    """N(b, a^2): the optimal mix has no variance at all; the two ends have their closed forms."""
    a, b, sigma = 0.7, 0.2, f64([0.1, 0.5, 2.0])
    gaussian = GaussianMixture(f64([[b]]), a)
    z, e = normal(2, 3, 1)
    x0 = b + a * z
    share = sm.optimal_share(sigma, 1 / a**2)
    torch.testing.assert_close(share, a**2 / (a**2 + sigma**2))
    mixed = sm.mixed_target_loss(gaussian, x0, sigma, e, gaussian.score(x0), share)
    assert mixed.abs().max() < 1e-28
    z, e, weight = normal_pairs(reach=9.0, n=81)
    for s in (0.1, 0.5, 2.0):
        x0, noise = (b + a * z)[:, None], e[:, None]
        denoising = weight @ sm.denoising_loss(gaussian, x0, s, noise)
        target = weight @ sm.target_loss(gaussian, x0, s, noise, gaussian.score(x0))
        assert abs(float(denoising) - a**2 * s**2 / (a**2 + s**2)) < 1e-12
        assert abs(float(target) / (s**6 / (a**2 * (a**2 + s**2))) - 1) < 1e-10


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_optimal_share_has_the_least_variance(rule):
    """At the exact denoiser the loss is the target's variance: a parabola in the share, least at `optimal_share`."""
    clean_score, dim = rule.mixture.score(rule.x0), rule.x.shape[1]
    information = float(rule.pair_weight @ clean_score.square().mean(1))
    best = float(sm.optimal_share(rule.sigma, information))

    def variance(share):
        return rule.over_pairs(sm.mixed_target_loss, clean_score, share)(rule.mixture)

    low, mid, high = (variance(k) for k in (0.0, 0.5, 1.0))
    tolerance = 1e-8 if dim == 1 else 1e-2  # the exact denoiser is not entire: Gauss-Hermite in 4-D is rough
    assert abs((3 * low - 4 * mid + high) / (4 * (low - 2 * mid + high)) - best) < tolerance
    noisy_information = float(rule.weight @ rule.law.score(rule.x).square().mean(1))
    least = rule.sigma**4 * (1 / (rule.sigma**2 + 1 / information) - noisy_information)
    assert abs(variance(best) - least) < tolerance


def variance_ratio(sigma, n=40_000):
    """Variance of the target's regression target over the denoising one's, given x, on the ring."""
    target = ring().to(torch.float64)
    rng = torch.Generator().manual_seed(0)
    x0, noise = target.sample(n, rng), torch.randn(n, 2, generator=rng, dtype=torch.float64)
    ts = sm.target_loss(target, x0, sigma, noise, target.score(x0)).mean()
    return float(ts / sm.denoising_loss(target, x0, sigma, noise).mean())


def test_target_score_matching_wins_at_small_noise_only():
    assert variance_ratio(0.01) < 1e-2
    assert variance_ratio(2.0) > 1
    ratios = [variance_ratio(s) for s in (0.01, 0.05, 0.2, 0.5, 2.0)]
    assert ratios == sorted(ratios)


def classify(mixture):
    return lambda x, sigma, label=None: mixture.responsibilities(x, sigma).log()


@pytest.mark.parametrize("rule", [RULES["1-D two"], RULES["1-D three"]], ids=["two", "three"])
def test_dlsm_has_the_posterior_score_as_its_minimiser(rule):
    """By quadrature over component, x0 and noise: no slope and positive curvature along each probe of the logits."""
    mixture, label = rule.mixture, rule.label
    x = rule.x0 + rule.sigma * rule.noise
    posterior = sm.posterior_denoiser(mixture, classify(mixture))
    torch.testing.assert_close(posterior(x, rule.sigma, label), mixture(x, rule.sigma, label), rtol=0, atol=1e-9)

    def expected(step, probe, offset=0.0):
        def logits(x, sigma):
            bend = torch.zeros(len(x), mixture.n_components, dtype=x.dtype).index_fill(1, torch.tensor([0]), 1.0)
            return classify(mixture)(x, sigma) + (offset * x + step * probe(x)) * bend

        return rule.pair_weight @ sm.dlsm_loss(mixture, rule.x0, rule.sigma, rule.noise, logits, label)

    for probe in (lambda x: x, torch.square, torch.sin):
        step = f64(0.0).requires_grad_(True)
        (first,) = torch.autograd.grad(expected(step, probe), step, create_graph=True)
        assert abs(float(first.detach())) < 1e-8
        assert float(torch.autograd.grad(first, step)[0]) > 1e-4
        (beside,) = torch.autograd.grad(expected(step, probe, 0.3), step)
        assert abs(float(beside)) > 1e-4


def test_dlsm_is_explicit_matching_of_the_posterior_plus_a_constant():
    rule = RULES["1-D two"]
    differences = []
    for a, c in ((0.0, 0.0), (1.0, 0.3), (-0.5, 0.8)):
        def logits(x, sigma, a=a, c=c):
            return torch.cat([a * x, torch.sin(c * x)], 1)

        model = sm.posterior_denoiser(rule.mixture, logits)
        loss = rule.over_pairs(sm.dlsm_loss, logits, rule.label)(rule.mixture)
        exact = 0.0
        for k, share in enumerate(rule.mixture.weights):
            one = GaussianMixture(rule.mixture.means[[k]], rule.mixture.covs[[k]]).noised(rule.sigma)
            label = torch.full((len(rule.x),), k)
            gap = sm.explicit_loss(model, rule.x, rule.sigma, one.score(rule.x), label)
            exact += float(share * (one.log_prob(rule.x).exp() @ gap) * (rule.x[1] - rule.x[0]))
        differences.append(loss - exact)
    assert max(differences) - min(differences) < 1e-8


def test_dlsm_trains_the_classifier_alone():
    denoiser, classifier = small_denoiser(), MLP((2,), hidden=8, depth=1, out_features=3)
    (x0, noise), sigma = normal(2, 6, 2).float(), torch.full((6,), 0.5)
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    logits = lambda x, s: classifier(x, s.log() / 4)  # noqa: E731
    loss = sm.dlsm_loss(denoiser, x0, sigma, noise, logits, label)
    (loss.mean() + cross_entropy(logits(x0 + 0.5 * noise, sigma), label)).backward()
    assert loss.shape == (6,)
    assert classifier.inward.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in denoiser.parameters())


def test_tiw_has_the_unbiased_datas_loss():
    """Biased data and the exact log ratio: the loss is the explicit one under the unbiased law, plus a constant."""
    biased = mixture_1d()
    unbiased = GaussianMixture(biased.means, biased.covs, f64([0.9, 0.1]))
    rule = RULES["1-D two"]
    p, q = unbiased.noised(SIGMA), biased.noised(SIGMA)

    def logit(x, sigma, label=None):
        return p.log_prob(x) - q.log_prob(x)

    weight = p.log_prob(rule.x).exp() * (rule.x[1] - rule.x[0])
    differences, plain = [], []
    for model in MODELS_1D.values():
        exact = float(weight @ sm.explicit_loss(model, rule.x, SIGMA, p.score(rule.x)))
        differences.append(rule.over_pairs(sm.tiw_loss, logit)(model) - exact)
        plain.append(rule.over_pairs(sm.denoising_loss)(model) - exact)
    assert max(differences) - min(differences) < 1e-8
    assert max(plain) - min(plain) > 0.05


def test_any_tiw_weight_keeps_the_minimiser_where_its_gradient_goes_with_it():
    """A weight of no meaning is a constant, and then the loss is plain denoising times it."""
    x0, noise = normal(2, 5, 2)
    constant = lambda x, s, y: torch.full((len(x),), 0.7, dtype=x.dtype) + 0 * x.sum(1)  # noqa: E731
    got = sm.tiw_loss(mixture_2d(), x0, 0.5, noise, constant)
    torch.testing.assert_close(got, math.exp(0.7) * sm.denoising_loss(mixture_2d(), x0, 0.5, noise))


# ------------------------------------------------- local denoising score matching

def double_well(x, t):
    return x - x**3


START = GaussianMixture(f64([[-0.6], [0.8]]), f64([0.4, 0.5]), f64([0.4, 0.6]))  # narrow: a cubic drift is stiff


def moments(x, step, linearised, g=0.9):
    """Mean and standard deviation of one local step from each x, (n,)."""
    mean, above = (
        sm.local_step(x[:, None], torch.full_like(x, e)[:, None], double_well, g, 0.0, step, linearised=linearised)[0]
        for e in (0.0, 1.0)
    )
    return mean.flatten(), (above - mean).flatten()


def kernel_of(x, y, step, linearised):
    """Transition densities p(y | x), (len(y), len(x)), and their gradients in y."""
    mean, std = moments(x, step, linearised)
    away = (y[:, None] - mean) / std
    kernel = torch.exp(-0.5 * away.square()) / std / math.sqrt(2 * math.pi)
    return kernel, -kernel * away / std


@pytest.mark.parametrize("linearised", [True, False])
def test_local_dsm_is_explicit_matching_of_the_steps_law(linearised):
    """From a mixture, one step of a double well: the law after it by quadrature, and the constant over models."""
    step, sigma = 0.1, 0.7
    (x, cell), (y, y_cell), (e, weight) = line(-4.5, 4.5, 601), line(-9, 9, 1601), hermite(40, 1)
    p = START.log_prob(x[:, None]).exp() * cell
    law, slope = (matrix @ p for matrix in kernel_of(x, y, step, linearised))
    score = slope / law.clamp(min=1e-300)
    x, e = x.repeat_interleave(len(e))[:, None], e.repeat(len(x), 1)
    both = (p[:, None] * weight).flatten()
    differences = []
    for model in MODELS_1D.values():
        exact = y_cell * law @ sm.explicit_loss(model, y[:, None], sigma, score[:, None])
        loss = sm.local_dsm_loss(model, x, sigma, e, double_well, 0.9, 0.0, step, linearised=linearised)
        differences.append(float(both @ loss - exact))
    assert max(differences) - min(differences) < 1e-8


def score_errors(linearised, steps=(0.1, 0.05, 0.025)):
    """Relative error of the score after one step, against 32 smaller ones."""
    (x, cell), errors = line(-4.5, 4.5, 1201), []
    start = START.log_prob(x[:, None]).exp() * cell
    for step in steps:
        small, slopes = kernel_of(x, x, step / 32, True)
        law = start
        for _ in range(31):
            law = cell * small @ law
        law, exact = small @ law, slopes @ law
        rough, slope = (matrix @ start for matrix in kernel_of(x, x, step, linearised))
        bulk = law > 0.05  # in the tails the cubic drift is too stiff for these steps
        law, exact, score = law[bulk], (exact / law)[bulk], (slope / rough)[bulk]
        errors.append(float((law @ (score - exact).square() / (law @ exact.square())).sqrt()))
    return errors


def test_a_local_step_is_of_second_order_and_linearised_beats_euler():
    euler, linearised = score_errors(False), score_errors(True)
    for errors in (euler, linearised):
        for order in (math.log2(a / b) for a, b in itertools.pairwise(errors)):
            assert 1.7 < order < 2.3, (euler, linearised)
    assert all(b < 0.7 * a for a, b in zip(euler, linearised, strict=True)), (euler, linearised)


def test_a_linear_drift_has_its_exact_transition_at_any_step():
    """dx = A x dt + g dW in the plane, A not symmetric: mean and covariance against a fine integration."""
    A, g, step = f64([[-0.5, 1.0], [-0.7, -0.2]]), 0.8, 0.9
    x = f64([[1.0, -0.5], [0.0, 2.0], [0.3, 0.3]])
    drift = lambda x, t: x @ A.T + 0.2  # noqa: E731
    points = [sm.local_step(x, f64(v).expand(3, 2), drift, g, 0.0, step)[0] for v in ([0.0, 0], [1.0, 0], [0, 1.0])]
    factor = torch.stack([points[1] - points[0], points[2] - points[0]], 2)[0]
    n = 2000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) * step / n  # the midpoint rule, error 1e-7
    grow = torch.linalg.matrix_exp(u[:, None, None] * A)
    cov = g**2 * (grow @ grow.mT).sum(0) * step / n
    mean = x @ torch.linalg.matrix_exp(step * A).T + 0.2 * grow.sum(0).sum(1) * step / n
    torch.testing.assert_close(factor @ factor.T, cov, rtol=1e-6, atol=0)
    torch.testing.assert_close(points[0], mean, rtol=1e-6, atol=1e-7)
    noise = normal(3, 2)
    xt, score = sm.local_step(x, noise, drift, g, 0.0, step)
    torch.testing.assert_close(score, -torch.linalg.solve(cov, (xt - mean).T).T, rtol=1e-5, atol=1e-5)


def test_local_dsm_without_drift_is_denoising():
    x0, noise = normal(2, 5, 1, 2, 2)
    model = lambda x, s, y=None: torch.tanh(x)  # noqa: E731
    for linearised in (True, False):
        got = sm.local_dsm_loss(
            model, x0, 0.5, noise, lambda x, t: 0 * x, 1.0, 0.0, 0.25, weight=2.0, linearised=linearised)
        torch.testing.assert_close(got, sm.denoising_loss(model, x0, 0.5, noise, weight=2.0))
