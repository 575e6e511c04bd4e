"""The functions that README and the notebooks call, with arguments of every odd kind in place of good ones: an error
that is documented, or a result; and from finite, moderate arguments no NaN and no infinity. The examples are the same
in every run."""

import dataclasses
import math
import warnings
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidistill import divergences, metrics, plotting, processes, samplers, score_matching, teachers, transport
from minidistill.distributions import GaussianMixture, checkerboard, grid, ring, two_moons
from minidistill.divergences.estimators import estimate
from minidistill.metrics import evaluation
from minidistill.networks import MLP, Denoiser, Generator, UNet, draw
from minidistill.score_matching import fields
from tests.helpers import rng

DOCUMENTED = (ValueError, TypeError, FloatingPointError)


def points(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


X = points(6, 2)
HUGE, TINY = 1e30, 1e-30
NUMBERS = [-1, 0, 1, 3, 0.5, -0.5, HUGE, TINY, math.nan, math.inf, -math.inf, True, np.int64(2), np.float32(0.5),
           torch.tensor(2), torch.tensor(0.5), np.array(3), "3", None, [1.0], (2,), 2.5j, torch.ones(2)]
TENSORS = [X, X.double(), X.half(), X.bfloat16(), X.long(), X > 0, X.to(torch.complex64), X[:0], X[:1], X[0], X.T,
           X[0, 0], points(6, 3), points(6, 2, 2), points(6, 1, 4, 4), X * 1e6, X * HUGE, X * TINY, 0 * X, X * math.nan,
           torch.where(X > 1, math.inf, X), X.numpy(), X.tolist(), "x", None, 3, [[1.0], [1.0, 2.0]], {}]
LABELS = [torch.zeros(6).long(), torch.zeros(6), torch.full((6,), -1), torch.full((6,), 9),
          torch.zeros(6, dtype=torch.uint8), torch.ones(6, dtype=torch.bool), torch.zeros(5).long(),
          torch.zeros(6, 1).long(), 0, [0] * 6, None, "a"]
LEVELS = [samplers.karras_sigmas(3), torch.tensor([1.0]), torch.tensor([1.0, 2.0, 0.0]),
          torch.tensor([1.0, math.nan, 0.0]), torch.tensor([1.0, 1e-25, 0.0]), torch.tensor([1e25, 1.0, 0.0]),
          [2.0, 1.0, 0.0], np.array([2.0, 0.0]), None,
          torch.tensor([2, 1, 0]), torch.tensor([0.5]), torch.zeros(0), "a", torch.ones(2, 2)]
GENERATORS = [torch.Generator().manual_seed(0), None, 0, "a", np.random.default_rng(0), X]
SHAPES = [(2,), (1, 4, 4), (np.int64(2),), (0,), (), (-1,), (2.0,), 2, None, "ab", [2]]
POOLS = {"number": NUMBERS, "tensor": TENSORS, "label": LABELS, "levels": LEVELS, "generator": GENERATORS,
         "shape": SHAPES}

TARGET, NET = ring(3), Denoiser(MLP((2,), hidden=8, depth=1), 1.0)
CLASSY = Denoiser(MLP((2,), hidden=8, n_classes=2), 1.0)
FLAT = MLP((2,), hidden=8, depth=1)
QUIET: Any = {"progress": False}
SIGMAS, LABEL = samplers.karras_sigmas(3), torch.tensor([0, 1, 0, 1, 0, 1])
#: name: (function of keywords, {keyword: (the pool of odd values, a good one)})
N, T, L, S, G = "number", "tensor", "label", "levels", "generator"
CALLS = {
    "GaussianMixture": (lambda m, s, w: GaussianMixture(m, s, w).sample(3), {"m": (T, X), "s": (N, 0.5), "w": (N,
        None)}),
    "GaussianMixture.log_prob": (lambda x: TARGET.log_prob(x), {"x": (T, X)}),
    "GaussianMixture.score": (lambda x, s: TARGET.noised(s).score(x), {"x": (T, X), "s": (N, 1.0)}),
    "GaussianMixture.denoise": (lambda x, s, y: TARGET(x, s, y), {"x": (T, X), "s": (N, 1.0), "y": (L, None)}),
    "GaussianMixture.sample": (lambda n, g: TARGET.sample(n, g), {"n": (N, 3), "g": (G, None)}),
    "ring": (lambda k, r, s: ring(k, r, s).means, {"k": (N, 3), "r": (N, 1.0), "s": (N, 0.1)}),
    "grid": (lambda n, d, s: grid(n, d, s).covs, {"n": (N, 2), "d": (N, 1.0), "s": (N, 0.1)}),
    "two_moons": (lambda n, g, s: two_moons(n, g, s), {"n": (N, 3), "g": (G, None), "s": (N, 0.1)}),
    "checkerboard": (lambda n, g: checkerboard(n, g), {"n": (N, 3), "g": (G, None)}),
    "karras_sigmas": (lambda n, a, b, r: samplers.karras_sigmas(n, a, b, r),
                      {"n": (N, 3), "a": (N, 0.1), "b": (N, 2.0), "r": (N, 7.0)}),
    "heun": (lambda x, s, y: samplers.sample(TARGET, x, s, label=y), {"x": (T, X), "s": (S, SIGMAS), "y": (L, None)}),
    "ancestral": (lambda x, s, g: samplers.sample(TARGET, x, s, "ancestral", generator=g),
                  {"x": (T, X), "s": (S, SIGMAS), "g": (G, None)}),
    "conjugate": (lambda x, n: samplers.sample(TARGET, x, SIGMAS, "conjugate", lam=n), {"x": (T, X), "n": (N, 0.0)}),
    "edm_stochastic": (lambda c, n, b: samplers.sample(TARGET, X, SIGMAS, "edm_stochastic", churn=c, s_noise=n,
        s_max=b),
                       {"c": (N, 30.0), "n": (N, 1.0), "b": (N, 9.0)}),
    "langevin": (lambda x, s, n, h, g: samplers.langevin(TARGET, x, s, n, h, g),
                 {"x": (T, X), "s": (N, 1.0), "n": (N, 2), "h": (N, 0.1), "g": (G, None)}),
    "log_likelihood": (lambda x, s: samplers.log_likelihood(TARGET, x, s), {"x": (T, X), "s": (S, torch.tensor([0.1,
        9.0]))}),
    "optimal_sigmas": (lambda x, n, a: samplers.optimal_sigmas(TARGET, x, n, a, 9.0, fine=8),
                       {"x": (T, X), "n": (N, 3), "a": (N, 0.1)}),
    "EmpiricalTeacher": (lambda d, x, s, h: teachers.EmpiricalTeacher(d, h)(x, s),
                         {"d": (T, X), "x": (T, X), "s": (N, 1.0), "h": (N, 0.0)}),
    "GaussianTeacher": (lambda d, x, s: teachers.GaussianTeacher(d)(x, s), {"d": (T, X), "x": (T, X), "s": (N, 1.0)}),
    "calibrated": (lambda d, s, y, g: teachers.calibrated(TARGET, d, s, y, generator=g).eta,
                   {"d": (T, X), "s": (S, SIGMAS[:2]), "y": (L, None), "g": (G, None)}),
    "classifier_free": (lambda c, x, s, y: teachers.classifier_free(TARGET, c)(x, s, y),
                        {"c": (N, 2.0), "x": (T, X), "s": (N, 1.0), "y": (L, LABEL)}),
    "aligned_guidance_loss": (lambda x, s, e, c: teachers.aligned_guidance_loss(TARGET, x, s, e, LABEL, c, TARGET),
                              {"x": (T, X), "s": (N, 1.0), "e": (T, X), "c": (N, 2.0)}),
    "train_denoiser": (lambda d, y, n, b, r: teachers.train_denoiser(
        d, labels=y, steps=n, batch_size=b, learning_rate=r, **QUIET)(X, 1.0, y),
        {"d": (T, X), "y": (L, None), "n": (N, 1), "b": (N, 4), "r": (N, 1e-3)}),
    "distil_energy": (lambda d, n, b: teachers.distil_energy(TARGET, d, steps=n, batch_size=b, **QUIET).energy(X, 1.0),
                      {"d": (T, X), "n": (N, 1), "b": (N, 4)}),
    "mmd": (lambda x, y, h: transport.mmd(x, y, bandwidth=h), {"x": (T, X), "y": (T, X), "h": (N, None)}),
    "energy_distance": (lambda x, y, a: transport.energy_distance(x, y, a), {"x": (T, X), "y": (T, X), "a": (N, 1.0)}),
    "sinkhorn": (lambda x, y, e, p: transport.sinkhorn(x, y, e, p=p, max_iterations=30),
                 {"x": (T, X), "y": (T, X), "e": (N, 1.0), "p": (N, 2.0)}),
    "sinkhorn_plan": (lambda x, y, e: transport.sinkhorn_plan(x, y, e, max_iterations=30),
                      {"x": (T, X), "y": (T, X), "e": (N, 1.0)}),
    "wasserstein_1d": (lambda x, y, p: transport.wasserstein_1d(x, y, p), {"x": (T, X), "y": (T, X), "p": (N, 2.0)}),
    "wasserstein_2": (lambda x, y: transport.wasserstein_2(x, y), {"x": (T, X), "y": (T, X)}),
    "sliced_wasserstein": (lambda x, y, n, g: transport.sliced_wasserstein(x, y, n, g),
                           {"x": (T, X), "y": (T, X), "n": (N, 8), "g": (G, None)}),
    "kernel_stein_discrepancy": (lambda x, s, h: transport.kernel_stein_discrepancy(x, s, bandwidth=h),
                                 {"x": (T, X), "s": (T, -X), "h": (N, None)}),
    "energy_score": (lambda x, y, a: transport.energy_score(x, y, a),
                     {"x": (T, points(3, 6, 2)), "y": (T, X), "a": (N, 1.0)}),
    "almost_fair_crps": (lambda x, y, a: transport.almost_fair_crps(x, y, a),
                         {"x": (T, points(3, 6, 2)), "y": (T, X), "a": (N, 0.9)}),
    "kl_on_grid": (lambda x, s: metrics.kl_on_grid(TARGET, x, s), {"x": (T, X), "s": (N, 0.5)}),
    "mode_coverage": (lambda x: metrics.mode_coverage(TARGET, x)[3:], {"x": (T, X)}),
    "over_floor": (lambda x, s: metrics.over_floor(TARGET, x, s, sets=2), {"x": (T, X), "s": (N, 0)}),
    "frechet_distance": (lambda x, y: metrics.frechet_distance(x, y), {"x": (T, X), "y": (T, X)}),
    "precision_recall": (lambda x, y, k: metrics.precision_recall(x, y, k), {"x": (T, X), "y": (T, X), "k": (N, 2)}),
    "expected_calibration_error": (lambda p, y, n: metrics.expected_calibration_error(p, y, n),
                                   {"p": (T, X.softmax(1)), "y": (L, LABEL), "n": (N, 5)}),
    "sample_teacher": (lambda n, v, b, s, y: evaluation.sample_teacher(
        CLASSY, n, levels=v, batch_size=b, seed=s, label=y, **QUIET)[0],
        {"n": (N, 6), "v": (N, 3), "b": (N, 4), "s": (N, 0), "y": (L, None)}),
    "sample_student": (lambda n, b, s, y, k: evaluation.sample_student(
        Generator(CLASSY, 1.0), n, batch_size=b, seed=s, label=y, steps=k, **QUIET)[0],
        {"n": (N, 6), "b": (N, 4), "s": (N, 0), "y": (L, None), "k": (N, None)}),
    "draw": (lambda n, s: draw(Generator(NET, 1.0), n, seed=s), {"n": (N, 6), "s": (N, 0)}),
    "denoising_loss": (lambda x, s, e, w: score_matching.denoising_loss(TARGET, x, s, e, weight=w),
                       {"x": (T, X), "s": (N, 1.0), "e": (T, X), "w": (N, 1.0)}),
    "sliced_loss": (lambda x, s, v, w: score_matching.sliced_loss(TARGET, x, s, v, weight=w),
                    {"x": (T, X), "s": (N, 1.0), "v": (T, X), "w": (N, 1.0)}),
    "edm_weight": (lambda s, d: score_matching.edm_weight(s, d), {"s": (N, torch.tensor(1.0)), "d": (N, 0.5)}),
    "log_uniform_sigma": (lambda n, a, b, g: score_matching.log_uniform_sigma(n, a, b, g, "cpu"),
                          {"n": (N, 3), "a": (N, 0.1), "b": (N, 3.0), "g": (G, None)}),
    "log_normal_sigma": (lambda n, a, b, g: score_matching.log_normal_sigma(n, a, b, g, "cpu"),
                         {"n": (N, 3), "a": (N, 0.1), "b": (N, 1.0), "g": (G, None)}),
    "rademacher": (lambda x, g: fields.rademacher(x, g), {"x": (T, X), "g": (G, None)}),
    "jacobian": (lambda x, s: fields.jacobian(TARGET, x, s), {"x": (T, X), "s": (N, 1.0)}),
    "convert": (lambda p, x, a, s: processes.convert(p, x, a, s, "eps", "x0"),
                {"p": (T, X), "x": (T, X), "a": (N, 0.6), "s": (N, 0.8)}),
    "Process.convert": (lambda p, x, t: processes.vp().convert(p, x, t, "x0", "velocity"),
                        {"p": (T, X), "x": (T, X), "t": (N, 0.5)}),
    "as_denoiser": (lambda x, s: processes.as_denoiser(lambda x, t: 0.1 * x, processes.vp())(x, s),
                    {"x": (T, X), "s": (N, 1.0)}),
    "as_model": (lambda x, t: processes.as_model(TARGET, processes.flow())(x, t), {"x": (T, X), "t": (N, 0.5)}),
    "deblend": (lambda x, b: processes.deblend(lambda x, a: -x, x, b), {"x": (T, X), "b": (S, torch.tensor([0.0,
        1.0]))}),
    "prior_kl": (lambda t: processes.prior_kl(processes.vp(), GaussianMixture([[1.0]], 0.5), t), {"t": (N, 1.0)}),
    "MLP": (lambda s, h, d, c: MLP(s, h, d, c).config["hidden"],
            {"s": ("shape", (2,)), "h": (N, 4), "d": (N, 1), "c": (N, 0)}),
    "UNet": (lambda s, c, b, d: UNet(s, c, blocks=b, dropout=d).config["channels"],
             {"s": ("shape", (1, 4, 4)), "c": (N, 4), "b": (N, 1), "d": (N, 0.0)}),
    "Denoiser": (lambda x, s, d: Denoiser(FLAT, d)(x, s), {"x": (T, X), "s": (N, 1.0), "d": (N, 1.0)}),
    "Denoiser with classes": (lambda x, y: CLASSY(x, 1.0, y), {"x": (T, X), "y": (L, LABEL)}),
    "Generator": (lambda z, s: Generator(NET, s)(z), {"z": (T, X), "s": (N, 1.0)}),
    "kl_from_scores": (lambda x, n, a, g: divergences.kl_from_scores(
        TARGET, ring(), x, n=n, sigma_min=a, generator=g, **QUIET).value,
        {"x": (T, points(8, 2)), "n": (N, 8), "a": (N, 0.1), "g": (G, None)}),
    "estimate": (lambda n: estimate(
        divergences.F["forward_kl"], GaussianMixture([[1.0]], 0.5), GaussianMixture([[0.0]], 1.0), n_cells=n).value,
        {"n": (N, 50)}),
    "scatter": (lambda x, n: plotting.scatter(x, n=n), {"x": (T, X), "n": (N, 5)}),
    "field": (lambda x, y: plotting.field(x, y), {"x": (T, X), "y": (T, X)}),
    "density": (lambda s: plotting.density(TARGET, sigma=s), {"s": (N, 0.5)}),
    "image_grid": (lambda x, n: plotting.image_grid(x, columns=n), {"x": (T, points(6, 1, 4, 4)), "n": (N, 3)}),
}


def numbers_in(value):
    """All the numbers that a value holds, as one float64 tensor."""
    if isinstance(value, torch.Tensor):
        return value.detach().flatten().to(torch.float64) if not value.is_complex() else torch.tensor([math.nan])
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value, dtype=torch.float64).flatten()
    if isinstance(value, (list, tuple)):
        return torch.cat([torch.zeros(0, dtype=torch.float64), *map(numbers_in, value)])
    if dataclasses.is_dataclass(value) or isinstance(value, (str, dict, complex)) or value is None:
        return torch.zeros(0, dtype=torch.float64)
    try:
        return torch.tensor([float(value)], dtype=torch.float64)
    except (TypeError, ValueError):  # axes and the like
        return torch.zeros(0, dtype=torch.float64)


def moderate(value):
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return False  # results may leave their range
    size = numbers_in(value).abs()
    return bool(((size == 0) | ((size > 1e-3) & (size < 1e3))).all())


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
@settings(derandomize=True, database=None, deadline=None, max_examples=60)
def test_odd_arguments(name, data):
    f, arguments = CALLS[name]
    given = {key: good for key, (_, good) in arguments.items()}
    for key in data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)):
        given[key] = data.draw(st.sampled_from(POOLS[arguments[key][0]]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            out = f(**given)
        except DOCUMENTED:
            return
        finally:
            plt.close("all")
    if all(map(moderate, given.values())):
        assert numbers_in(out).isfinite().all(), given
