"""Categorical distillation: gradients enumerated, policies solved by scipy, plans refereed by POT."""

import math
from itertools import pairwise, product

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linear_sum_assignment
from torch.autograd.functional import jacobian

from minidistill.divergences import F, FDivergence, alpha_divergence
from minidistill.divergences import categorical as cat
from tests.helpers import f64, normal, rng

ROWS = {**F, "alpha0.3": alpha_divergence(0.3), "alpha2": alpha_divergence(2.0)}
each_row = pytest.mark.parametrize("name", ROWS)


def assert_close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


# ------------------------------------------------- soft labels

def test_kl_directions_are_named_from_the_teacher():
    s, t = normal(2, 6, 5)
    p, q = t.softmax(1), s.softmax(1)
    assert_close(cat.logit_distillation(s, t, "forward_kl"), (p * (p / q).log()).sum(1))
    assert_close(cat.logit_distillation(s, t, "reverse_kl"), (q * (q / p).log()).sum(1))
    wanted = torch.nn.functional.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True).sum(1)
    assert_close(cat.logit_distillation(s, t), wanted)


@each_row
def test_flip_between_conventions(name):
    """D_f(teacher || student) = D_f°(student || teacher), and D_f != D_f° for the rows that are not symmetric."""
    s, t = normal(2, 6, 5)
    value = cat.logit_distillation(s, t, ROWS[name])
    assert_close(cat.logit_distillation(t, s, ROWS[name].flipped()), value)
    symmetric = name in {"jensen_shannon", "squared_hellinger", "jeffreys", "le_cam"}
    assert torch.allclose(cat.logit_distillation(t, s, ROWS[name]), value) == symmetric


@each_row
def test_gradient_in_the_students_logits(name):
    """dD_f/dlogit_k = q_k (g_k - E_q g), g = f°'(1/r), written without the library's f°: g = f(r) - r f'(r)."""
    t, s = normal(5, 7, seed=1), normal(5, 7, seed=2).requires_grad_()
    q, r = s.softmax(1).detach(), (t.softmax(1) / s.softmax(1)).detach()
    g = ROWS[name].f(r) - r * ROWS[name].df(r)
    got = gradient(cat.logit_distillation(s, t, ROWS[name]).sum(), s)
    assert_close(got, q * (g - (q * g).sum(1, keepdim=True)))


@each_row
def test_high_temperature_matches_logits(name):
    """T^2 D_f -> f''(1) / (2k) |centred difference of logits|^2, hence the factor (Hinton 2015)."""
    s, t = normal(2, 4, 6)
    d = (t - s) - (t - s).mean(1, keepdim=True)
    wanted = float(ROWS[name].d2f(f64(1.0))) / 2 * d.square().mean(1)
    got = cat.logit_distillation(s, t, ROWS[name], temperature=1e4)
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=0.0)
    bare = cat.logit_distillation(s, t, ROWS[name], temperature=3.0, times_t_squared=False)
    assert_close(cat.logit_distillation(s, t, ROWS[name], temperature=3.0), 9 * bare)
    assert_close(bare, ROWS[name].categorical(t / 3, s / 3))


#: Rows whose value or slope squares the ratio: at r = e^160 they pass float32's 3e38, as they must.
SQUARING = {"pearson", "neyman", "alpha2"}


@each_row
def test_extreme_logits_stay_finite_in_float32(name):
    reach = 40.0 if name in SQUARING else 80.0  # ratios up to e^{2 reach}
    corners = [[reach if j == i else -reach for j in range(3)] for i in range(3)] + [[0.0, 0.0, 0.0]]
    s = torch.tensor([a for a, _ in product(corners, corners)], requires_grad=True)
    t = torch.tensor([b for _, b in product(corners, corners)])
    loss = cat.logit_distillation(s, t, ROWS[name])
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient(loss.sum(), s)).all()
    for other in (cat.balanced_kl, cat.logitwise_distillation, cat.sinkhorn_distillation):
        loss = other(s, t)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient(loss.sum(), s)).all()


def test_logitwise_is_a_sum_of_bernoulli_divergences():
    s, t = normal(2, 6, 5)
    p, q = t.sigmoid(), s.sigmoid()
    wanted = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
    assert_close(cat.logitwise_distillation(s, t), wanted)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    assert_close(cat.logitwise_distillation(s, t), (bce(s, p, reduction="none") - bce(t, p, reduction="none")).sum(1))
    shifted = cat.logitwise_distillation(s + 1.0, t)
    assert not torch.allclose(shifted, wanted)
    assert_close(cat.logit_distillation(s + 1.0, t), cat.logit_distillation(s, t))
    p, q = (t / 2).sigmoid(), (s / 2).sigmoid()
    wanted = 4 * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).sum(1)
    assert_close(cat.logitwise_distillation(s, t, "reverse_kl", 2.0), wanted)


def test_balance_switches_with_the_entropy_gap():
    teacher = f64([[1.0, 0.0, -1.0]] * 3)
    student = teacher * f64([[3.0], [0.3], [1.0]])  # over-confident, under-confident, as confident
    assert cat.balance_weights(student, teacher).tolist() == [0.75, 0.25, 0.5]
    assert cat.balance_weights(student, teacher, favour=1.0).tolist() == [1.0, 0.0, 0.5]
    forward, reverse = (cat.logit_distillation(student, teacher, name) for name in ("forward_kl", "reverse_kl"))
    w = f64([0.75, 0.25, 0.5])
    assert_close(cat.balanced_kl(student, teacher), w * forward + (1 - w) * reverse)
    jeffreys = cat.logit_distillation(student, teacher, "jeffreys", 2.0)
    assert_close(cat.balanced_kl(student, teacher, favour=0.5, temperature=2.0), jeffreys / 2)
    with pytest.raises(ValueError, match="favour"):
        cat.balance_weights(student, teacher, favour=0.4)


def test_balance_compares_entropies_at_the_losss_temperature():
    """The first pair changes order with T (entropies 0.54, 0.69 at 1 and 1.37, 1.06 at 10); the second does not, but
    would if the student's T were left at 1."""
    teacher, student = f64([[3.0, 0.0, 0.0, 0.0]] * 2), f64([[10.0, 10.0, -10.0, -10.0], [2.7, 0.0, 0.0, 0.0]])
    assert cat.balance_weights(student, teacher).tolist() == [0.25, 0.25]
    forward, reverse = (cat.logit_distillation(student, teacher, name, 10.0) for name in ("forward_kl", "reverse_kl"))
    w = f64([0.75, 0.25])
    assert_close(cat.balanced_kl(student, teacher, temperature=10.0), w * forward + (1 - w) * reverse)


# ------------------------------------------------- Sinkhorn over a batch

MASS = np.full(12, 1 / 12)


def soft_labels(n=12, k=4, seed=0):
    return 2 * normal(n, k, seed=seed), 2 * normal(n, k, seed=seed + 1)


@pytest.mark.parametrize("seed", range(5))
def test_plan_has_the_marginals(seed):
    """Columns to rounding; rows to 1e-3 of total mass in 20 iterations at SinKD's temperature of 2, in 200 for sharp
    labels, whose cost spreads over more multiples of epsilon."""
    for n, temperature, iterations in ((32, 2.0, 20), (32, 1.0, 200), (12, 1.0, 200)):
        s, t = ((x / temperature).softmax(1) for x in soft_labels(n=n, k=10, seed=seed))
        _, log_plan = cat.soft_label_plan(s, t, epsilon=0.1, iterations=iterations)
        plan = log_plan.exp()
        assert_close(plan.sum(0), torch.full((n,), 1 / n, dtype=torch.float64))
        assert float((plan.sum(1) - 1 / n).abs().sum()) < 1e-3


def test_plan_is_pots():
    s, t = (x.softmax(1) for x in soft_labels())
    cost, log_plan = cat.soft_label_plan(s, t, epsilon=0.1, iterations=2000)
    wanted = ot.sinkhorn(MASS, MASS, cost.numpy(), reg=0.1, stopThr=1e-12, numItermax=20_000)
    assert_close(log_plan.exp(), torch.tensor(wanted), rtol=1e-7, atol=1e-12)
    assert_close(cost, (s[:, None] - t).abs().sum(2))


def test_tends_to_the_exact_cost():
    """epsilon -> 0 gives the optimal assignment (scipy) and the linear programme (POT); larger epsilon lies above."""
    s, t = soft_labels()
    cost = (s.softmax(1)[:, None] - t.softmax(1)).abs().sum(2).numpy()
    row, column = linear_sum_assignment(cost)
    exact = cost[row, column].mean()
    assert ot.emd2([], [], cost) == pytest.approx(exact, abs=1e-12)
    gaps = [float(cat.sinkhorn_distillation(s, t, 1.0, e, 4000).mean()) - exact for e in (0.3, 0.1, 0.03, 0.003)]
    assert all(a > b for a, b in pairwise(gaps))
    assert -1e-6 < gaps[-1] < 1e-3  # from above up to the rows' marginals
    assert gaps[0] > 0.05


def test_debiased_is_zero_for_equal_batches_and_positive_else():
    s, t = soft_labels()
    own = cat.sinkhorn_distillation(t, t, debiased=True, iterations=300)
    assert float(own.mean().abs()) < 1e-6
    assert float(cat.sinkhorn_distillation(t, t, iterations=300).mean()) > 0.01  # the entropic bias
    for seed in range(5):
        s, t = soft_labels(seed=seed)
        assert float(cat.sinkhorn_distillation(s, t, debiased=True, iterations=300).mean()) > 0.005


def test_debiased_is_pots():
    def regularised(x, y):
        """<P, C> + epsilon KL(P || a a')."""
        cost = ot.dist(x, y, metric="cityblock")
        plan = ot.sinkhorn(MASS, MASS, cost, reg=0.1, stopThr=1e-9, numItermax=20_000)
        return (plan * cost).sum() + 0.1 * (plan * np.log(plan * 144)).sum()

    s, t = soft_labels()
    p, q = ((x / 2).softmax(1).numpy() for x in (s, t))
    wanted = regularised(p, q) - regularised(p, p) / 2 - regularised(q, q) / 2
    got = cat.sinkhorn_distillation(s, t, debiased=True, iterations=2000)
    assert float(got.mean()) == pytest.approx(wanted, rel=1e-6)


def test_sinkhorn_gradient_is_the_finite_difference():
    s, t = soft_labels(n=4, k=3)
    for debiased in (False, True):
        def loss(x, debiased=debiased):
            return cat.sinkhorn_distillation(x, t, iterations=5, debiased=debiased).mean()

        torch.autograd.gradcheck(loss, s.clone().requires_grad_(), eps=1e-6, atol=1e-7)


def test_sinkhorn_sees_batches_as_sets():
    """It cannot tell whose label is whose: permuted, the student is wrong on every sample at the same mean loss."""
    s, t = soft_labels()
    turned = cat.sinkhorn_distillation(s.roll(1, 0), t, iterations=500)
    assert_close(turned.roll(-1, 0), cat.sinkhorn_distillation(s, t, iterations=500), rtol=1e-6, atol=1e-9)
    assert float(cat.logit_distillation(t.roll(1, 0), t).mean()) > 1
    assert float(cat.sinkhorn_distillation(t.roll(1, 0), t, epsilon=0.01, iterations=500).mean()) < 1e-3


def clouds():
    """A student's soft labels around (0.1, 0.8, 0.1), a teacher's around (0.8, 0.1, 0.1): disjoint in the simplex."""
    centre_s, centre_t = f64([0.1, 0.8, 0.1]).log(), f64([0.8, 0.1, 0.1]).log()
    return centre_s + 0.1 * normal(20, 3), centre_t + 0.1 * normal(20, 3, seed=1)


def test_disjoint_clouds_are_pulled_by_sinkhorn_and_not_by_jensen_shannon():
    """The two batches as distributions over the simplex: Jensen-Shannon between their kernel density estimates sits at
    log 2 with no gradient, the transport cost slopes from every student label towards the teacher's class 0."""
    s, t = clouds()
    s.requires_grad_()
    nodes = torch.cartesian_prod(*[torch.linspace(0, 1, 61, dtype=torch.float64)] * 2)

    def log_density(logits, bandwidth=0.02):
        square = (nodes[:, None] - logits.softmax(1)[:, :2]).square().sum(2)
        return (-square / (2 * bandwidth**2)).logsumexp(1).log_softmax(0)

    blind = F["jensen_shannon"].between(log_density(t), log_density(s))
    assert blind.item() == pytest.approx(math.log(2), abs=1e-9)
    assert float(gradient(blind, s).abs().max()) < 1e-9
    pull = -gradient(cat.sinkhorn_distillation(s, t, 1.0).mean(), s) * len(s)
    assert float(pull[:, 0].min()) > 0.05
    assert float(pull[:, 1].max()) < -0.05


def test_one_hot_against_another_one_hot_stalls_both():
    """Between soft labels that softmax itself has saturated no divergence helps: q_k multiplies every gradient in the
    logits, SinKD's L1 cost included. KL(teacher || student) keeps a slope of p - q."""
    s = torch.tensor([[-30.0, 30.0, -30.0]] * 2, dtype=torch.float64, requires_grad=True)
    t = f64([[30.0, -30.0, -30.0]] * 2)
    for stalled in (cat.logit_distillation(s, t, "jensen_shannon"), cat.sinkhorn_distillation(s, t, 1.0)):
        assert float(gradient(stalled.mean(), s).abs().max()) < 1e-20
    assert_close(gradient(cat.logit_distillation(s, t).sum(), s), s.softmax(1).detach() - t.softmax(1))


# ------------------------------------------------- f-DPG

@each_row
def test_f_dpg_is_the_gradient_enumerated(name):
    """sum_x pi(x) grad surrogate(x) over 10 symbols is autograd's gradient of D_f(p || pi), with any baseline and Z."""
    theta, target = normal(10, seed=3).requires_grad_(), normal(10, seed=4)
    log_pi, log_p = theta.log_softmax(0), target.log_softmax(0)
    wanted = gradient(ROWS[name].categorical(target, theta), theta)
    weight = log_pi.exp().detach()
    got = gradient((weight * cat.f_dpg_surrogate(log_pi, log_p, ROWS[name])).sum(), theta)
    assert_close(got, wanted, rtol=1e-8, atol=1e-10)
    surrogate = cat.f_dpg_surrogate(theta.log_softmax(0), log_p + 2.5, ROWS[name], log_z=2.5, baseline=7.0)
    got = gradient((weight * surrogate).sum(), theta)
    assert_close(got, wanted, rtol=1e-8, atol=1e-9)
    assert float(wanted.abs().max()) > 0.01


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "softened_reverse_kl"])
@pytest.mark.parametrize("baseline", [0.0, "leave_one_out"])
def test_f_dpg_by_monte_carlo(name, baseline):
    """2,000 batches of 50 samples: the mean within 4 standard errors of the enumerated gradient in every coordinate
    (10 coordinates at 4 s.e.: odds of a false alarm 6e-4, and the seed is fixed)."""
    theta, target = normal(10, seed=3), normal(10, seed=4)
    wanted = jacobian(lambda x: F[name].categorical(target, x), theta)
    pi, log_p = theta.softmax(0), target.log_softmax(0)
    x = torch.multinomial(pi, 100_000, replacement=True, generator=rng())
    estimates = []
    for batch in x.reshape(2000, 50):
        log_pi = theta.log_softmax(0)[batch].requires_grad_()
        slope = gradient(cat.f_dpg_surrogate(log_pi, log_p[batch], name, baseline=baseline).mean(), log_pi)
        estimates.append(torch.zeros(10, dtype=torch.float64).index_add(0, batch, slope) - slope.sum() * pi)
    estimates = torch.stack(estimates)
    error = estimates.std(0) / math.sqrt(2000)
    assert ((estimates.mean(0) - wanted).abs() < 4 * error).all()
    assert (wanted.abs() > 8 * error).any()  # a wrong sign or factor would show


def test_leave_one_out_leaves_out_its_own_sample():
    log_pi, log_p = normal(4, seed=1), normal(4, seed=2)
    u = (log_pi - log_p).exp()
    c = u.log() + 1  # f°' of KL(pi || p)
    wanted = torch.stack([(c[i] - (c.sum() - c[i]) / 3) * log_pi[i] for i in range(4)])
    assert_close(cat.f_dpg_surrogate(log_pi, log_p, "reverse_kl", baseline="leave_one_out"), wanted)
    with pytest.raises(ValueError, match="leave_one_out"):
        cat.f_dpg_surrogate(log_pi, log_p, baseline="mean")
    with pytest.raises(ValueError, match="1 sample"):
        cat.f_dpg_surrogate(log_pi[:1], log_p[:1], baseline="leave_one_out")


def test_log_partition_is_importance_sampling():
    """100,000 samples: Z within 4 standard errors; with p = c pi every sample gives it exactly."""
    theta, log_p = normal(10, seed=3), normal(10, seed=4) + 1.7
    x = torch.multinomial(theta.softmax(0), 100_000, replacement=True, generator=rng())
    log_pi = theta.log_softmax(0)
    ratio = (log_p - log_pi)[x].exp()
    z = float(log_p.exp().sum())
    got = float(cat.log_partition(log_pi[x], log_p[x]).exp())
    assert abs(got - z) < 4 * float(ratio.std()) / math.sqrt(100_000)
    assert float(cat.log_partition(log_pi[x], log_pi[x] + 0.3)) == pytest.approx(0.3)
    by_hand = cat.f_dpg_surrogate(log_pi[x], log_p[x], "forward_kl", log_z=math.log(got))
    assert_close(cat.f_dpg_surrogate(log_pi[x], log_p[x], "forward_kl", log_z=None), by_hand)


# ------------------------------------------------- f-DPO

U = torch.logspace(-3, 3, 31, dtype=torch.float64)
#: f' as the paper prints it, u = pi / ref; the library's row; and the factor by which the paper's is larger.
PAPER = {
    "RKL": (lambda u: u.log() + 1, F["reverse_kl"], 1.0),
    "FKL": (lambda u: -1 / u, F["forward_kl"], 1.0),
    "JS": (lambda u: (2 * u / (1 + u)).log(), F["jensen_shannon"], 2.0),
    "alpha0.3": (lambda u: (1 - u**-0.3) / 0.3, alpha_divergence(0.3), 1.0),
    "alpha0.7": (lambda u: (1 - u**-0.7) / 0.7, alpha_divergence(0.7), 1.0),
}
each_link = pytest.mark.parametrize("name", PAPER)


@each_link
def test_f_dpo_has_the_papers_links(name):
    """Link functions enter as differences, so a constant is free; the loss is -log sigmoid of beta times that."""
    link, row, factor = PAPER[name]
    log_ref_w, log_ref_l = normal(31, seed=1), normal(31, seed=2)
    v = U.flip(0) ** 0.7 * 1.3
    got = cat.f_dpo_loss(U.log() + log_ref_w, v.log() + log_ref_l, log_ref_w, log_ref_l, row, beta=0.02)
    wanted = torch.log1p(torch.exp(-0.02 / factor * (link(U) - link(v))))
    assert_close(got, wanted)


def bandit():
    reward, ref = f64([1.0, 0.2, -0.5, 0.7, -1.2]), f64([0.1, 0.3, 0.25, 0.15, 0.2])
    return reward, ref


def kkt_policy(inverse, beta, top):
    """pi = ref u with f°'(u) = (reward - multiplier) / beta and sum pi = 1, by scipy's root finder."""
    reward, ref = (x.numpy() for x in bandit())
    lowest = reward.max() - beta * top if top < math.inf else -50.0

    def mass(multiplier):
        return (ref * inverse((reward - multiplier) / beta)).sum() - 1

    return ref * inverse((reward - brentq(mass, lowest + 1e-9, 50.0, xtol=1e-13)) / beta)


#: u = (f°')^{-1}(y) by hand, and the supremum of f°'; our Jensen-Shannon's f°' is log(2u / (1 + u)) / 2.
INVERSE = {
    "RKL": (lambda y: np.exp(np.minimum(y, 50) - 1), math.inf),
    "FKL": (lambda y: -1 / y, 0.0),
    "JS": (lambda y: np.exp(2 * y) / (2 - np.exp(2 * y)), math.log(2) / 2),
    "alpha0.3": (lambda y: (1 - 0.3 * y) ** (-1 / 0.3), 1 / 0.3),
    "alpha0.7": (lambda y: (1 - 0.7 * y) ** (-1 / 0.7), 1 / 0.7),
}


def fit_policy(row: FDivergence, beta: float) -> torch.Tensor:
    """Minimise the population loss: every pair of arms, preferred with Bradley-Terry's probability, by L-BFGS."""
    reward, ref = bandit()
    w, l = torch.tensor([(i, j) for i in range(5) for j in range(5) if i != j]).T
    share = torch.sigmoid(reward[w] - reward[l]) * ref[w] * ref[l]
    theta = ref.log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([theta], lr=1.0, max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        log_pi, log_ref = theta.log_softmax(0), ref.log()
        loss = (share * cat.f_dpo_loss(log_pi[w], log_pi[l], log_ref[w], log_ref[l], row, beta)).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return theta.detach().softmax(0)


@each_link
def test_f_dpo_reproduces_the_kkt_policy(name):
    """The optimum of the loss is the policy of the constrained problem, and that maximises the stated objective."""
    beta, row = 0.8, PAPER[name][1]
    wanted = torch.tensor(kkt_policy(INVERSE[name][0], beta, INVERSE[name][1]))
    got = fit_policy(row, beta)
    assert float((got - wanted).abs().sum()) / 2 < 1e-4
    reward, ref = bandit()
    theta = got.log().requires_grad_()
    objective = (theta.softmax(0) * reward).sum() - beta * row.categorical(ref.log(), theta)
    assert float(gradient(objective, theta).abs().max()) < 1e-4
    assert float((got - ref).abs().sum()) / 2 > 0.1


def test_swapping_the_convention_is_a_different_policy():
    """The trap: KL's two directions in f-DPO give policies further apart than the test above tolerates."""
    gap = fit_policy(F["reverse_kl"], 0.8) - fit_policy(F["forward_kl"], 0.8)
    assert float(gap.abs().sum()) / 2 > 0.02


@each_link
def test_f_dpo_stays_finite_in_float32(name):
    log_u = torch.tensor([-80.0, 0.0, 80.0])
    w, l = torch.cartesian_prod(log_u, log_u).T.contiguous().requires_grad_()
    loss = cat.f_dpo_loss(w, l, torch.zeros(9), torch.zeros(9), PAPER[name][1])
    assert torch.isfinite(loss).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss.sum(), (w, l)))


# ------------------------------------------------- rankings, heads, sequences

@settings(max_examples=30, deadline=None)
@given(shift=st.floats(-100, 100))
def test_margin_mse_ignores_an_offset(shift):
    sp, sn, tp, tn = normal(4, 6)
    wanted = ((sp - sn) - (tp - tn)).square()
    assert_close(cat.margin_mse(sp, sn, tp, tn), wanted)
    assert_close(cat.margin_mse(sp, sn, tp + shift, tn + shift), wanted, rtol=1e-8, atol=1e-9)
    if abs(shift) > 1e-3:
        assert not torch.allclose((sp - tp - shift).square(), (sp - tp).square(), rtol=1e-7)


def test_gradient_cosine():
    x, y = f64([1.0, 2.0]).requires_grad_(), f64([3.0]).requires_grad_()
    assert cat.gradient_cosine(x.sum(), (-2 * x).sum(), [x]) == pytest.approx(-1.0)
    assert cat.gradient_cosine(x[0], x[1] + y[0], [x, y]) == pytest.approx(0.0)
    assert cat.gradient_cosine(x[0] + y[0], x[0] * 3, [x, y]) == pytest.approx(1 / math.sqrt(2))


def test_token_kls_add_up_to_the_sequences():
    """Chain rule on a 3-step Markov chain of 4 symbols: KL of the joint = sum over steps of E_p KL of the next token
    (what token-level DPO regularises, Zeng 2024)."""
    first, step = normal(2, 4, seed=5), normal(2, 3, 4, 4, seed=6)  # [teacher, student]
    joint = [
        f.log_softmax(0)[:, None, None, None] + s[0].log_softmax(1)[:, :, None, None]
        + s[1].log_softmax(1)[None, :, :, None] + s[2].log_softmax(1)[None, None]
        for f, s in zip(first, step, strict=True)
    ]
    whole = cat.logit_distillation(joint[1].reshape(1, -1), joint[0].reshape(1, -1))
    prefix, total = first[0].softmax(0), cat.logit_distillation(first[1:], first[:1]).sum()
    for teacher, student in zip(step[0], step[1], strict=True):
        total = total + (prefix * cat.logit_distillation(student, teacher)).sum()
        prefix = prefix @ teacher.softmax(1)
    assert_close(whole[0], total)
    assert float(whole) > 0.5


def test_chi_squared_punishes_leaving_the_data_harder_than_kl():
    """Two states, the second with teacher's mass d -> 0 and student's 0.1: chi^2(student || teacher), here "neyman",
    pushes back like 1/d and KL(student || teacher) like log 1/d (SequenceMatch's motive, Cundy 2023)."""
    student = f64([[0.9, 0.1]]).log().requires_grad_()
    pushes = []
    for d in (1e-2, 1e-3, 1e-4):
        teacher = f64([[1 - d, d]]).log()
        chi2, kl = (gradient(cat.logit_distillation(student, teacher, name).sum(), student)[0, 1]
                    for name in ("neyman", "reverse_kl"))
        q = 0.1
        assert float(kl) == pytest.approx(q * (1 - q) * math.log(q * (1 - d) / ((1 - q) * d)), rel=1e-9)
        assert float(chi2) == pytest.approx(2 * q * (1 - q) * (q / d - (1 - q) / (1 - d)), rel=1e-9)
        pushes.append(float(chi2 / 2 / kl))  # halved: equal curvature at q = p
    assert pushes[0] > 1
    assert pushes[1] > 5 * pushes[0]
    assert pushes[2] > 5 * pushes[1]


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda: cat.logit_distillation(normal(3), normal(3)), ValueError, "logits_student"),
    (lambda: cat.logit_distillation(normal(3, 4), normal(3, 5)), ValueError, "logits_teacher"),
    (lambda: cat.logit_distillation(torch.ones(3, 4, dtype=torch.int64), normal(3, 4)), TypeError, "logits_student"),
    (lambda: cat.logit_distillation(normal(3, 4), normal(3, 4) * math.nan), ValueError, "logits_teacher"),
    (lambda: cat.logit_distillation(normal(3, 4), normal(3, 4), "forwards_kl"), ValueError, "forward_kl"),
    (lambda: cat.logit_distillation(normal(3, 4), normal(3, 4), temperature=0.0), ValueError, "temperature"),
    (lambda: cat.balanced_kl(normal(3, 4), normal(3, 4), temperature=-1.0), ValueError, "temperature"),
    (lambda: cat.sinkhorn_distillation(normal(3, 4), normal(3, 4), epsilon=0.0), ValueError, "epsilon"),
    (lambda: cat.sinkhorn_distillation(normal(3, 4), normal(3, 4), iterations=0), ValueError, "iterations"),
    (lambda: cat.f_dpg_surrogate(normal(3), normal(4)), ValueError, "log_p"),
    (lambda: cat.f_dpo_loss(normal(3), normal(3), normal(3), normal(3, 1)), ValueError, "log_ref_l"),
    (lambda: cat.f_dpo_loss(normal(3), normal(3), normal(3), normal(3), beta=0.0), ValueError, "beta"),
    (lambda: cat.margin_mse(normal(3), normal(3), normal(3), normal(2)), ValueError, "teacher_neg"),
])
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
