"""Sinkhorn, exact W2, max-sliced and the critic against POT, closed forms and finite differences; wasserstein_1d and
sliced_wasserstein themselves are in test_transport_metrics.py."""

import math

import numpy as np
import ot
import pytest
import torch
from torch.autograd import gradcheck

from minidistill.transport import (
    energy_distance,
    entropic,
    max_sliced_wasserstein,
    sinkhorn,
    sinkhorn_plan,
    sliced_sinkhorn,
    sliced_wasserstein,
    wasserstein_1d,
    wasserstein_2,
)
from minidistill.transport.critic import wasserstein_1_critic
from tests.helpers import normal, rng

X, Y = normal(40, 3), 0.5 * normal(30, 3, seed=1) + 2
A, B = torch.rand(40, generator=rng(2)).double() + 0.1, torch.rand(30, generator=rng(3)).double() + 0.1
A, B = A / A.sum(), B / B.sum()
TIGHT = {"tolerance": 1e-12, "max_iterations": 20_000}


def cost(x, y, p=2.0):
    return ot.dist(x.numpy(), y.numpy(), "euclidean") ** p


def pots_plan(x, y, a, b, epsilon, p):
    return ot.bregman.sinkhorn_log(a.numpy(), b.numpy(), cost(x, y, p), epsilon, numItermax=20_000, stopThr=1e-12)


def primal(x, y, a, b, epsilon, p):
    """<P, C> + epsilon KL(P | a b') with POT's plan."""
    plan, product = pots_plan(x, y, a, b, epsilon, p), np.outer(a.numpy(), b.numpy())
    return (plan * cost(x, y, p)).sum() + epsilon * (plan * np.log(np.maximum(plan, 1e-300) / product)).sum()


@pytest.mark.parametrize("epsilon", [10.0, 1.0, 0.5])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_sinkhorn_is_pots(epsilon, p):
    plan = sinkhorn_plan(X, Y, epsilon, p, weights_x=A, weights_y=B, **TIGHT)
    np.testing.assert_allclose(plan.numpy(), pots_plan(X, Y, A, B, epsilon, p), rtol=1e-6, atol=1e-12)
    wanted = primal(X, Y, A, B, epsilon, p)
    debiased = wanted - (primal(X, X, A, A, epsilon, p) + primal(Y, Y, B, B, epsilon, p)) / 2
    for chunk in (None, 7):
        options = {"weights_x": A, "weights_y": 3 * B, "chunk": chunk, **TIGHT}
        assert float(sinkhorn(X, Y, epsilon, False, p, **options)) == pytest.approx(wanted, rel=1e-9)
        assert float(sinkhorn(X, Y, epsilon, True, p, **options)) == pytest.approx(debiased, rel=1e-8)


def test_sinkhorn2_agrees_on_the_cost():
    plan = sinkhorn_plan(X, Y, 0.5, **TIGHT)
    uniform = [np.full(len(z), 1 / len(z)) for z in (X, Y)]
    wanted = ot.sinkhorn2(*uniform, cost(X, Y), 0.5, method="sinkhorn_log", stopThr=1e-12, numItermax=20_000)
    assert float((plan * torch.as_tensor(cost(X, Y))).sum()) == pytest.approx(float(wanted), rel=1e-8)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("chunk", [None, 2])
def test_gradients_in_samples_and_weights(p, chunk):
    inputs = [z.clone().requires_grad_(True) for z in (X[:5], Y[:4], A[:5])]

    def loss(x, y, a):
        return sinkhorn(x, y, 1.0, p=p, weights_x=a, chunk=chunk, tolerance=1e-12, max_iterations=3000)

    assert gradcheck(loss, inputs)


def test_limits_of_epsilon():
    """Small: W_2^2 of the plan; large: the kernel -|x - y|, whose MMD is half of the energy distance."""
    exact = float(wasserstein_2(X[:30], Y)) ** 2
    small = float(sinkhorn(X[:30], Y, 0.02, False, tolerance=1e-5, max_iterations=20_000))
    assert exact < small < exact + 0.02 * math.log(30)
    large = float(sinkhorn(X, Y, 1e5, p=1.0, tolerance=1e-12))
    assert large == pytest.approx(float(energy_distance(X, Y)) / 2, rel=1e-4)


def test_debiased_sinkhorn_is_a_divergence():
    assert float(sinkhorn(X, X, 0.5, **TIGHT)) == pytest.approx(0, abs=1e-10)
    assert float(sinkhorn(X, X + 0.1, 0.5, **TIGHT)) == pytest.approx(0.03, rel=1e-9)  # a shift: |v|^2 exactly
    assert float(sinkhorn(X, Y, 0.5, **TIGHT)) == pytest.approx(float(sinkhorn(Y, X, 0.5, **TIGHT)), rel=1e-9)
    image = sinkhorn(X.reshape(40, 1, 3), Y.reshape(30, 1, 3), 0.5, **TIGHT)
    assert float(image) == pytest.approx(float(sinkhorn(X, Y, 0.5, **TIGHT)), rel=1e-12)


def test_sinkhorn_of_gaussians_in_closed_form():
    """Two centred Gaussians on the line, variances s, t (Janati 2020): with c = sqrt(4 s t + e^2/4), e = epsilon,
    OT = s + t - c + e/2 (1 - log e + log(c + e/2)); samples are quantiles, whose tails cost a little."""
    def closed(s, t, e):
        c = math.sqrt(4 * s * t + e**2 / 4)
        return s + t - c + e / 2 * (1 - math.log(e) + math.log(c + e / 2))

    share = (torch.arange(1500, dtype=torch.float64) + 0.5) / 1500
    z = torch.distributions.Normal(0.0, 1.0).icdf(share).unsqueeze(1)
    value = float(sinkhorn(z, 2 * z, 1.0, False, tolerance=1e-9))
    assert value == pytest.approx(closed(1, 4, 1.0), rel=0.01)
    debiased = closed(1, 4, 1.0) - (closed(1, 1, 1.0) + closed(4, 4, 1.0)) / 2
    assert float(sinkhorn(z, 2 * z, 1.0, tolerance=1e-9)) == pytest.approx(debiased, rel=0.01)


def test_absorbing_often_changes_nothing(monkeypatch):
    wanted = sinkhorn_plan(X, Y, 0.1, **TIGHT)
    monkeypatch.setitem(entropic.RANGES, torch.float64, (-600.0, 0.5))
    torch.testing.assert_close(sinkhorn_plan(X, Y, 0.1, **TIGHT), wanted, rtol=1e-7, atol=1e-13)


def test_zero_weights_leave_samples_out():
    a = A.clone()
    a[:10] = 0
    got = sinkhorn(X, Y, 0.5, weights_x=a, **TIGHT)
    assert float(got) == pytest.approx(float(sinkhorn(X[10:], Y, 0.5, weights_x=a[10:], **TIGHT)), rel=1e-9)


def test_plans_marginals_and_the_warning():
    plan = sinkhorn_plan(X, Y, 0.1, weights_x=A, weights_y=B, max_iterations=5000)
    torch.testing.assert_close(plan.sum(1), A, rtol=1e-9, atol=0)
    assert float((plan.sum(0) - B).norm()) <= 1e-6
    with pytest.warns(RuntimeWarning, match="above tolerance=1e-06 after max_iterations=3"):
        plan = sinkhorn_plan(X, Y, 0.1, max_iterations=3)
    assert float((plan.sum(0) - 1 / 30).norm()) > 1e-6
    torch.testing.assert_close(plan.sum(1), torch.full((40,), 1 / 40, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:sinkhorn. marginal error:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:sinkhorn. epsilon=.* is below:RuntimeWarning")
@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize(("scale", "epsilon"), [(1.0, 1e-9), (1e4, 1.0), (1e-10, 1.0), (1e-8, 1e-30), (1e15, 1e-3)])
def test_float32_extremes_are_finite(p, scale, epsilon):
    """Far clusters, duplicates, an outlier, tiny and huge costs against epsilon: values and gradients."""
    x, y = X.float(), Y.float() + 100
    x[3], x[4] = x[2], 1e4
    x, y = (x * scale).requires_grad_(True), y * scale
    for chunk in (None, 16):
        value = sinkhorn(x, y, epsilon, p=p, max_iterations=50, chunk=chunk)
        gradient = torch.autograd.grad(value, x)[0]
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert gradient.isfinite().all()
    exact = float(sinkhorn(x.double(), y.double(), epsilon, p=p, max_iterations=50).detach())
    # 1e-3 of the largest cost: float32's 1e-7 of it, and the difference of 50 unfinished iterations
    assert float(value.detach()) == pytest.approx(exact, abs=1e-3 * (1e4 * math.sqrt(3) * scale) ** p)


def test_sliced_sinkhorn_tends_to_sliced_wasserstein():
    got = float(sliced_sinkhorn(X, Y, 0.05, 16, rng(5), tolerance=1e-5, max_iterations=20_000))
    assert got == pytest.approx(float(sliced_wasserstein(X, Y, 16, rng(5))) ** 2, rel=0.05)


@pytest.mark.parametrize("m", [40, 30])
def test_wasserstein_2_is_pots(m):
    y = normal(m, 3, seed=1) * 0.5 + 2
    uniform = [np.full(k, 1 / k) for k in (40, m)]
    assert float(wasserstein_2(X, y)) ** 2 == pytest.approx(ot.emd2(*uniform, cost(X, y)), rel=1e-8)
    weighted = ot.emd2(A.numpy(), uniform[1], cost(X, y))
    assert float(wasserstein_2(X, y, weights_x=5 * A)) ** 2 == pytest.approx(weighted, rel=1e-7)


def test_exact_distances_have_gradients_also_where_they_vanish():
    for f in (wasserstein_2, lambda x, y: max_sliced_wasserstein(x, y, steps=20, generator=rng()),
              lambda x, y: sliced_wasserstein(x, y, 8, rng())):
        x = X[:6].clone().requires_grad_(True)
        assert torch.autograd.grad(f(x, X[:6].clone()), x)[0].eq(0).all()
    for y in (Y[:6], Y[:4]):
        assert gradcheck(wasserstein_2, (X[:6].clone().requires_grad_(True), y.clone().requires_grad_(True)))
    big = (X.float() * 1e25).requires_grad_(True)
    for f in (wasserstein_2, sliced_wasserstein, max_sliced_wasserstein):
        value = f(big, 1e25 * X.float().flip(0) + 1e20)
        assert value.isfinite()
        assert torch.autograd.grad(value, big)[0].isfinite().all()


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_max_sliced_is_the_best_direction_of_the_plane(p):
    x, y = X[:, :2], Y[:, :2] * torch.tensor([0.3, 1.5], dtype=torch.float64) - 1
    angle = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    best = wasserstein_1d(x @ torch.stack([angle.cos(), angle.sin()]), y @ torch.stack([angle.cos(), angle.sin()]), p)
    assert float(max_sliced_wasserstein(x, y, p, generator=rng())) == pytest.approx(float(best.max()), rel=1e-5)


def test_max_sliced_finds_the_stretched_axis_and_the_shift():
    x = normal(300, 10)
    v = torch.arange(10.0, dtype=torch.float64)
    assert float(max_sliced_wasserstein(x, x + v, generator=rng())) == pytest.approx(float(v.norm()), rel=1e-6)
    stretched = x * (1 + 4 * torch.eye(10, dtype=torch.float64)[3])
    got = float(max_sliced_wasserstein(x, stretched, generator=rng()))
    assert float(wasserstein_1d(x[:, 3], stretched[:, 3])) <= got * (1 + 1e-5)
    assert got <= float(wasserstein_2(x, stretched)) * (1 + 1e-9)


def test_critic_is_near_the_exact_w1():
    """N(0, I) against 2 N(0, I): the exact W1 of the same samples by POT. The critic is a lower bound, up to places
    steeper than those it looked at (5 %), and comes within a quarter after 300 steps."""
    x, y = normal(400, 2).float(), 2 * normal(400, 2, seed=1).float()
    exact = float(ot.emd2([], [], cost(x.double(), y.double(), 1.0)))
    x.requires_grad_(True)
    got = wasserstein_1_critic(x, y, steps=300, progress=False)
    assert 0.75 * exact < float(got.value.detach()) < 1.05 * exact
    assert got.history.shape == (300,)
    assert 0.9 < got.slope < 1.5
    wanted = (got.critic(x).mean() - got.critic(y).mean()) / got.slope
    assert float(got.value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    # Each sample's share of the gradient is 1 / n times a slope of at most 1 or a little more.
    pull = torch.autograd.grad(got.value, x)[0].norm(dim=1) * 400
    assert float(pull.max()) < 1.2
    again = wasserstein_1_critic(x, y, steps=10, progress=False).history
    torch.testing.assert_close(again, wasserstein_1_critic(x, y, steps=10, progress=False).history, rtol=0, atol=0)


def test_critics_unit_of_length_does_not_matter():
    x, y = X, normal(30, 3, seed=1)
    one, large = (wasserstein_1_critic(c * x, c * y, steps=20, progress=False).value for c in (1.0, 1e6))
    assert float(large) == pytest.approx(1e6 * float(one), rel=1e-5)


X32 = torch.zeros(4, 2)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: sinkhorn(X32, X32, 0.0), ValueError, "epsilon=0.0"),
    (lambda: sinkhorn(X32, X32, 1.0, p=0.5), ValueError, "p=0.5"),
    (lambda: sinkhorn(X32, X32[:, :1], 1.0), ValueError, r"y has shape \(4, 1\)"),
    (lambda: sinkhorn(X32, X32.long(), 1.0), TypeError, "y is a tensor of torch.int64"),
    (lambda: sinkhorn(X32, X32, 1.0, weights_x=torch.ones(3)), ValueError, r"weights_x is \(3,\)"),
    (lambda: sinkhorn(X32, X32, 1.0, weights_y=-torch.ones(4)), ValueError, "weights_y: wanted numbers >= 0"),
    (lambda: sinkhorn(X32, X32, 1.0, tolerance=0.0), ValueError, "tolerance=0.0"),
    (lambda: sinkhorn(X32, X32, 1.0, max_iterations=0), ValueError, "max_iterations=0"),
    (lambda: sinkhorn(X32, X32, 1.0, chunk=0), ValueError, "chunk=0"),
    (lambda: wasserstein_2(X32, X32, weights_y=torch.zeros(4)), ValueError, "weights_y"),
    (lambda: max_sliced_wasserstein(X32, X32, steps=0), ValueError, "steps=0"),
    (lambda: wasserstein_1_critic(X32, X32, penalty=0.0), ValueError, "penalty=0.0"),
])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("x", "y", "p", "text"), [
    (torch.tensor([0, math.nan]), torch.tensor([1.0, 2]), 2.0, "x holds a NaN"),
    (torch.tensor([0.0, 1]), torch.tensor([1.0, 2]), 0.5, "p=0.5"),
    (torch.zeros(5, 3), torch.zeros(5, 1), 2.0, r"y \(5, 1\)"), (torch.zeros(0), torch.zeros(2), 1.0, "not empty"),
])
def test_wasserstein_1d_refuses(x, y, p, text):
    with pytest.raises(ValueError, match=text):
        wasserstein_1d(x, y, p)
