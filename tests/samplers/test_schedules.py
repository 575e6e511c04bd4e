"""Schedules against their formulas, and what an optimal one gains."""

import math

import pytest
import torch

from minidistill import samplers
from minidistill.distributions import GaussianMixture, ring
from minidistill.samplers import (
    geometric_sigmas,
    heun,
    karras_sigmas,
    log_linear_sigmas,
    optimal_sigmas,
    sample,
    schedules,
)
from tests.helpers import LargestTensor, f64, mixture_2d, start

FORMULAS = {"karras": karras_sigmas, "log_linear": log_linear_sigmas, "geometric": geometric_sigmas}


def optimal(n, low=0.002, high=80.0, **options):
    return optimal_sigmas(mixture_2d(), start(50, high, d=2), n, low, high, **options)


@pytest.mark.parametrize(("n", "rho"), [(2, 7.0), (10, 7.0), (10, 1.0), (33, 3.0)])
def test_karras_formula(n, rho):
    """Equation 5 of Karras 2022, and 0 at the end."""
    wanted = [(80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(n)]
    ours = karras_sigmas(n, rho=rho, dtype=torch.float64)
    torch.testing.assert_close(ours, f64([*wanted, 0.0]), rtol=1e-12, atol=1e-12)


def test_log_linear_has_one_ratio():
    levels = log_linear_sigmas(9, 0.01, 10.0, dtype=torch.float64)[:-1]
    torch.testing.assert_close(levels[1:] / levels[:-1], torch.full((8,), 1e-3 ** (1 / 8), dtype=torch.float64))
    limit = karras_sigmas(9, 0.01, 10.0, rho=1e5, dtype=torch.float64)[:-1]
    torch.testing.assert_close(levels, limit, rtol=1e-3, atol=0)


def test_geometric_steps_are_proportional_to_min_1_t():
    """In the time t of the OU process, 1 + sigma^2 = e^t: even steps above 1, one ratio below, and the same rate."""
    low, high = 0.003, 60.0
    t = geometric_sigmas(4000, low, high, dtype=torch.float64)[:-1].square().log1p()
    assert t[-1] == pytest.approx(math.log1p(low**2), rel=1e-9)
    rate = -t.diff() / ((t[1:] + t[:-1]) / 2).clamp(max=1)
    torch.testing.assert_close(rate, rate[:1].expand(3999), rtol=1e-3, atol=0)
    assert float(rate.mean()) * 3999 == pytest.approx(float(t[0] - 1 - t[-1].log()), rel=1e-3)


@pytest.mark.parametrize("make", [*FORMULAS.values(), optimal])
def test_levels_descend_from_the_largest_to_the_smallest_and_0(make):
    for n in (2, 5, 40):
        levels = make(n, 0.01, 30.0, dtype=torch.float64)
        assert levels.shape == (n + 1,)
        assert levels.dtype == torch.float64
        assert (levels.diff() < 0).all()
        assert levels[[0, -2, -1]].tolist() == pytest.approx([30.0, 0.01, 0.0], rel=1e-12)
    assert make(1, 0.01, 30.0).tolist() == [pytest.approx(30.0), 0.0]
    assert make(3, 0.01, 30.0).dtype == torch.get_default_dtype()
    assert make(3, 0.01, 30.0, dtype=torch.float16).dtype == torch.float16


def test_optimal_levels_of_a_known_path():
    """For D = x - sigma dx/dsigma with x = sigma^3, where it holds for all samples alike, d2x = 6 sigma, so that the
    clock is sigma^(3/2); for order 2, d3x = 6, it is sigma: even steps."""
    def denoiser(x, sigma):
        return x - 3 * sigma[:, None] ** 3

    x = torch.full((4, 2), 8.0, dtype=torch.float64)  # 2^3
    for order, power in ((1, 1.5), (2, 1.0)):
        levels = optimal_sigmas(denoiser, x, 9, 0.2, 2.0, order=order, fine=600, dtype=torch.float64)[:-1]
        even = torch.linspace(2.0**power, 0.2**power, 9, dtype=torch.float64) ** (1 / power)
        torch.testing.assert_close(levels, even, rtol=3e-3, atol=0)


@pytest.mark.parametrize("n", [8, 20])
@pytest.mark.parametrize(("solver", "order", "gain"), [("euler", 1, 1.7), ("heun", 2, 2.0)])
@pytest.mark.parametrize("target", [ring().to(torch.float64), mixture_2d()])
def test_optimal_levels_beat_karras(target, solver, order, gain, n):
    """In the root mean square distance to the exact flow's end, for other samples than it was fitted on."""
    x, found = start(300, seed=1, d=2), optimal_sigmas(target, start(200, d=2), n, order=order, dtype=torch.float64)
    exact = heun(target, x, karras_sigmas(300, dtype=torch.float64), early_stop=True)
    ours, karras = (
        float((sample(target, x, sigmas, solver, early_stop=True) - exact).square().mean().sqrt())
        for sigmas in (found, karras_sigmas(n, dtype=torch.float64))
    )
    assert ours < karras / gain


def test_geometric_times_beat_uniform_ones():
    """DDPM's chain on a narrow Gaussian, its variance at the early stop computed exactly: even steps in t leave an
    error in the last stretch that geometric ones do not (Chen, Lee and Lu 2023)."""
    std, low, high, n = 0.05, 0.01, 20.0, 60

    def error(levels):
        variance = std**2 + high**2
        for s, t in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
            shrink = std**2 / (std**2 + s**2)
            variance = (shrink + t**2 / s**2 * (1 - shrink)) ** 2 * variance + t**2 * (1 - t**2 / s**2)
        return abs(variance / (std**2 + low**2) - 1)

    even = torch.linspace(math.log1p(high**2), math.log1p(low**2), n, dtype=torch.float64).expm1().sqrt()
    assert error(geometric_sigmas(n, low, high, dtype=torch.float64)[:-1]) < 0.3 * error(even)


def test_optimal_levels_use_the_label():
    mixture, label = GaussianMixture(f64([[-5.0, 0.0], [5.0, 0.0]]), f64([0.1, 2.0])), torch.zeros(30).long()
    narrow, wide, both = (
        optimal_sigmas(mixture, start(30, d=2), 12, label=given) for given in (label, label + 1, None)
    )
    assert not torch.allclose(narrow, wide, rtol=0.01)
    assert not torch.allclose(narrow, both, rtol=0.01)


X = start(4, d=2)


@pytest.mark.parametrize(("call", "error", "message"), [
    *((lambda make=make: make(0), ValueError, "n=0") for make in FORMULAS.values()),
    *((lambda make=make: make(5, sigma_min=0.0), ValueError, "sigma_min=0.0") for make in FORMULAS.values()),
    *((lambda make=make: make(5, 2.0, 1.0), ValueError, "sigma_min=2.0 is above sigma_max=1.0")
      for make in FORMULAS.values()),
    (lambda: karras_sigmas(5, rho=-1.0), ValueError, "rho=-1.0"),
    (lambda: optimal_sigmas(mixture_2d(), X, 0), ValueError, "n=0"),
    (lambda: optimal_sigmas(mixture_2d(), X, 5, order=3), ValueError, "order='3'"),
    (lambda: optimal_sigmas(mixture_2d(), X, 5, fine=4), ValueError, "fine=4"),
    (lambda: optimal_sigmas(mixture_2d(), X[:0], 5), ValueError, "x has 0 samples"),
    (lambda: optimal_sigmas(mixture_2d(), X, 5, batch_size=0), ValueError, "batch_size=0"),
    (lambda: optimal_sigmas(mixture_2d(), X, 5, label=torch.zeros(5).long()), ValueError, r"label is .* shape \(5,\)"),
])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_schedules_are_importable_from_samplers():
    assert {make.__name__ for make in FORMULAS.values()} <= set(dir(samplers))


def test_optimal_levels_of_float32_are_those_of_float64():
    """Third differences of a path in float32 would be rounding."""
    target = GaussianMixture(f64([[-1.0], [1.5]]), 0.4)
    x = start(64)
    wide, narrow = (optimal_sigmas(t, u, 10, order=2, fine=512) for t, u in (
        (target, x), (target.to(torch.float32), x.float())))
    torch.testing.assert_close(narrow, wide, rtol=0.2, atol=0)


def test_optimal_levels_hold_few_paths_at_once(monkeypatch):
    """Chunks change only the order of the sum; no tensor is larger than a chunk's paths, and the label goes along."""
    x, label = start(40, d=2), torch.arange(40) % 3
    whole = optimal_sigmas(mixture_2d(), x, 9, fine=64, label=label, dtype=torch.float64)
    for options, limit in (({"batch_size": 7}, None), ({}, 64 * 2 * 5)):
        monkeypatch.setattr(schedules, "PATH_ENTRIES", limit or schedules.PATH_ENTRIES)
        with LargestTensor() as mode:
            got = optimal_sigmas(mixture_2d(), x, 9, fine=64, label=label, dtype=torch.float64, **options)
        torch.testing.assert_close(got, whole, rtol=1e-9, atol=0)
        assert mode.elements <= 64 * 2 * 7


def test_optimal_levels_of_straight_paths_are_finite():
    out = optimal_sigmas(lambda x, sigma: torch.zeros_like(x), torch.zeros(3, 1), 5)
    torch.testing.assert_close(out, log_linear_sigmas(5))
