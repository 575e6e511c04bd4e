"""Chains on a Gaussian, where they are affine and so known exactly; Langevin's law; the papers' own coordinates."""

import math
from typing import Any

import pytest
import torch

from minidistill.distributions import GaussianMixture
from minidistill.samplers import (
    SOLVERS,
    Report,
    accelerated_ddim,
    accelerated_ddpm,
    ancestral,
    annealed_langevin,
    edm_stochastic,
    euler_maruyama,
    langevin,
    ode,
    predictor_corrector,
    stochastic,
)
from tests.helpers import f64, fitted_slope, levels, mixture_2d, rng, start

MU, STD = 0.5, 0.8
TARGET = GaussianMixture(f64([[MU]]), STD)
CHAINS: list[tuple[str, dict[str, Any]]] = [
    ("euler_maruyama", {}), ("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.6}), ("ancestral", {}),
    ("ancestral", {"variance": "large"}), ("edm_stochastic", {"churn": 40.0}),
    ("edm_stochastic", {"churn": 200.0, "s_min": 0.05, "s_max": 2.0, "s_noise": 1.01}),
    ("accelerated_ddpm", {}), ("annealed_langevin", {"steps_per_level": 3}),
    ("predictor_corrector", {}), ("predictor_corrector", {"snr": 0.3, "corrector_steps": 2}),
]
IDS = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options in CHAINS]


def moves(name, options, s, t, n, moments):
    """A step from s to t as affine maps of y = x - MU, [(factor, variance of the fresh noise)]; D = shrink y.

    `moments()` is E y^2 on arrival at t, which the corrector's step size follows."""
    shrink, spent = STD**2 / (STD**2 + s**2), s**2 - t**2
    euler = 1 - spent / s**2 * (1 - shrink)
    if name == "euler_maruyama":
        return [(euler, spent if t else 0.0)]
    if name == "accelerated_ddpm":
        return [(1, spent / 2), (euler, spent / 2)] if t else [(shrink, 0.0)]
    if name == "ddim":
        fresh = options["eta"] ** 2 * t**2 * (1 - t**2 / s**2)
        return [(shrink + math.sqrt(t**2 - fresh) / s * (1 - shrink), fresh)]
    if name == "ancestral":  # the posterior of x_t given x_s and x0, or for x0 ~ N(0, 1)
        fresh = spent * (1 + t**2) / (1 + s**2) if options else t**2 * spent / s**2
        return [(shrink + t**2 / s**2 * (1 - shrink), fresh if t else 0.0)]
    if name == "edm_stochastic":
        inside = options.get("s_min", 0.0) <= s <= options.get("s_max", math.inf)
        raised = s * (1 + (min(options["churn"] / n, math.sqrt(2) - 1) if inside else 0.0))
        slope, landing = raised / (STD**2 + raised**2), t / (STD**2 + t**2)
        guess = 1 + (t - raised) * slope
        heun = 1 + (t - raised) / 2 * (slope + landing * guess) if t else guess
        return [(1, (raised**2 - s**2) * options.get("s_noise", 1.0) ** 2), (heun, 0.0)]
    width = STD**2 + t**2
    if name == "annealed_langevin":
        size = 2 * (options.get("snr", 0.16) * t) ** 2
        return [(1 - size / width, 2 * size)] * options["steps_per_level"] if t else [(shrink, 0.0)]
    predictor = [(euler, spent if t else 0.0)]
    if not t:
        return predictor
    out, square = predictor, euler**2 * moments() + spent
    for _ in range(options.get("corrector_steps", 1)):
        size = 2 * options.get("snr", 0.16) ** 2 / (square / width**2)
        out = [*out, (1 - size / width, 2 * size)]
        square = (1 - size / width) ** 2 * square + 2 * size
    return out


def chain_moments(name, options, sigmas, variance):
    """Mean and variance after the discrete chain from N(0, variance) at the first level."""
    mean = -MU  # of y
    for s, t in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        # The corrector's step size follows E y^2 at the start of the step, through the predictor (mean included).
        square = variance + mean**2
        for factor, fresh in moves(name, options, s, t, len(sigmas) - 1, lambda square=square: square):
            mean, variance = factor * mean, factor**2 * variance + fresh
    return MU + mean, variance


@pytest.mark.parametrize(("name", "options"), CHAINS, ids=IDS)
def test_stochastic_solvers_reproduce_a_gaussian(name, options):
    """Within 4 standard errors of the discrete chain's exact moments."""
    n, sigmas = 20_000, levels(60, 0.01, 40.0)
    x = SOLVERS[name](TARGET, start(n, 40.0, seed=1), sigmas, rng(2), **options)
    mean, variance = chain_moments(name, options, sigmas, 40.0**2)
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(variance / n)
    assert abs(float(x.var()) - variance) < 4 * variance * math.sqrt(2 / (n - 1))


@pytest.mark.parametrize(("name", "options"), [pair for pair in CHAINS if pair[0] != "predictor_corrector"])
def test_chain_is_exact_by_impulse_response(name, options, monkeypatch):
    """Sample i is given a unit of noise at draw i and none else: the sum of the squared responses is the variance, to
    rounding. (Not for the corrector, whose step size depends on the batch.)"""
    sigmas, draws = levels(12, 0.01, 40.0), []

    def impulse(x, rng):
        draws.append(len(draws))
        return torch.nn.functional.one_hot(torch.tensor(draws[-1] + 1), len(x)).to(x).unsqueeze(1)

    for module in (ode, stochastic):
        monkeypatch.setattr(module, "noise_like", impulse)
    x = torch.zeros(60, 1, dtype=torch.float64)
    x[0] = 40.0  # the response to the start
    x = torch.cat([x, torch.zeros(1, 1, dtype=torch.float64)])  # and nothing at all: the mean
    out = SOLVERS[name](TARGET, x, sigmas, **options).flatten()
    mean, variance = chain_moments(name, options, sigmas, 40.0**2)
    assert 3 < len(draws) < 60
    assert float(out[-1]) == pytest.approx(mean, rel=1e-10)
    assert float((out - out[-1]).square().sum()) == pytest.approx(variance, rel=1e-10)


@pytest.mark.parametrize(("name", "options", "order"), [
    ("euler_maruyama", {}, 1), ("ancestral", {}, 1), ("ancestral", {"variance": "large"}, 1),
    ("accelerated_ddpm", {}, 2), ("edm_stochastic", {"churn": 40.0}, 2),
])
def test_order_of_the_variance(name, options, order):
    """Of the chains that the package is tested against, started at the exact law: how fast its error falls."""
    counts = [400, 800, 1600]

    def error(n):
        sigmas = levels(n, 0.01, 40.0)[:-1]
        return abs(chain_moments(name, options, sigmas, 40.0**2 + STD**2)[1] - STD**2 - 0.01**2)

    assert fitted_slope(counts, [error(n) for n in counts]) == pytest.approx(-order, abs=0.15)


def test_large_variance_is_exact_on_a_standard_normal():
    """Any levels: the chain's law at the last one is N(0, 1 + sigma^2), from 4 levels and within 4 standard errors."""
    n, sigmas = 50_000, f64([30.0, 5.0, 1.0, 0.3, 0.0])
    x = start(n, math.sqrt(1 + 30.0**2), seed=3)
    y = ancestral(GaussianMixture(f64([[0.0]]), 1.0), x, sigmas, rng(4), variance="large",
                  early_stop=True)
    variance = 1 + 0.3**2
    assert abs(float(y.mean())) < 4 * math.sqrt(variance / n)
    assert abs(float(y.var()) - variance) < 4 * variance * math.sqrt(2 / n)


def variance_preserving(x, sigma):
    """X = x / sqrt(1 + sigma^2), and the score there as a function of X."""
    scale = torch.sqrt(1 + sigma**2)
    return x / scale, lambda X: scale * (mixture_2d()(scale * X, sigma) - scale * X) / sigma**2


def test_accelerated_ddim_in_the_papers_coordinates():
    """Li 2024: X_{t-1} = a_t^{-1/2} (X + (1 - a_t)/2 s_t(X) + (1 - a_t)^2 / (4 (1 - a_{t+1})) (s_t(X) - sqrt(a_{t+1})
    s_{t+1}(X^-))), X^- = sqrt(a_{t+1}) (X - (1 - a_{t+1})/2 s_t(X)), a = ratios of alpha-bar = 1 / (1 + sigma^2)."""
    sigmas, x = f64([5.0, 3.0, 2.2, 1.0, 0.0]), start(6, 5.0, d=2)
    path = accelerated_ddim(mixture_2d(), x, sigmas, trajectory=True)
    for i in range(3):
        X, score = variance_preserving(path[i], sigmas[i])
        a = (1 + sigmas[i + 1] ** 2) / (1 + sigmas[i] ** 2)
        wanted = X + (1 - a) / 2 * score(X)
        if i:
            b = (1 + sigmas[i] ** 2) / (1 + sigmas[i - 1] ** 2)
            back, score_before = torch.sqrt(b) * (X - (1 - b) / 2 * score(X)), variance_preserving(X, sigmas[i - 1])[1]
            wanted += (1 - a) ** 2 / (4 * (1 - b)) * (score(X) - torch.sqrt(b) * score_before(back))
        ours, _ = variance_preserving(path[i + 1], sigmas[i + 1])
        torch.testing.assert_close(ours, wanted / torch.sqrt(a), rtol=1e-12, atol=1e-12)


def test_accelerated_ddpm_in_the_papers_coordinates():
    """Li 2024: X^+ = X + sqrt((1 - a)/2) Z and X_{t-1} = a^{-1/2} (X^+ + (1 - a) s_t(X^+) + sqrt((1 - a)/2) Z')."""
    sigmas, x = f64([3.0, 2.2, 0.0]), start(6, 3.0, d=2)
    ours = accelerated_ddpm(mixture_2d(), x, sigmas, rng(5), early_stop=True)
    generator = rng(5)
    z, again = (torch.randn(6, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    X, score = variance_preserving(x, sigmas[0])
    a = (1 + sigmas[1] ** 2) / (1 + sigmas[0] ** 2)
    half = torch.sqrt((1 - a) / 2)
    shaken = X + half * z
    wanted = (shaken + (1 - a) * score(shaken) + half * again) / torch.sqrt(a)
    torch.testing.assert_close(variance_preserving(ours, sigmas[1])[0], wanted, rtol=1e-12, atol=1e-12)


def test_langevin_tends_to_its_biased_gaussian():
    """On N(MU, V) with steps h the stationary variance is V / (1 - h / 2V): within 4 standard errors, at a bias of 14
    of them; and the mean forgets its start by (1 - h/V) a step."""
    n, sigma, h, steps = 40_000, 0.6, 0.2, 60
    width = STD**2 + sigma**2
    x = langevin(TARGET, start(n, 1.0), sigma, steps, h, rng(6))
    stationary, kept = width / (1 - h / (2 * width)), 1 - h / width
    variance = stationary + kept ** (2 * steps) * (1.0 - stationary)
    error = variance * math.sqrt(2 / n)
    assert abs(float(x.var()) - variance) < 4 * error < 14 * error < variance - width
    assert abs(float(x.mean()) - MU + MU * kept**steps) < 4 * math.sqrt(variance / n)


def test_langevin_path_and_report():
    report, seen = Report(), []

    def counting(x, sigma, label):
        seen.append((float(sigma.mean()), len(x)))
        return mixture_2d()(x, sigma, label)

    def run(**options):
        return langevin(counting, start(5, 1.0, d=2), 0.5, 4, 0.01, rng(),
                        label=torch.arange(5) % 3, report=report, **options)

    path = run(trajectory=True)
    assert path.shape == (5, 5, 2)
    assert report == Report(calls=4, levels=[0.5] * 5)
    assert torch.equal(path[-1], run())
    seen.clear()
    run(batch_size=3, progress=True)
    assert seen == [(0.5, 3)] * 4 + [(0.5, 2)] * 4
    assert report.calls == 4


X = torch.zeros(3, 1, dtype=torch.float64)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: ancestral(TARGET, X, levels(3), variance="medium"), "variance='medium'"),
    (lambda: edm_stochastic(TARGET, X, levels(3), churn=-1.0), "churn=-1.0"),
    (lambda: edm_stochastic(TARGET, X, levels(3), s_noise=-1.0), "s_noise=-1.0"),
    (lambda: edm_stochastic(TARGET, X, levels(3), s_min=2.0, s_max=1.0), "s_max=1.0"),
    (lambda: edm_stochastic(TARGET, X, levels(3), s_max=math.nan), "s_max=nan"),
    (lambda: predictor_corrector(TARGET, X, levels(3), snr=0.0), "snr=0.0"),
    (lambda: predictor_corrector(TARGET, X, levels(3), corrector_steps=-1), "corrector_steps=-1"),
    (lambda: annealed_langevin(TARGET, X, levels(3), steps_per_level=0), "steps_per_level=0"),
    (lambda: annealed_langevin(TARGET, X, levels(3), snr=-0.1), "snr=-0.1"),
    (lambda: langevin(TARGET, X, 0.0, 3, 0.1), "sigma=0.0"),
    (lambda: langevin(TARGET, X, 1.0, 0, 0.1), "steps=0"),
    (lambda: langevin(TARGET, X, 1.0, 3, 0.0), "step_size=0.0"),
    (lambda: langevin(TARGET, X * math.nan, 1.0, 3, 0.1), "x holds a NaN"),
    (lambda: euler_maruyama(TARGET, X, f64([1.0, 2.0])), "sigmas="),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
