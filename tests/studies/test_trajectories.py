"""What is measured of students that know a way down, on a Gaussian whose flow map is known."""

import types

import pytest
import torch

from minidistill.distillation import Distilled
from minidistill.distributions import GaussianMixture
from minidistill.networks.jumps import TOP
from minidistill.studies import trajectories
from minidistill.studies.trajectories import CALLS, GAMMAS, LEVELS, exact_paths, jump_errors, quality, score_errors

STD = 1.7
TARGET = GaussianMixture([[0.0, 0.0]], STD)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(trajectories, "STEPS", 800)
    monkeypatch.setattr(trajectories, "PATHS", 400)
    exact_paths.cache_clear()


def radius(sigma):
    return (STD**2 + sigma**2) ** 0.5


class Student(torch.nn.Module):
    """Jumps along N(0, STD^2)'s paths and `factor` times as far from the origin, with an aim as much too large."""

    n_classes, shape, levels, sigma_init = 0, (2,), (), TOP * STD

    def __init__(self, route="jump", factor=1.0):
        super().__init__()
        self.route, self.factor = route, factor
        self.denoiser = types.SimpleNamespace(sigma_data=STD)

    def forward(self, x, label=None, sigma=None, to=0.0, aim=False):
        if aim:
            return self.factor * x * STD**2 / radius(sigma) ** 2
        return self.factor * x * radius(to or 0.0) / radius(sigma)


def made(**options):
    student = Student(**options)
    return Distilled(student, student, [], TARGET, None, None)


@pytest.mark.parametrize("top", [TOP, 160.0])
def test_exact_paths_are_the_flow_map(top):
    z, points = exact_paths(TARGET, top)
    assert points.shape == (len(LEVELS), 400, 2)
    start = top * STD
    for level, point in zip(LEVELS, points, strict=True):
        torch.testing.assert_close(point, start * z * radius(level * STD) / radius(start), rtol=2e-4, atol=0)


def test_the_error_of_a_jump_is_its_mean_distance():
    """None of an exact student; of one that lands a tenth too far out, a tenth of the mean length there."""
    exact, far = jump_errors(made(), TARGET), jump_errors(made(factor=1.1), TARGET)
    points = exact_paths(TARGET)[1]
    for i in range(len(LEVELS) - 1):
        for j in range(len(LEVELS)):
            assert (exact[i][j] is None) == (j <= i)
            if j > i:
                scale = radius(LEVELS[j] * STD) / STD
                assert exact[i][j] < 5e-4 * scale
                assert far[i][j] == pytest.approx(0.1 * float(points[j].norm(dim=1).mean()) / STD, abs=1e-3 * scale)


def test_consistency_functions_are_asked_for_ends_alone():
    rows = jump_errors(made(route="end"), TARGET)
    assert all(value is None for row in rows for value in row[:-1])
    assert max(row[-1] for row in rows) < 5e-4
    assert score_errors(made(route="end"), TARGET) == [None] * (len(LEVELS) - 1)


def test_the_score_is_compared_relative_to_the_exact_ones_square():
    """An aim D a tenth too large: 0.01 |D|^2 / |D - x|^2, which is 0.01 (STD / sigma)^4 for this Gaussian."""
    assert max(score_errors(made(), TARGET)) < 1e-6
    for level, error in zip(LEVELS[:-1], score_errors(made(factor=1.1), TARGET), strict=True):
        assert error == pytest.approx(0.01 * level**-4, rel=1e-2, abs=1e-6)


def test_all_that_is_measured():
    """Exact jumps stay on the path whatever the calls; with all noise new the samples are as good, on other paths."""
    found = quality(made(), TARGET, seed=0, n=2000)
    assert len(found["calls_over_floor"]) == len(CALLS)
    assert len(found["gammas_over_floor"]) == len(GAMMAS)
    assert max(found["calls_over_floor"] + found["gammas_over_floor"]) < 2
    assert max(found["ends_error"]) < 1e-3
    ends = quality(made(route="end"), TARGET, seed=0, n=2000)
    assert ends["gammas_over_floor"] is None
    assert ends["ends_error"][1:] == [None] * (len(CALLS) - 1)
    assert max(ends["calls_over_floor"]) < 2
