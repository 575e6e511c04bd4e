"""The f-divergence table and its families, each column against autograd, quadrature and textbook formulas."""

import decimal
import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.special import lambertw
from scipy.stats import norm

from minidistill import divergences as dv
from minidistill.divergences import F, alpha_divergence, from_function, skew_jensen_shannon
from minidistill.divergences.f_divergences import _conjugate_by_bisection
from tests.helpers import f64, line, normal_log_prob

ALPHAS = [-1.0, 0.3, 0.5, 2.0, 3.0, 0.0, 1.0]
ROWS = {
    **F,
    **{f"alpha{a:g}": alpha_divergence(a) for a in ALPHAS},
    **{f"skew{b:g}": skew_jensen_shannon(b) for b in (0.2, 0.5)},
}


def skew(b):
    return lambda r: b * r * math.log(r) - (b * r + 1 - b) * math.log(b * r + 1 - b)


def alpha(a):
    if a in (0, 1):
        return (lambda r: -math.log(r)) if a == 0 else (lambda r: r * math.log(r))
    return lambda r: (r**a - a * r - (1 - a)) / (a * (a - 1))


#: f as the papers print it, for floats r > 0.
TEXTBOOK = {
    "reverse_kl": lambda r: -math.log(r),
    "forward_kl": lambda r: r * math.log(r),
    "jensen_shannon": lambda r: 0.5 * (r * math.log(r) - (r + 1) * math.log((r + 1) / 2)),
    "softened_reverse_kl": lambda r: (r + 1) * math.log((r + 1) / (2 * r)),
    "squared_hellinger": lambda r: (1 - math.sqrt(r)) ** 2,
    "jeffreys": lambda r: (r - 1) * math.log(r),
    "pearson": lambda r: (r - 1) ** 2,
    "neyman": lambda r: (r - 1) ** 2 / r,
    "le_cam": lambda r: (r - 1) ** 2 / (r + 1),
    **{f"alpha{a:g}": alpha(a) for a in ALPHAS},
    **{f"skew{b:g}": skew(b) for b in (0.2, 0.5)},
}
R = torch.logspace(-2.5, 2.5, 41, dtype=torch.float64)
each_row = pytest.mark.parametrize("name", ROWS)


def assert_close(a, b, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def textbook(name, values):
    return f64([TEXTBOOK[name](float(r)) for r in values])


@each_row
def test_f_is_the_textbooks_and_zero_at_one(name):
    assert_close(ROWS[name].f(R), textbook(name, R), rtol=1e-9, atol=1e-12)
    assert abs(float(ROWS[name].f(f64(1.0)))) < 1e-15


@each_row
def test_slope_and_curvature_are_autograds(name):
    row, r = ROWS[name], R.clone().requires_grad_(True)
    first = torch.autograd.grad(row.f(r).sum(), r, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), r)[0]
    assert_close(row.df(R), first.detach(), rtol=1e-8, atol=1e-9)
    assert_close(row.d2f(R), second, rtol=1e-7, atol=1e-9)


@each_row
def test_weight_is_r_squared_times_curvature_and_positive(name):
    row = ROWS[name]
    assert_close(row.weight(R), R.square() * row.d2f(R))
    assert (row.weight(R) > 0).all()


@each_row
def test_fenchel_young_is_tight_at_the_slope(name):
    """f*(f'(r)) = r f'(r) - f(r), in closed form and by bisection."""
    row, r = ROWS[name], torch.logspace(-1.5, 1.5, 25, dtype=torch.float64)
    u = row.df(r)
    wanted = r * u - row.f(r)
    assert_close(row.conjugate(u), wanted, rtol=1e-8, atol=1e-8)
    assert_close(_conjugate_by_bisection(row, u), wanted, rtol=1e-8, atol=1e-8)


@each_row
@settings(max_examples=40, deadline=None)
@given(u=st.floats(-8, 8), log_r=st.floats(-6, 6))
def test_fenchel_young_inequality(name, u, log_r):
    row, r = ROWS[name], f64(math.exp(log_r))
    bound = u * r - row.f(r)
    assert float(row.conjugate(f64(u))) >= float(bound) - 1e-9 * (1 + abs(float(bound)))


@each_row
def test_bisection_finds_the_closed_conjugate(name):
    row = ROWS[name]
    u = row.df(torch.logspace(-2, 2, 31, dtype=torch.float64))
    if row.dual is None:  # the supremum, searched for by scipy over log r
        wanted = f64([
            -minimize_scalar(lambda l, v=float(v): TEXTBOOK[name](math.exp(l)) - v * math.exp(l), bounds=(-8, 8),
                             method="bounded", options={"xatol": 1e-10}).fun for v in u
        ])
    else:
        wanted = row.conjugate(u)
    assert_close(_conjugate_by_bisection(row, u), wanted, rtol=1e-8, atol=1e-8)


def test_jeffreys_conjugate_is_lamberts():
    """f'(r) = u is 1/r = W(e^(1-u))."""
    u = torch.linspace(-3, 5, 17, dtype=torch.float64)
    r = f64([float(1 / lambertw(math.exp(1 - float(v))).real) for v in u])
    assert_close(F["jeffreys"].conjugate(u), u * r - (r - 1) * r.log(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "edge"), [
    ("reverse_kl", 0.0), ("jensen_shannon", math.log(2) / 2), ("softened_reverse_kl", 0.0),
    ("squared_hellinger", 1.0), ("neyman", 1.0), ("le_cam", 1.0), ("alpha0.3", 1 / 0.7),
    ("skew0.2", -0.2 * math.log(0.2)),
])
def test_conjugate_is_infinite_beyond_the_largest_slope(name, edge):
    edge = edge - math.log(2) if name == "softened_reverse_kl" else edge  # sup f' = -log 2 there
    assert torch.isinf(ROWS[name].conjugate(f64(edge + 0.01)))
    assert torch.isfinite(ROWS[name].conjugate(f64(edge - 0.01)))


@each_row
@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.9), (-0.8, 1.1)])
def test_between_is_scipys_integral(name, mean, std):
    """int q f(p / q) dx between two Gaussians whose chi^2-type integrals exist."""
    x, cell = line(-14, 14, 6001)
    got = ROWS[name].between(normal_log_prob(x, mean, std), normal_log_prob(x, 0.0, 1.0), cell)
    wanted = quad(lambda t: norm.pdf(t) * TEXTBOOK[name](norm.pdf(t, mean, std) / norm.pdf(t)), -14, 14,
                  epsabs=1e-12, epsrel=1e-10, limit=400)[0]
    assert float(got) == pytest.approx(wanted, rel=1e-7)


def gaussian_kl(m0, s0, m1, s1):
    return math.log(s1 / s0) + (s0**2 + (m0 - m1) ** 2) / (2 * s1**2) - 0.5


def test_kls_of_gaussians_in_closed_form():
    x, cell = line(-14, 14, 3001)
    log_p, log_q = normal_log_prob(x, 0.7, 0.8), normal_log_prob(x, -0.3, 1.2)
    forward, reverse = gaussian_kl(0.7, 0.8, -0.3, 1.2), gaussian_kl(-0.3, 1.2, 0.7, 0.8)
    assert float(F["forward_kl"].between(log_p, log_q, cell)) == pytest.approx(forward, rel=1e-10)
    assert float(F["reverse_kl"].between(log_p, log_q, cell)) == pytest.approx(reverse, rel=1e-10)
    assert float(F["jeffreys"].between(log_p, log_q, cell)) == pytest.approx(forward + reverse, rel=1e-10)


@each_row
def test_categorical_is_the_direct_sum(name):
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = logits.softmax(-1)
    wanted = torch.stack([(b * textbook(name, a / b)).sum() for a, b in zip(p, q, strict=True)])
    assert_close(ROWS[name].categorical(*logits), wanted, rtol=1e-9, atol=1e-12)
    assert (wanted > 0).all()
    assert_close(ROWS[name].categorical(logits[0], logits[0] + 3.0), torch.zeros(5, dtype=torch.float64), atol=1e-12)


@each_row
def test_categories_that_neither_holds_count_nothing(name):
    logits = f64([[0.2, -1.0, 0.4], [1.0, 0.3, -0.2]])
    padded = torch.cat([logits, torch.full((2, 1), -math.inf, dtype=torch.float64)], 1)
    assert_close(ROWS[name].categorical(*padded), ROWS[name].categorical(*logits))


#: lim f(r) at 0 (mass that only q holds) and lim f(r) / r at infinity (mass that only p holds).
ENDS = {
    "reverse_kl": (math.inf, 0.0), "forward_kl": (0.0, math.inf), "jensen_shannon": (math.log(2) / 2, math.log(2) / 2),
    "softened_reverse_kl": (math.inf, -math.log(2) + 0.0), "squared_hellinger": (1.0, 1.0),
    "jeffreys": (math.inf, math.inf), "pearson": (1.0, math.inf), "neyman": (math.inf, 1.0), "le_cam": (1.0, 1.0),
    "alpha-1": (math.inf, 0.5), "alpha2": (0.5, math.inf), "alpha0.5": (2.0, 2.0), "alpha3": (1 / 3, math.inf),
}


@pytest.mark.parametrize("name", ENDS)
def test_mass_that_only_one_side_holds(name):
    """-inf logits: D_f = q(empty) f(0) + sum over the shared categories, and likewise f(r) / r at infinity."""
    at_zero, at_infinity = ENDS[name]
    a, b = f64([0.0, 0.0, -math.inf]), f64([0.0, 0.0, 0.0])
    shared = 2 / 3 * TEXTBOOK[name](1.5)
    assert_close(ROWS[name].categorical(a, b), f64(shared + at_zero / 3))
    shared = TEXTBOOK[name](2 / 3)
    assert_close(ROWS[name].categorical(b, a), f64(shared + at_infinity / 3))


CUSTOM = {
    "reverse_kl": lambda r: -torch.log(r),
    "forward_kl": lambda r: r * torch.log(r),
    "squared_hellinger": lambda r: (1 - r.sqrt()) ** 2,
    "pearson": lambda r: (r - 1) ** 2,
    "le_cam": lambda r: (r - 1) ** 2 / (r + 1),
    "jeffreys": lambda r: (r - 1) * torch.log(r),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_from_function_equals_the_closed_row(name):
    row, custom = ROWS[name], from_function(CUSTOM[name])
    for method in ("f", "df", "d2f", "weight"):
        assert_close(getattr(custom, method)(R), getattr(row, method)(R), rtol=1e-8, atol=1e-9)
    u = row.df(torch.logspace(-1, 1, 9, dtype=torch.float64))
    assert_close(custom.conjugate(u), row.conjugate(u), rtol=1e-7, atol=1e-7)
    log_p, log_q = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    assert_close(custom.between(log_p, log_q), row.between(log_p, log_q), rtol=1e-9)


@pytest.mark.parametrize(("f", "message"), [
    (lambda r: torch.log(r), "negative or undefined at r = 0.001"),
    (lambda r: (r - 1) ** 2 + 0.1, "f\\(1\\) is 0.1; wanted 0"),
    (lambda r: r - 1, "straight line"),
    (lambda r: (r - 1) ** 3, "negative or undefined"),
])
def test_from_function_refuses_what_is_no_divergence(f, message):
    with pytest.raises(ValueError, match=message):
        from_function(f)


@pytest.mark.parametrize(("name", "flipped", "factor"), [
    ("reverse_kl", "forward_kl", 1), ("pearson", "neyman", 1), ("jeffreys", "jeffreys", 1),
    ("jensen_shannon", "jensen_shannon", 1), ("squared_hellinger", "squared_hellinger", 1), ("le_cam", "le_cam", 1),
    ("alpha0.5", "squared_hellinger", 2), ("alpha2", "pearson", 0.5), ("alpha-1", "neyman", 0.5),
    ("skew0.5", "jensen_shannon", 1),
])
def test_flips_and_multiples(name, flipped, factor):
    """f°(u) = u f(1/u) exchanges p and q; the last four are multiples of other rows."""
    if factor == 1 and not name.startswith("skew"):
        assert_close(R * ROWS[name].f(1 / R), ROWS[flipped].f(R), rtol=1e-9)
    else:
        assert_close(ROWS[name].f(R), factor * ROWS[flipped].f(R), rtol=1e-9, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 3))
def test_divergences_are_not_negative_and_swap_their_arguments(seed, scale):
    p, q = scale * torch.randn(2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for row in ROWS.values():
        assert float(row.categorical(p, q)) >= -1e-12
    assert_close(F["reverse_kl"].categorical(p, q), F["forward_kl"].categorical(q, p))
    assert_close(F["pearson"].categorical(p, q), F["neyman"].categorical(q, p), rtol=1e-8, atol=1e-10)
    assert float(F["jensen_shannon"].categorical(p, q)) <= math.log(2)


@pytest.mark.parametrize(("b", "limit"), [(1e-5, "forward_kl"), (1 - 1e-5, "reverse_kl")])
def test_skew_family_tends_to_the_kls(b, limit):
    p, q = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = skew_jensen_shannon(b).categorical(p, q) / (b * (1 - b))
    assert_close(got, F[limit].categorical(p, q), rtol=1e-3)


@pytest.mark.parametrize("a", [1e-5, 1 - 1e-5])
def test_alpha_family_is_continuous_at_its_kls(a):
    p, q = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(alpha_divergence(a).categorical(p, q), alpha_divergence(round(a)).categorical(p, q), rtol=1e-4)


@each_row
@pytest.mark.parametrize("log_r", [-80.0, 80.0])
def test_float32_survives_extreme_ratios(name, log_r):
    """log h is right to float32's precision at ratios of e^{+-80}; h is finite wherever float32 can hold it."""
    row, l = ROWS[name], torch.tensor(log_r)
    log_weight, exact = row.log_weight(l), float(row.log_weight(f64(log_r)))
    assert float(log_weight) == pytest.approx(exact, rel=1e-5, abs=1e-5)
    if abs(exact) < 88:
        direction = row.direction(torch.ones(1, 2), torch.zeros(1, 2), l[None])
        assert torch.isfinite(direction).all()


def test_direction_is_the_weighted_score_gap():
    p, q = torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    l = f64([-1.0, 0.0, 0.5, 2.0])
    assert_close(F["pearson"].direction(p, q, l), 2 * torch.exp(2 * l)[:, None, None] * (p - q))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: F["pearson"].f(f64([1.0, -0.5])), "r holds -0.5"),
    (lambda: F["pearson"].weight(f64([-2.0])), "r holds -2"),
    (lambda: F["pearson"].between(torch.zeros(3), torch.zeros(4)), r"log_p has shape \(3,\) and log_q \(4,\)"),
    (lambda: F["pearson"].categorical(torch.zeros(3), torch.zeros(4)), "logits_p"),
    (lambda: F["pearson"].direction(torch.zeros(3, 2), torch.zeros(3, 3), torch.zeros(3)), "score_p"),
    (lambda: alpha_divergence(math.nan), "a=nan"),
    (lambda: skew_jensen_shannon(1.0), "b=1.0"),
    (lambda: skew_jensen_shannon(0.0), "b=0.0"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@each_row
def test_cost_is_the_conjugate_at_the_slope(name):
    """f*(f'(r)) = r f'(r) - f(r), as a function of log r, from f as printed."""
    row, l = ROWS[name], torch.linspace(-3, 3, 25, dtype=torch.float64)
    assert_close(row.cost(l), l.exp() * row.df(l.exp()) - textbook(name, l.exp()), rtol=1e-9, atol=1e-9)
    assert_close(row.cost(l), row.conjugate(row.slope(l)), rtol=1e-8, atol=1e-8)


@each_row
def test_flipped_is_u_f_of_one_over_u(name):
    """f°(u) = u f(1/u) with both derivatives by autograd, h°(u) = u h(1/u), and the arguments exchanged."""
    row, flip, u = ROWS[name], ROWS[name].flipped(), R.clone().requires_grad_(True)
    value = u * row.f(1 / u)
    first = torch.autograd.grad(value.sum(), u, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), u)[0]
    assert_close(flip.f(R), value.detach(), rtol=1e-9, atol=1e-11)
    assert_close(flip.df(R), first.detach(), rtol=1e-8, atol=1e-8)
    assert_close(flip.d2f(R), second, rtol=1e-6, atol=1e-8)
    assert_close(flip.weight(R), R * row.weight(1 / R))
    assert_close(flip.cost(R.log()), R * flip.df(R) - flip.f(R), rtol=1e-8, atol=1e-8)
    log_p, log_q = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    assert_close(flip.between(log_q, log_p), row.between(log_p, log_q))
    assert_close(flip.flipped().slope(R.log()), row.slope(R.log()))
    v = flip.df(torch.logspace(-1, 1, 9, dtype=torch.float64))
    assert_close(flip.conjugate(v), flip.cost(torch.linspace(-1, 1, 9, dtype=torch.float64) * math.log(10)), rtol=1e-7,
                 atol=1e-7)


@each_row
def test_weight_against_finite_differences(name):
    """h(r) = r^2 f''(r) by second differences of the textbook's f: no autograd, no derivative of ours."""
    r, step = torch.logspace(-1, 1, 15, dtype=torch.float64), 1e-3
    f = [textbook(name, r * (1 + k * step)) for k in (-2, -1, 0, 1, 2)]
    second = (-f[0] + 16 * f[1] - 30 * f[2] + 16 * f[3] - f[4]) / (12 * step**2)  # times r^2; error of order step^4
    assert_close(ROWS[name].weight(r), second, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ENDS)
def test_limits_and_bound(name):
    row, (at_zero, at_infinity) = ROWS[name], ENDS[name]
    assert row.at_zero == pytest.approx(at_zero)
    assert row.at_infinity == pytest.approx(at_infinity)
    assert row.bound == pytest.approx(at_zero + at_infinity)
    flip = row.flipped()
    assert (flip.at_zero, flip.at_infinity) == (row.at_infinity, row.at_zero)


@pytest.mark.parametrize(("name", "bound"), [
    ("jensen_shannon", math.log(2)), ("squared_hellinger", 2.0), ("le_cam", 2.0), ("alpha0.5", 4.0),
    ("skew0.2", -0.2 * math.log(0.2) - 0.8 * math.log(0.8)),
])
def test_bounded_divergences_reach_their_bound_and_no_more(name, bound):
    assert ROWS[name].bound == pytest.approx(bound)
    x, cell = line(-30, 40, 7001)
    near, far = (float(ROWS[name].between(normal_log_prob(x, m, 1.0), normal_log_prob(x, 0.0, 1.0), cell))
                 for m in (1.0, 12.0))
    assert near < far <= bound * (1 + 1e-12)
    assert far == pytest.approx(bound, rel=1e-3)


def test_total_variation():
    """The largest difference of probabilities; in [0, 1]; Fenchel-Young with f* = max(u, -1/2) up to u = 1/2."""
    tv = dv.total_variation
    x, cell = line(-14, 14, 40001)
    got = tv.between(normal_log_prob(x, 1.0, 1.0), normal_log_prob(x, 0.0, 1.0), cell)
    assert float(got) == pytest.approx(2 * norm.cdf(0.5) - 1, rel=1e-6)  # p > q beyond the middle
    assert (tv.at_zero, tv.at_infinity, tv.bound) == (0.5, 0.5, 1.0)
    r = f64([0.2, 0.9, 1.1, 4.0])
    assert_close(tv.f(r), (r - 1).abs() / 2)
    assert_close(tv.df(r), f64([-0.5, -0.5, 0.5, 0.5]))
    assert_close(tv.conjugate(tv.df(r)), r * tv.df(r) - tv.f(r))
    assert_close(tv.cost(r.log()), tv.conjugate(tv.df(r)))
    assert_close(tv.conjugate(f64([-2.0, 0.3, 0.6])), f64([-0.5, 0.3, math.inf]))
    assert_close(tv.weight(r), torch.zeros(4, dtype=torch.float64))
    assert "total_variation" not in F


@pytest.mark.parametrize("name", [*ROWS, "total_variation", "custom"])
@pytest.mark.parametrize("log_r", [-80.0, 80.0])
def test_float32_columns_are_right_at_extreme_ratios(name, log_r):
    """q f(p/q), f' and f*(f') at ratios of e^{+-80}: float64's value wherever float32 can hold
    it, infinity where it cannot, nan nowhere."""
    row = {**ROWS, "total_variation": dv.total_variation, "custom": from_function(CUSTOM["jeffreys"])}[name]
    for column, arguments in (
        (row.perspective, (min(log_r, 0.0), min(-log_r, 0.0))),  # the larger density is 1
        (row.perspective, (log_r, 0.0)), (row.slope, (log_r,)), (row.cost, (log_r,)),
    ):
        exact = float(column(*map(f64, arguments)))
        got = float(column(*(torch.tensor(a) for a in arguments)))
        wanted = exact if abs(exact) < 1e38 else math.copysign(math.inf, exact)
        assert got == pytest.approx(wanted, rel=2e-5, abs=1e-30)


@pytest.mark.parametrize("near", [0.0, 1.0])
@pytest.mark.parametrize("distance", [1e-9, -1e-7, 1e-6, -1e-4, 0.01, 0.09, -0.11])
def test_alpha_next_to_a_kl_keeps_its_digits_in_float32(near, distance):
    """Columns at r = e^-3 to e^3 against 50 digits of (r^a - a r - (1 - a)) / (a (a - 1)) and its derivatives."""
    a = near + distance
    l = torch.tensor([-3.0, -1.0, 0.5, 3.0])
    row, zero = alpha_divergence(a), torch.zeros(4)
    with decimal.localcontext(decimal.Context(50)):
        b = Decimal(a)
        r = [Decimal(each).exp() for each in l.tolist()]
        f = [float((x**b - b * x - (1 - b)) / (b * (b - 1))) for x in r]
        slope = [float((x ** (b - 1) - 1) / (b - 1)) for x in r]
        cost = [float((x**b - 1) / b) for x in r]
        u = torch.tensor([-2.0, -0.5, 0.3, 0.6])
        dual = [float(((1 + (b - 1) * Decimal(v)) ** (b / (b - 1)) - 1) / b) for v in u.tolist()]
    for got, wanted in ((row.perspective(l, zero), f), (row.slope(l), slope), (row.cost(l), cost),
                        (row.conjugate(u), dual)):
        torch.testing.assert_close(got, torch.tensor(wanted), rtol=2e-5, atol=0)
    scaled = row.perspective(l - 2, zero - 2) * math.exp(2)  # q f(p / q) with q not 1
    torch.testing.assert_close(scaled, torch.tensor(f), rtol=2e-5, atol=0)


@pytest.mark.parametrize("a", [-0.05, 0.05, 0.95, 1.05])
def test_alpha_next_to_a_kl_at_the_ends(a):
    """Mass that one side alone holds costs 1 / a or 1 / (1 - a), infinity for a negative one; no gradient is NaN."""
    row = alpha_divergence(a)
    assert row.at_zero == pytest.approx(1 / a if a > 0 else math.inf)
    assert row.at_infinity == pytest.approx(1 / (1 - a) if a < 1 else math.inf)
    log_p = f64([-math.inf, -math.inf, 0.0, -800.0]).requires_grad_()
    log_q = f64([-math.inf, 0.0, -1.0, 0.0])
    value = row.perspective(log_p, log_q)
    assert_close(value[[0, 1, 3]].detach(), f64([0.0, row.at_zero, 1 / a if a > 0 else float(value[3].detach())]))
    if a > 0:
        assert torch.isfinite(torch.autograd.grad(value.sum(), log_p)[0]).all()


@pytest.mark.parametrize("name", ["pearson", "neyman"])
def test_chi_squared_of_neighbours_keeps_its_digits_in_float32(name):
    """Expanding (r - 1)^2 would leave nothing: at r = 1.001 it subtracts numbers near 1 to get 1e-6."""
    assert float(F[name].f(torch.tensor(1.001))) == pytest.approx(1e-6, rel=2e-3)


@pytest.mark.parametrize(("f", "at_zero", "at_infinity"), [
    (lambda r: -torch.log(r), math.inf, 0.0), (lambda r: r * torch.log(r), 0.0, math.inf),
    (lambda r: (r - 1) ** 2, 1.0, math.inf), (lambda r: (r - 1) ** 2 / (r + 1), 1.0, 1.0),
    (lambda r: (1 - r.sqrt()) ** 2, 1.0, 1.0), (lambda r: (r - 1) * torch.log(r), math.inf, math.inf),
    (lambda r: (r - 1) ** 4 / (r + 1) ** 3, 1.0, 1.0),  # overflows at the farthest look
])
def test_from_function_finds_its_limits(f, at_zero, at_infinity):
    """Also where f itself says nan there, 0 log 0; and -inf logits count as they do in the closed rows."""
    custom = from_function(f)
    assert custom.at_zero == pytest.approx(at_zero, abs=1e-8)
    assert custom.at_infinity == pytest.approx(at_infinity, abs=1e-8)
    a, b = f64([0.0, 0.0, -math.inf, -math.inf]), f64([0.0, 0.0, 0.0, -math.inf])
    assert float(custom.categorical(a, b)) == pytest.approx(2 / 3 * float(f(f64(1.5))) + at_zero / 3)
    assert float(custom.categorical(b, a)) == pytest.approx(float(f(f64(2 / 3))) + at_infinity / 3)


def test_from_function_takes_the_limits_that_are_given():
    slow = from_function(lambda r: alpha_divergence(0.99).f(r), at_zero=1 / 0.99, at_infinity=100.0)
    assert slow.bound == pytest.approx(alpha_divergence(0.99).bound)


def test_from_function_passes_gradients():
    """The objective's direction is differentiable in the ratio, as a closed row's is."""
    l = f64([-1.0, 0.3, 2.0]).requires_grad_(True)
    custom, row = from_function(CUSTOM["pearson"]), F["pearson"]
    for column in ("slope", "log_weight", "cost"):
        got, wanted = (torch.autograd.grad(getattr(d, column)(l).sum(), l)[0] for d in (custom, row))
        assert_close(got, wanted, rtol=1e-9)


@pytest.mark.parametrize("name", F)
def test_classes_masked_on_both_sides_have_gradient_zero(name):
    logits_p, logits_q = f64([[1, 2, -math.inf]]), f64([[0, 0.5, -math.inf]]).requires_grad_()
    masked = F[name].categorical(logits_p, logits_q)
    free = f64([[0, 0.5]]).requires_grad_()
    wanted = F[name].categorical(logits_p[:, :2], free)
    torch.testing.assert_close(masked, wanted)
    gradients = [torch.autograd.grad(value.sum(), leaf)[0] for value, leaf in ((masked, logits_q), (wanted, free))]
    torch.testing.assert_close(gradients[0][:, :2], gradients[1])
    assert gradients[0][0, 2] == 0
