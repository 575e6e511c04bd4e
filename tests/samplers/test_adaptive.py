"""The adaptive sampler: its attempt and step sizes by the formulas, its law, and the bias of choosing per sample."""

import math

import pytest
import torch

from minidistill.distributions import GaussianMixture, ring
from minidistill.samplers import Report, euler_maruyama, gotta_go_fast, log_linear_sigmas
from minidistill.transport import sliced_wasserstein, wasserstein_1d
from tests.helpers import f64, mixture_1d, mixture_2d, rng, start

RANGE = f64([20.0, 0.01, 0.0])


def attempt(denoiser, x, sigma, after, noise):
    """x' and x'' of algorithm 1, in the clock sigma^2, where the SDE's noise has unit rate."""
    def score(x, sigma):
        return (denoiser(x, sigma) - x) / sigma**2

    spent = sigma**2 - after**2
    low = x + spent * score(x, sigma) + math.sqrt(spent) * noise
    corrected = x + spent * score(low, after) + math.sqrt(spent) * noise
    return low, (low + corrected) / 2


def test_two_steps_by_the_formulas():
    """Both accepted: the second's size is safety * h * E^-r, with E from the first and delta from both x'."""
    high, low, mixture, x = 10.0, 0.1, mixture_2d(), start(6, 10.0, d=2)
    options = {"eps_abs": 30.0, "eps_rel": 1.5, "safety": 0.8, "r": 0.7, "first_step": 0.2}
    report = Report()
    path = gotta_go_fast(mixture, x, f64([high, 3.0, low, 0.0]), rng(1), trajectory=True, report=report, **options)
    again = rng(1)
    noise = [torch.randn(6, 2, generator=again, dtype=torch.float64) for _ in range(2)]

    def level(t):
        return low * (high / low) ** t

    first, wanted = attempt(mixture, x, high, level(0.8), noise[0])
    torch.testing.assert_close(path[1], wanted, rtol=1e-10, atol=1e-10)

    def error(first, second, before):
        delta = (1.5 * torch.maximum(first.abs(), before.abs())).clamp(min=30.0)
        return float(((first - second) / delta).square().mean().sqrt())

    t = 0.8 - 0.8 * 0.2 * error(first, wanted, x) ** -0.7
    assert error(first, wanted, x) < 1
    assert 0 < t < 0.8
    assert report.levels[:3] == pytest.approx([high, level(0.8), level(t)])
    second, wanted = attempt(mixture, path[1], level(0.8), level(t), noise[1])
    assert error(second, wanted, first) < 1
    torch.testing.assert_close(path[2], wanted, rtol=1e-10, atol=1e-10)
    if t > 0:
        step = min(t, 0.8 * (0.8 - t) * error(second, wanted, first) ** -0.7)
        assert report.levels[3] == pytest.approx(level(t - step))


def test_a_rejected_step_leaves_x_and_draws_again():
    mixture, x, report = mixture_2d(), start(50, 10.0, d=2), Report()
    path = gotta_go_fast(mixture, x, f64([10.0, 0.1, 0.0]), rng(1), first_step=1.0, trajectory=True, report=report)
    assert report.rejected >= 1
    assert report.calls == 2 * report.attempts + 1
    assert len(path) == len(report.levels) == report.attempts - report.rejected + 2
    again = rng(1)
    for _ in range(2):
        noise = torch.randn(50, 2, generator=again, dtype=torch.float64)
    torch.testing.assert_close(path[1], attempt(mixture, x, 10.0, report.levels[1], noise)[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("per_sample", [False, True])
def test_run_goes_down_to_the_end(per_sample):
    report = Report()
    out = gotta_go_fast(mixture_2d(), start(9, 20.0, d=2), RANGE, rng(1), per_sample=per_sample, report=report)
    assert out.shape == (9, 2)
    assert (f64(report.levels).diff() < 0).all()
    assert report.levels[0] == 20.0
    assert report.levels[-2:] == [pytest.approx(0.01), 0.0]
    if per_sample:  # all wait for the slowest
        assert report.calls >= 2 * report.attempts + 1


def test_early_stop_and_chunks():
    def run(x=None, **options):
        report = Report()
        x = start(6, 20.0, d=2) if x is None else x
        return gotta_go_fast(mixture_2d(), x, RANGE, rng(1), report=report, **options), report

    (full, calls), (stopped, fewer) = run(), run(early_stop=True)
    assert calls.calls == fewer.calls + 1
    torch.testing.assert_close(full, mixture_2d()(stopped, 0.01), rtol=1e-12, atol=1e-12)
    cut, report = run(batch_size=4)  # each chunk has its own step sizes; the first is as it would be alone
    alone, single = run(start(6, 20.0, d=2)[:4])
    assert torch.equal(cut[:4], alone)
    assert report.levels == single.levels
    assert report.calls == pytest.approx(2 * report.attempts + 1)


def test_smaller_tolerances_cost_more_and_err_less():
    """Coupling does not exist between runs, so the error is that of the variance of a Gaussian, which has been computed
    from 20,000 samples: 1% of standard error."""
    target, x = GaussianMixture(f64([[0.0]]), 0.5), start(20_000, 20.0)
    calls, errors = [], []
    for eps in (2.0, 0.05):
        report = Report()
        y = gotta_go_fast(target, x, RANGE, rng(1), eps_abs=eps, eps_rel=eps, report=report)
        calls.append(report.calls)
        errors.append(abs(float(y.var()) / 0.25 - 1))
    assert calls[0] < calls[1] / 2
    assert errors[1] < 0.04 < 0.1 < errors[0]


def floor(target, n, distance):
    """The distance between two samples of the target itself, a mean over 6 pairs."""
    return sum(distance(target.sample(n, rng(20 + i)), target.sample(n, rng(40 + i))) for i in range(6)) / 6


@pytest.mark.parametrize("target", [mixture_1d(), ring().to(torch.float64)], ids=["line", "ring"])
def test_one_step_size_reaches_the_floor(target):
    """W2 (sliced, in the plane) to fresh samples, a mean over 6 seeds, within 1.5 times the floor; few rejections.
    About 100 calls; Euler-Maruyama comes within 1.5 times the floor with 40 to 60 on the line and 15 on the ring."""

    def distance(x, y):
        return float(wasserstein_1d(x, y)) if x.shape[1] == 1 else \
            float(sliced_wasserstein(x, y, 32, rng(7)))

    n, d = 4000, target.means.shape[1]
    found, report = [], Report()
    for i in range(6):
        y = gotta_go_fast(target, start(n, 20.0, i, d), RANGE, rng(i), report=report)
        found.append(distance(y, target.sample(n, rng(40 + i))))
        assert report.rejected < 0.1 * report.attempts
        assert 60 < report.calls < 140
    assert sum(found) / 6 < 1.5 * floor(target, n, distance)


def test_one_step_size_per_sample_is_biased_in_low_dimension():
    """W2 of the pooled coordinates of N(0.5, 0.8^2 I) to its quantiles: over 8 times the shared step's in 1 dimension,
    where two of five attempts are rejected; falling with the dimension, and no worse than shared in 64."""
    biases, rejected = {}, {}
    for d, n in ((1, 10_000), (4, 2500), (64, 200)):
        target = GaussianMixture(torch.full((1, d), 0.5, dtype=torch.float64), 0.8)
        u = (torch.arange(n * d, dtype=torch.float64) + 0.5) / (n * d)
        quantiles = 0.5 + 0.8 * torch.special.ndtri(u)
        for per_sample in (False, True):
            report = Report()
            y = gotta_go_fast(target, start(n, 20.0, d=d), RANGE, rng(1), per_sample=per_sample, report=report)
            biases[d, per_sample] = float((y.flatten().sort().values - quantiles).square().mean().sqrt())
            rejected[d, per_sample] = report.rejected / report.attempts
    assert biases[1, True] > 8 * biases[1, False]
    assert biases[1, True] > 1.3 * biases[4, True] > 3 * biases[64, True]
    assert biases[64, True] < 1.5 * biases[64, False] + 0.01
    assert rejected[1, True] > 0.3 > rejected[64, True] > rejected[64, False]
    assert max(rejected[d, False] for d in (1, 4, 64)) < 0.1


def test_euler_maruyama_needs_as_many_calls():
    """On the line 20 levels are short of 1.5 times the floor, and 100 are within."""
    target, n = mixture_1d(), 4000

    def mean_distance(levels):
        sigmas = log_linear_sigmas(levels, 0.01, 20.0, dtype=torch.float64)
        return sum(float(wasserstein_1d(euler_maruyama(target, start(n, 20.0, i), sigmas, rng(i)),
                                        target.sample(n, rng(40 + i)))) for i in range(6)) / 6

    lowest = floor(target, n, lambda x, y: float(wasserstein_1d(x, y)))
    assert mean_distance(20) > 1.5 * lowest > mean_distance(100)


X = start(3, 20.0)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"eps_abs": 0.0}, ValueError, "eps_abs=0.0"), ({"eps_rel": -1.0}, ValueError, "eps_rel=-1.0"),
    ({"safety": 0.0}, ValueError, "safety=0.0"), ({"r": math.nan}, ValueError, "r=nan"),
    ({"first_step": 1.5}, ValueError, "first_step=1.5"), ({"first_step": 0.0}, ValueError, "first_step=0.0"),
    ({"per_sample": True, "trajectory": True}, ValueError, "trajectory=True"),
    ({"batch_size": 2, "trajectory": True}, ValueError, "trajectory=True"),
    ({"eps_abs": 1e-20, "eps_rel": 1e-20}, FloatingPointError, "step size fell to 0.*float64"),
])
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        gotta_go_fast(mixture_1d(), X, RANGE, rng(1), **options)


def test_a_denoiser_that_breaks_is_noticed():
    with pytest.raises(FloatingPointError, match="not finite"):
        gotta_go_fast(lambda x, sigma: x / 0, X, RANGE, rng(1))
