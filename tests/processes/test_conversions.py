"""Predictions turned into one another, models of every process as denoisers and back, and what a model then draws."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidistill import processes, samplers
from minidistill.processes import (
    PROCESSES,
    as_denoiser,
    as_model,
    convert,
    cosine,
    ddpm,
    deblend,
    flow,
    iadb,
    score_from_denoiser,
    vp,
)
from tests.helpers import MANY, assert_close, f64, mixture_1d, mixture_2d, normal, rng, times

PAIRS = list(itertools.product(processes.TO_X0, repeat=2))
ALL_PAIRS = list(itertools.product(processes.TO_PAIR, repeat=2))


def definitions(x0, e, alpha, sigma, rates=None):
    out = {"x0": x0, "eps": e, "v": alpha * e - sigma * x0, "score": -e / sigma}
    return out if rates is None else {**out, "velocity": rates[0] * x0 + rates[1] * e}


def column(values):
    return [value[:, None] for value in values]


@pytest.mark.parametrize(("source", "target"), ALL_PAIRS)
@pytest.mark.parametrize("name", PROCESSES)
def test_every_process_converts_every_prediction_and_back_to_ten_digits(name, source, target):
    """Next to both ends too, relative to the prediction's size at that time."""
    p, (x0, e) = PROCESSES[name](), normal(2, 29, 3)
    t = times(p)
    known = definitions(x0, e, *column([p.alpha(t), p.sigma(t)]), column(p.rates(t)))
    x = p.add_noise(x0, e, t)
    there = p.convert(known[source], x, t, source, target)
    back = p.convert(there, x, t, target, source)
    for got, wanted in ((there, known[target]), (back, known[source])):
        assert ((got - wanted).abs() < 1e-10 * wanted.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("name", ["cosine", "flow", "interpolant"])
def test_where_alpha_is_zero_what_can_be_known_is_exact(name):
    """At t = 1, x_t = e: x0 comes from v and the velocity, e from anything."""
    p, (x0, e) = PROCESSES[name](), normal(2, 4, 3)
    known = definitions(x0, e, p.alpha(f64(1.0)), p.sigma(f64(1.0)), p.rates(f64(1.0)))
    for source, target in itertools.product(("x0", "v", "velocity"), known):
        assert_close(p.convert(known[source], e, 1.0, source, target), known[target])
    assert_close(p.convert(known["score"], e, 1.0, "score", "eps"), e)


@pytest.mark.parametrize("name", MANY)
def test_losses_in_every_clothing_are_the_x0_loss_times_the_known_weight(name):
    """Per sample: w(t) |prediction - target|^2 = |x0_hat - x0|^2, the target from its definition."""
    p, (x0, e, wrong) = MANY[name](), normal(3, 25, 3)
    t = times(p)[2:-2]
    alpha, sigma, rates = p.alpha(t), p.sigma(t), p.rates(t)
    x = p.add_noise(x0, e, t)
    targets = definitions(x0, e, *column([alpha, sigma]), column(rates))
    paper = {"x0": torch.ones_like(t), "eps": (sigma / alpha) ** 2, "v": (sigma / (alpha**2 + sigma**2)) ** 2,
             "score": (sigma**2 / alpha) ** 2, "velocity": (sigma / (alpha * rates[1] - sigma * rates[0])) ** 2}
    for prediction, target in targets.items():
        weight = p.loss_weight(t, prediction)
        torch.testing.assert_close(weight, paper[prediction], rtol=1e-10, atol=0)
        loss = (p.convert(x0 + wrong, x, t, "x0", prediction) - target).square().sum(1)
        torch.testing.assert_close(weight * loss, wrong.square().sum(1), rtol=1e-8, atol=0)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@settings(max_examples=15, deadline=None)
@given(alpha=st.floats(0.05, 2.0), sigma=st.floats(0.05, 20.0), seed=st.integers(0, 99))
def test_conversions_agree_with_the_definitions_and_round_trip(source, target, alpha, sigma, seed):
    """For any alpha and sigma, variance preserving or not. `score` is that of p(x_t | x0)."""
    x0, e = normal(2, 4, 3, seed=seed)
    x = alpha * x0 + sigma * e
    known = definitions(x0, e, alpha, sigma)
    got = convert(known[source], x, alpha, sigma, source, target)
    scale = max(1.0, sigma / alpha, sigma**2 / alpha)  # what the condition number of x0 allows
    torch.testing.assert_close(got, known[target], rtol=1e-9, atol=1e-11 * scale * max(1, 1 / sigma**2))
    back = convert(got, x, alpha, sigma, target, source)
    torch.testing.assert_close(back, known[source], rtol=1e-9, atol=1e-11 * scale * max(1, 1 / sigma**2))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_conversions_round_trip_to_ten_digits_with_a_level_a_sample(source, target):
    p = vp()
    t = torch.linspace(0.1, 0.8, 25, dtype=torch.float64)
    x, prediction = normal(2, 25, 3)
    there = convert(prediction, x, p.alpha(t), p.sigma(t), source, target)
    assert_close(convert(there, x, p.alpha(t), p.sigma(t), target, source), prediction)


def test_rates_may_be_floats_or_one_a_sample():
    x0, x = normal(2, 4, 3)
    u = convert(x0, x, 0.5, 0.5, "x0", "velocity", (-1.0, 1.0))
    assert_close(u, (x - 0.5 * x0) / 0.5 - x0)
    ones = torch.ones(4, dtype=torch.float64)
    assert_close(convert(x0, x, 0.5, 0.5, "x0", "velocity", (-ones, ones)), u)


def test_score_from_denoiser_is_the_mixtures_score():
    mixture = mixture_2d()
    x = normal(8, 2)
    assert_close(score_from_denoiser(mixture(x, 0.4), x, 0.4), mixture.noised(0.4).score(x))
    sigma = torch.linspace(0.2, 2, 8, dtype=torch.float64)
    per_level = torch.cat([mixture.noised(float(s)).score(x[i : i + 1]) for i, s in enumerate(sigma)])
    assert_close(score_from_denoiser(mixture(x, sigma), x, sigma), per_level)


def exact_model(process, prediction, mixture):
    """The exact network of any process: the mixture's posterior mean, in the process's own coordinates."""

    def model(x, t, label=None):
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        x0 = mixture(x / alpha, (sigma / alpha).flatten(), label)
        return definitions(x0, (x - alpha * x0) / sigma, alpha, sigma, column(process.rates(t)))[prediction]

    return model


@pytest.mark.parametrize("prediction", processes.TO_PAIR)
@pytest.mark.parametrize("name", [name for name in MANY if name not in ("ve_other", "vp_other", "sub_vp_other")])
def test_a_wrapped_model_is_the_mixtures_denoiser(name, prediction):
    p, mixture = MANY[name](), mixture_2d()
    denoiser = as_denoiser(exact_model(p, prediction, mixture), p, prediction)
    x = normal(8, 2)
    sigma = torch.logspace(-1, 1, 8, dtype=torch.float64)
    assert_close(denoiser(x, sigma), mixture(x, sigma))
    assert_close(denoiser(x, 0.7), mixture(x, 0.7))
    assert_close(denoiser(x, sigma[:, None]), mixture(x, sigma))
    label = torch.arange(8) % 3
    assert_close(denoiser(x, sigma, label), mixture(x, sigma, label))


@pytest.mark.parametrize("prediction", processes.TO_PAIR)
@pytest.mark.parametrize("name", PROCESSES)
def test_a_denoiser_in_any_clothing_is_the_exact_model(name, prediction):
    p, mixture, x = PROCESSES[name](), mixture_2d(), normal(25, 2)
    t, label = times(p)[2:-2], torch.arange(25) % 3
    ours, exact = as_model(mixture, p, prediction), exact_model(p, prediction, mixture)
    for a, b in ((ours(x, t), exact(x, t)), (ours(x, t, label), exact(x, t, label))):
        assert ((a - b).abs() < 1e-10 * b.abs().amax(1, keepdim=True)).all()


def test_at_the_end_of_flow_the_model_knows_only_the_mean():
    mixture, x = mixture_2d(), normal(6, 2)
    assert_close(as_model(mixture, flow(), "velocity")(x, 1.0), x - mixture.mean)
    assert_close(as_model(mixture, cosine(), "v")(x, 1.0), -mixture.mean.expand(6, 2))


def test_wrapping_works_under_vmap_over_samples_and_in_float32():
    mixture, x = mixture_2d(), normal(5, 2)
    velocity = as_model(mixture, vp(), "velocity")
    assert_close(torch.vmap(lambda row: velocity(row[None], 0.3)[0])(x), velocity(x, 0.3))
    single = as_denoiser(as_model(mixture.to(torch.float32), flow(), "velocity"), flow(), "velocity")(x.float(), 0.7)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, mixture(x, 0.7).float(), rtol=1e-4, atol=1e-4)


def cdf(mixture, x):
    """Of a 1-D mixture, (n,)."""
    normal = torch.distributions.Normal(mixture.means.flatten(), mixture.covs.flatten().sqrt())
    return normal.cdf(x[:, None]) @ mixture.weights


#: How far the law at the end is from the data's for want of time: sup |CDF - CDF|, about 0.4 |mean| / level(t_max).
SHORTFALL = {"edm": 2e-4, "ve": 3e-3, "vp": 1e-3, "sub_vp": 1e-3, "ddpm": 1e-3}


@pytest.mark.parametrize("name", PROCESSES)
def test_the_velocity_carries_the_prior_to_the_data(name):
    """In 1-D the probability flow keeps quantiles: points at the prior's end at the data's (Runge-Kutta 4)."""
    p, mixture = PROCESSES[name](), mixture_1d()
    share = torch.linspace(0.01, 0.99, 41, dtype=torch.float64)
    x = p.prior()[1] * math.sqrt(2) * torch.erfinv(2 * share - 1)[:, None]
    expected = cdf(p.marginal(mixture, p.t_max), x[:, 0])  # of p_T, which is not quite the prior
    low, high = max(float(p.level(f64(p.t_min))), 2e-3), min(float(p.level(f64(p.t_max))), 1e4)
    t = p.time(torch.logspace(math.log10(high), math.log10(low), 81, dtype=torch.float64)).clamp(p.t_min, p.t_max)
    t[0] = p.t_max
    velocity = as_model(mixture, p, "velocity")
    for now, after in itertools.pairwise(t.tolist()):
        h = after - now
        a = velocity(x, now)
        b = velocity(x + h / 2 * a, now + h / 2)
        c = velocity(x + h / 2 * b, now + h / 2)
        x = x + h / 6 * (a + 2 * b + 2 * c + velocity(x + h * c, after))
    reached = cdf(p.marginal(mixture, float(t[-1])), x[:, 0])
    assert (reached - expected).abs().max() < (5e-6 if name != "ddpm" else 1e-4)  # DDPM's velocity jumps at whole t
    assert (reached - share).abs().max() < SHORTFALL.get(name, 1e-6)


@pytest.mark.parametrize("start", [0.0, 0.2])
def test_alpha_deblending_is_euler_on_flow_and_in_edm_coordinates(start):
    mixture, x = mixture_2d(), normal(16, 2)
    blends = torch.linspace(start, 1, 33, dtype=torch.float64)
    velocity = as_model(mixture, flow(), "velocity")
    y = x
    for now, after in itertools.pairwise((1 - blends).tolist()):
        y = y + (after - now) * velocity(y, now)
    ours = deblend(lambda x, a: -velocity(x, 1 - a), x, blends)
    assert_close(ours, y, 1e-12)
    if start:  # at a = 0 EDM coordinates are infinite
        denoiser = as_denoiser(lambda x, t: velocity(x, t), iadb(), "velocity")
        assert_close(ours, samplers.euler(denoiser, x / start, (1 - blends) / blends), 1e-12)


def test_deblending_reaches_the_data():
    """128 steps from noise: the mean log density is that of the data to 0.1 nats."""
    mixture = mixture_2d()
    velocity = as_model(mixture, iadb(), "velocity")
    x = deblend(lambda x, a: -velocity(x, 1 - a), normal(2000, 2), torch.linspace(0, 1, 129))
    exact = mixture.sample(2000, rng(1))
    assert abs(mixture.log_prob(x).mean() - mixture.log_prob(exact).mean()) < 0.1


X = torch.zeros(3, 2)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: as_denoiser(lambda x, t: x, ddpm())(X, 0.001), "levels of the ddpm process, 0.01.* to 157"),
    (lambda: vp().convert(X, X, 2.0, "eps", "x0"), "t runs from 2"),
    (lambda: vp().convert(X, X, 0.5, "noise", "x0"), "source='noise'"),
    (lambda: vp().loss_weight(X, "noise"), "prediction='noise'"),
    (lambda: convert(X, X, 1.0, 1.0, "velocity", "x0"), "rates=None: wanted"),
    (lambda: as_model(lambda x, s: x, vp(), "noise"), "prediction='noise'"),
    (lambda: deblend(lambda x, a: x, X, f64([0.5, 0.5])), "blends="),
    (lambda: deblend(lambda x, a: x, X, f64([0.5, 1.5])), "blends="),
    (lambda: deblend(lambda x, a: x, X / 0, f64([0.0, 1.0])), "x holds a NaN"),
    (lambda: convert(X, X, 1.0, 1.0, "epsilon", "x0"), "source='epsilon' is not known; did you mean 'eps'"),
    (lambda: convert(X, X, 1.0, 1.0, "eps", "vee"), "target='vee'"),
    (lambda: convert(X, X, 1.0, -1.0, "eps", "x0"), "sigma holds -1"),
    (lambda: as_denoiser(lambda x, t: x, vp(), "noise"), "prediction='noise'.*names: eps, score, v, velocity, x0"),
    (lambda: score_from_denoiser(X, X, 0.0), "sigma holds 0; wanted noise levels > 0"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
