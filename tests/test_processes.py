"""Forward processes, and every change of variables between them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidistill import processes
from minidistill.processes import PROCESSES, as_denoiser, convert, edm, score_from_denoiser, vp
from tests.helpers import f64, mixture_2d

TIMES = torch.linspace(0.01, 1.0, 25, dtype=torch.float64)
PAIRS = list(itertools.product(processes.TO_X0, repeat=2))
BETA = (0.1, 20.0)

def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_vp_preserves_variance_at_all_times():
    p = vp()
    assert_close(p.alpha(TIMES).square() + p.sigma(TIMES).square(), torch.ones_like(TIMES))


@pytest.mark.parametrize("beta", [BETA, (1.0, 5.0)])
def test_vp_drift_and_diffusion_are_songs(beta):
    """dx = -beta/2 x dt + sqrt(beta) dW (Song 2021, equation 11)."""
    p = vp(*beta)
    rate = beta[0] + (beta[1] - beta[0]) * TIMES
    assert_close(p.drift(TIMES), -rate / 2)
    assert_close(p.diffusion(TIMES), rate.sqrt())


def test_vp_alpha_is_the_exponential_of_the_integrated_rate():
    p, n = vp(), 200_001
    t = torch.linspace(0, 0.7, n, dtype=torch.float64)
    integral = torch.trapezoid(BETA[0] + (BETA[1] - BETA[0]) * t, t)
    assert_close(p.alpha(f64(0.7)), torch.exp(-integral / 2))


def test_edm_is_the_identity():
    p = edm()
    t = TIMES * 10
    assert_close(p.alpha(t), torch.ones_like(t))
    assert_close(p.sigma(t), t)
    assert_close(p.drift(t), torch.zeros_like(t))
    assert_close(p.diffusion(t), (2 * t).sqrt())  # g^2 = d sigma^2 / dt


@pytest.mark.parametrize("name", PROCESSES)
def test_time_inverts_the_edm_noise_level(name):
    p = PROCESSES[name]()
    assert_close(p.time(p.sigma(TIMES) / p.alpha(TIMES)), TIMES)


def test_vp_time_is_accurate_next_to_zero():
    p, t = vp(), f64([1e-8, 1e-6, 1e-4])
    torch.testing.assert_close(p.time(p.sigma(t) / p.alpha(t)), t, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", PROCESSES)
def test_log_snr(name):
    p = PROCESSES[name]()
    snr = (p.alpha(TIMES) / p.sigma(TIMES)).square()
    assert_close(p.log_snr(TIMES), snr.log())
    assert (p.log_snr(TIMES).diff() < 0).all()


@pytest.mark.parametrize("name", PROCESSES)
def test_edm_round_trip(name):
    p = PROCESSES[name]()
    x = torch.randn(25, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    there, sigma = p.to_edm(x, TIMES)
    back, t = p.from_edm(there, sigma)
    assert_close(back, x)
    assert_close(t, TIMES)
    there, sigma = p.to_edm(x, 0.5)
    assert sigma.ndim == 0
    assert_close(p.from_edm(there, sigma)[0], x)


@pytest.mark.parametrize("name", PROCESSES)
def test_noised_samples_are_edms_after_the_change_of_variables(name):
    """x_t / alpha = x0 + (sigma / alpha) e."""
    p, g = PROCESSES[name](), torch.Generator().manual_seed(0)
    x0, e = torch.randn(2, 25, 3, generator=g, dtype=torch.float64)
    x, sigma = p.to_edm(p.add_noise(x0, e, TIMES), TIMES)
    assert_close(x, x0 + sigma[:, None] * e)


def definitions(x0, e, alpha, sigma):
    return {"x0": x0, "eps": e, "v": alpha * e - sigma * x0, "score": -e / sigma}


@pytest.mark.parametrize(("source", "target"), PAIRS)
@settings(max_examples=15, deadline=None)
@given(alpha=st.floats(0.05, 2.0), sigma=st.floats(0.05, 20.0), seed=st.integers(0, 99))
def test_conversions_agree_with_the_definitions_and_round_trip(source, target, alpha, sigma, seed):
    """For any alpha and sigma, variance preserving or not. `score` is that of p(x_t | x0)."""
    x0, e = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = alpha * x0 + sigma * e
    known = definitions(x0, e, alpha, sigma)
    got = convert(known[source], x, alpha, sigma, source, target)
    scale = max(1.0, sigma / alpha, sigma**2 / alpha)  # what the condition number of x0 allows
    torch.testing.assert_close(got, known[target], rtol=1e-9, atol=1e-11 * scale * max(1, 1 / sigma**2))
    back = convert(got, x, alpha, sigma, target, source)
    torch.testing.assert_close(back, known[source], rtol=1e-9, atol=1e-11 * scale * max(1, 1 / sigma**2))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_conversions_round_trip_to_ten_digits_with_a_level_a_sample(source, target):
    p, g = vp(), torch.Generator().manual_seed(0)
    t = torch.linspace(0.1, 0.8, 25, dtype=torch.float64)
    x, prediction = torch.randn(2, 25, 3, generator=g, dtype=torch.float64)
    there = convert(prediction, x, p.alpha(t), p.sigma(t), source, target)
    assert_close(convert(there, x, p.alpha(t), p.sigma(t), target, source), prediction)


def exact_model(process, prediction, mixture):
    """The exact network of any process: the mixture's posterior mean, in the process's own coordinates."""

    def model(x, t, label=None):
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        x0 = mixture(x / alpha, (sigma / alpha).flatten(), label)
        return definitions(x0, (x - alpha * x0) / sigma, alpha, sigma)[prediction]

    return model


@pytest.mark.parametrize("prediction", processes.TO_X0)
@pytest.mark.parametrize("name", PROCESSES)
def test_a_wrapped_model_is_the_mixtures_denoiser(name, prediction):
    p, mixture = PROCESSES[name](), mixture_2d()
    denoiser = as_denoiser(exact_model(p, prediction, mixture), p, prediction)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.logspace(-1, 1, 8, dtype=torch.float64)
    assert_close(denoiser(x, sigma), mixture(x, sigma))
    assert_close(denoiser(x, 0.7), mixture(x, 0.7))
    label = torch.arange(8) % 3
    assert_close(denoiser(x, sigma, label), mixture(x, sigma, label))


def test_score_from_denoiser_is_the_mixtures_score():
    mixture = mixture_2d()
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(score_from_denoiser(mixture(x, 0.4), x, 0.4), mixture.noised(0.4).score(x))
    sigma = torch.linspace(0.2, 2, 8, dtype=torch.float64)
    per_level = torch.cat([mixture.noised(float(s)).score(x[i : i + 1]) for i, s in enumerate(sigma)])
    assert_close(score_from_denoiser(mixture(x, sigma), x, sigma), per_level)


X = torch.zeros(3, 2)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: vp().to_edm(X, 1.5), "t runs from 1.5 to 1.5; wanted times of the vp process, 0 to 1"),
    (lambda: vp().add_noise(X, X, -0.1), "t runs from -0.1"),
    (lambda: vp().add_noise(X, X, math.nan), "t runs from nan"),
    (lambda: vp().add_noise(X, X, torch.rand(2)), "sigma has shape"),
    (lambda: edm(80.0).to_edm(X, 81.0), "edm process, 0 to 80"),
    (lambda: convert(X, X, 1.0, 1.0, "epsilon", "x0"), "source='epsilon' is not known; did you mean 'eps'"),
    (lambda: convert(X, X, 1.0, 1.0, "eps", "vee"), "target='vee'"),
    (lambda: convert(X, X, 1.0, -1.0, "eps", "x0"), "sigma holds -1"),
    (lambda: as_denoiser(lambda x, t: x, vp(), "noise"), "prediction='noise'.*Valid names: eps, score, v, x0"),
    (lambda: score_from_denoiser(X, X, 0.0), "sigma holds 0; wanted noise levels > 0"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
