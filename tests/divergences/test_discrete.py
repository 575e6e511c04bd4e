"""Ratio losses of discrete diffusion on chains small enough to enumerate."""

import decimal
import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import hessian

from minidistill.divergences import discrete
from tests.helpers import f64, normal

K = 5
STATES = torch.arange(K)


def assert_close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def chain(t=0.4):
    """p0 (5,), the transition P[x0, x] = p_t(x | x0) of a jump process with unequal rates, and those rates."""
    rates = normal(K, K, seed=1).exp().fill_diagonal_(0.0)
    generator = rates - torch.diag(rates.sum(1))
    return normal(K).softmax(0), torch.linalg.matrix_exp(t * generator), rates


def explicit(log_scores):
    """E_{x ~ p_t} of the score entropy, weights the rates, over the table log_scores[x, y]."""
    p0, transition, rates = chain()
    p = p0 @ transition
    ratios = p[None, :] / p[:, None]
    return (p * discrete.score_entropy_loss(log_scores, ratios, rates)).sum()


def denoising(log_scores):
    """The same from pairs (x0, x) alone: E_{x0} E_{x | x0}."""
    p0, transition, rates = chain()
    total = torch.zeros((), dtype=torch.float64)
    for x0 in range(K):
        log_transition = transition[x0].log().expand(K, K)
        each = discrete.denoising_score_entropy_loss(log_scores, log_transition, STATES, rates)
        total = total + p0[x0] * (transition[x0] * each).sum()
    return total


def exact_log_scores():
    p0, transition, _ = chain()
    return discrete.concrete_log_score((p0 @ transition).log().expand(K, K), STATES)


def off_diagonal(x):
    return x[~torch.eye(K, dtype=torch.bool)]


def test_concrete_log_score_is_a_log_ratio():
    p = normal(K).softmax(0)
    got = discrete.concrete_log_score(p.log().expand(K, K), STATES)
    assert_close(got.exp(), p[None, :] / p[:, None])
    assert_close(discrete.concrete_log_score(p.log().expand(K, K) + 3.0, STATES), got)
    sequence = discrete.concrete_log_score(normal(2, 3, K), torch.tensor([[0, 1, 2], [4, 3, 2]]))
    assert_close(sequence[1, 0], normal(2, 3, K)[1, 0] - normal(2, 3, K)[1, 0, 4])


def test_score_entropy_as_the_paper_writes_it():
    s, a, w = (normal(3, 4, seed=i).exp() for i in range(3))
    wanted = [
        sum(float(w[i, j] * (s[i, j] - a[i, j] * math.log(s[i, j]) + a[i, j] * (math.log(a[i, j]) - 1)))
            for j in range(4)) for i in range(3)
    ]
    assert_close(discrete.score_entropy_loss(s.log(), a, w), f64(wanted))
    assert_close(discrete.score_entropy_loss(s.log(), a), discrete.score_entropy_loss(s.log(), a, torch.ones_like(a)))


@pytest.mark.parametrize("loss", [explicit, denoising])
def test_minimum_at_the_exact_ratios(loss):
    """Gradient zero there; the Hessian in the log-scores is diag(p_x w_xy s_xy), positive for every pair x != y."""
    p0, transition, rates = chain()
    exact = exact_log_scores()
    x = exact.clone().requires_grad_()
    assert float(torch.autograd.grad(loss(x), x)[0].abs().max()) < 1e-12
    curvature = hessian(loss, exact).reshape(K * K, K * K)
    wanted = (p0 @ transition)[:, None] * rates * exact.exp()
    assert_close(curvature, torch.diag(wanted.flatten()))
    assert float(off_diagonal(curvature.diagonal().reshape(K, K)).min()) > 1e-3
    assert float(explicit(exact)) == pytest.approx(0.0, abs=1e-14)


def test_denoising_differs_by_a_constant():
    """The constant is E[K(conditional ratio)] - E[K(marginal ratio)], whatever the model."""
    p0, transition, rates = chain()
    p = p0 @ transition

    def k(a):
        return a * (a.log() - 1)

    conditional = transition[:, None, :] / transition[:, :, None]  # [x0, x, y]
    constant = (p0[:, None, None] * transition[:, :, None] * rates * k(conditional)).sum()
    constant = constant - (p[:, None] * rates * k(p[None, :] / p[:, None])).sum()
    assert float(constant) > 0.1
    for seed in range(4):
        model = normal(K, K, seed=seed)
        model = model - torch.diag(model.diagonal())  # a concrete score is 0 at y = x
        assert_close(denoising(model) - explicit(model), constant)


def test_denoising_training_finds_the_marginal_ratios():
    model = torch.zeros(K, K, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([model], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = denoising(model)
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(off_diagonal(model.detach()), off_diagonal(exact_log_scores()), rtol=0.0, atol=1e-4)


def test_own_state_counts_nothing():
    transition = chain()[1]
    log_transition = transition.log()
    base = discrete.denoising_score_entropy_loss(torch.zeros(K, K, dtype=torch.float64), log_transition, STATES)
    shifted = discrete.denoising_score_entropy_loss(3 * torch.eye(K, dtype=torch.float64), log_transition, STATES)
    assert_close(shifted, base)
    by_hand = discrete.score_entropy_loss(
        torch.zeros(K, K, dtype=torch.float64), transition / transition.diagonal()[:, None])
    assert_close(base, by_hand)  # log-score 0, ratio 1: nothing either


def test_absorbing_corruption():
    """The last state is the mask: from there p_t(y | x0) vanishes but for y = x0; loss and gradient stay finite."""
    a = 0.3  # kept with this probability
    log_transition = f64([[0.0, a, 0.0, 0.0, 1 - a]]).log()
    log_scores = torch.zeros(1, K, dtype=torch.float64, requires_grad=True)
    loss = discrete.denoising_score_entropy_loss(log_scores, log_transition, torch.tensor([4]))
    ratio = a / (1 - a)
    assert loss.item() == pytest.approx(3 * 1 + 1 + ratio * (math.log(ratio) - 1))
    assert_close(torch.autograd.grad(loss.sum(), log_scores)[0], f64([[1.0, 1 - ratio, 1.0, 1.0, 0.0]]))


def test_sequences_sum_over_positions():
    log_scores, log_transition = normal(2, 3, K), normal(2, 3, K, seed=1).log_softmax(-1)
    state = torch.tensor([[0, 1, 2], [4, 3, 2]])
    w = normal(2, 3, K, seed=2).exp()
    got = discrete.denoising_score_entropy_loss(log_scores, log_transition, state, w)
    each = [discrete.denoising_score_entropy_loss(log_scores[:, i], log_transition[:, i], state[:, i], w[:, i])
            for i in range(3)]
    assert got.shape == (2,)
    assert_close(got, torch.stack(each).sum(0))


@settings(max_examples=200, deadline=None)
@given(log_a=st.floats(-40, 40), log_s=st.floats(-40, 40))
def test_bregman_is_never_negative(log_a, log_s):
    a, s = f64([[log_a]]), f64([[log_s]])
    got = float(discrete.generalised_kl_bregman(a, s))
    assert got >= 0
    if abs(log_a - log_s) > 1e-6:
        assert got > 0
    scale = math.exp(log_s) + math.exp(log_a) * (1 + abs(log_a) + abs(log_s))
    entropy = float(discrete.score_entropy_loss(s, a.exp()))
    assert abs(entropy - got) <= 1e-14 * scale


def test_bregman_is_u_log_us():
    """phi(a) - phi(s) - phi'(s) (a - s), phi = u log u, by autograd; between probabilities it is KL."""
    a, s = normal(4, 6, seed=1).exp(), normal(4, 6, seed=2).exp().requires_grad_()
    slope = torch.autograd.grad((s * s.log()).sum(), s)[0]
    s = s.detach()
    wanted = (a * a.log() - s * s.log() - slope * (a - s)).sum(1)
    assert_close(discrete.generalised_kl_bregman(a.log(), s.log()), wanted)
    p, q = (x.log().log_softmax(1) for x in (a, s))
    assert_close(discrete.generalised_kl_bregman(p, q), (p.exp() * (p - q)).sum(1))
    w = normal(4, 6, seed=3).exp()
    terms = torch.stack([discrete.generalised_kl_bregman(a.log()[:, [j]], s.log()[:, [j]]) for j in range(6)], 1)
    assert_close(discrete.generalised_kl_bregman(a.log(), s.log(), w), (w * terms).sum(1))


def test_bregman_keeps_digits_near_equality_and_at_the_ends():
    """D(a, a e^d) = a d^2 / 2 to relative 1e-5 in float32; a = 0 costs s; e^{+-80} stays finite with its gradient."""
    d = torch.tensor([[1e-3]])
    got = discrete.generalised_kl_bregman(torch.tensor([[2.0]]), 2.0 + d)
    exact = math.exp(2) * (math.expm1(d.item()) - d.item())
    assert float(got) == pytest.approx(exact, rel=1e-3)  # 2 + d itself is rounded to 1e-7, 1e-4 of d
    assert float(discrete.generalised_kl_bregman(f64([[-math.inf]]), f64([[1.2]]))) == pytest.approx(math.exp(1.2))
    ends = torch.cartesian_prod(*[torch.tensor([-80.0, 0.0, 80.0])] * 2)
    model = ends[:, 1:].clone().requires_grad_()
    loss = discrete.generalised_kl_bregman(ends[:, :1], model)
    gradient = torch.autograd.grad(loss.sum(), model)[0]
    assert torch.isfinite(loss).all()
    torch.testing.assert_close(gradient, ends[:, 1:].exp() - ends[:, :1].exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=200, deadline=None)
@given(log_d=st.floats(-16, 0), negative=st.booleans(), log_a=st.integers(-3, 3))
def test_bregman_keeps_all_digits_however_near(dtype, log_d, negative, log_a):
    """a (e^d - 1 - d) from the d that is left after rounding, in 50 digits: d^2 / 2 is 1e-14 of the terms in it."""
    a = torch.tensor([[float(log_a)]], dtype=dtype)
    s = a + (-1 if negative else 1) * math.exp(log_d)
    with decimal.localcontext(decimal.Context(50)):
        d = Decimal(s.item()) - Decimal(a.item())
        exact = float(Decimal(log_a).exp() * (d.exp() - 1 - d))
    got = float(discrete.generalised_kl_bregman(a, s))
    assert got == pytest.approx(exact, rel=200 * torch.finfo(dtype).eps, abs=0)


def test_bregman_has_its_gradient_near_equality():
    """d/ds of a (e^d - 1 - d) is s - a, on both sides of where the series takes over."""
    d = torch.cat([torch.logspace(-8, -0.1, 60, dtype=torch.float64), f64([0.0299999, 0.03, 0.0300001, 0.0])])[:, None]
    model = torch.cat([d, -d]).requires_grad_()
    loss = discrete.generalised_kl_bregman(torch.zeros_like(model), model)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), model)[0], torch.expm1(model.detach()),
                               rtol=1e-12, atol=1e-20)


def test_an_impossible_state_has_no_ratios():
    log_prob = f64([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]).log()
    good = discrete.concrete_log_score(log_prob, torch.tensor([0, 2]))
    assert_close(good.exp(), f64([[1, 1, 0], [0, 1, 1]]))
    for call in (discrete.concrete_log_score,
                 lambda p, x: discrete.denoising_score_entropy_loss(torch.zeros(2, 3).double(), p, x)):
        with pytest.raises(ValueError, match=r"state at \[1\] has probability 0; wanted"):
            call(log_prob, torch.tensor([0, 0]))


def test_bayes_ratio_distils_a_teachers_prior():
    """Target from the prior p(y) and the corruption q(x_t | y): the minimiser over a table of logits is the exact
    posterior p(y | x_t), seen through ratios alone."""
    prior, transition, _ = chain()
    log_joint = prior.log() + transition.T.log()  # [x_t, y]
    posterior = log_joint.log_softmax(1)
    clean = (STATES + 1) % K  # any reference state serves
    target = discrete.concrete_log_score(log_joint, clean)
    logits = posterior + 2.0
    model = logits.clone().requires_grad_()
    loss = discrete.generalised_kl_bregman(target, discrete.concrete_log_score(model, clean)).sum()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert float(torch.autograd.grad(loss, model)[0].abs().max()) < 1e-12
    wrong = discrete.generalised_kl_bregman(target, discrete.concrete_log_score(prior.log().expand(K, K), clean))
    assert float(wrong.min()) > 0.01


X, S = torch.zeros(2, K, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(("call", "match"), [
    (lambda: discrete.score_entropy_loss(X, X[:, :2]), "log_scores"),
    (lambda: discrete.score_entropy_loss(X, X - 1), "ratios holds -1"),
    (lambda: discrete.score_entropy_loss(X, X, X[:1]), "weights"),
    (lambda: discrete.score_entropy_loss(X, X, X - 1), "weights holds -1"),
    (lambda: discrete.score_entropy_loss(X[0], X[0]), "neighbours"),
    (lambda: discrete.denoising_score_entropy_loss(X, X, S + K), "state runs from 5 to 5; wanted 0 to 4"),
    (lambda: discrete.denoising_score_entropy_loss(X, X, S - 1), "state runs from -1"),
    (lambda: discrete.denoising_score_entropy_loss(X, X, X), "state is torch.float64"),
    (lambda: discrete.generalised_kl_bregman(X, X.long()), "log_model"),
])
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_score_entropy_is_zero_at_an_impossible_neighbour():
    """a = 0 and log s = -inf: 0, as the Bregman form says."""
    log_scores, ratios = f64([[0, -math.inf]]), f64([[1, 0]])
    assert float(discrete.score_entropy_loss(log_scores, ratios)) == 0
    assert float(discrete.generalised_kl_bregman(ratios.log(), log_scores)) == 0
