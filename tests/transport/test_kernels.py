"""MMD, energy, CRPS and Stein discrepancies against scikit-learn, scipy, quadrature and direct loops."""

import itertools
import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import energy_distance as scipy_energy
from sklearn.gaussian_process.kernels import RBF, RationalQuadratic
from torch.autograd import gradcheck

from minidistill.distributions import GaussianMixture
from minidistill.transport import (
    KERNELS,
    _pairs,
    almost_fair_crps,
    crps,
    energy_distance,
    energy_score,
    kernel_stein_discrepancy,
    median_bandwidth,
    mmd,
    rational_quadratic,
    truncated_kernel_stein_discrepancy,
)
from tests.helpers import normal, rng

X, Y, H = normal(13, 3), 0.7 * normal(9, 3, seed=1) + 0.4, 1.3
SKLEARN = {
    "gaussian": RBF(H), "rational_quadratic": RationalQuadratic(H, 1.0),
    "inverse_multiquadric": RationalQuadratic(H, 0.5), "imq": RationalQuadratic(H, 0.5),
}


def matrix(kernel, a, b):
    return torch.as_tensor(SKLEARN[kernel](a.numpy(), b.numpy()))


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_with_scikit_learns_kernels(kernel, chunk):
    xx, yy, xy = matrix(kernel, X, X), matrix(kernel, Y, Y), matrix(kernel, X, Y)
    biased = xx.mean() + yy.mean() - 2 * xy.mean()
    unbiased = (xx.sum() - 13) / (13 * 12) + (yy.sum() - 9) / (9 * 8) - 2 * xy.mean()
    linear = sum(xx[i, i + 1] + yy[i, i + 1] - xy[i, i + 1] - xy[i + 1, i] for i in (0, 2, 4, 6)) / 4
    for estimator, wanted in (("biased", biased), ("unbiased", unbiased), ("linear", linear)):
        got = mmd(X, Y, kernel, H, estimator, chunk)
        assert float(got) == pytest.approx(float(wanted), rel=1e-10)


def test_unbiased_mmd_has_the_mean_of_the_population():
    """Over all subsets of 3 from 5 points each, the unbiased estimate averages to the one of all 5."""
    x, y = X[:5], Y[:5]
    subsets = [list(s) for s in itertools.combinations(range(5), 3)]
    mean = sum(float(mmd(x[i], y[j], bandwidth=H)) for i in subsets for j in subsets) / len(subsets) ** 2
    assert mean == pytest.approx(float(mmd(x, y, bandwidth=H)), rel=1e-10)


def test_mmd_of_gaussians_in_closed_form():
    """E k = (1 + 2 s^2 / h^2)^(-d/2) exp(-|shift|^2 / 2 (h^2 + 2 s^2)); its standard error is below 2 / sqrt(n)."""
    n, shift = 3000, 1.0
    x, y = normal(n, 2), normal(n, 2, seed=1) + f64_pair(shift)
    total = H**2 + 2
    wanted = 2 * H**2 / total * (1 - math.exp(-(shift**2) / (2 * total)))
    assert abs(float(mmd(x, y, bandwidth=H)) - wanted) < 2 * 2 * math.sqrt(wanted / n)


def f64_pair(shift):
    return torch.tensor([shift, 0.0], dtype=torch.float64)


def test_several_bandwidths_and_own_kernels():
    mean = (mmd(X, Y, bandwidth=0.5) + mmd(X, Y, bandwidth=2.0)) / 2
    assert float(mmd(X, Y, bandwidth=[0.5, 2.0])) == pytest.approx(float(mean), rel=1e-12)
    wide = mmd(X, Y, rational_quadratic(1e9), H)
    assert float(wide) == pytest.approx(float(mmd(X, Y, "gaussian", H)), rel=1e-6)


def test_median_bandwidth():
    points = torch.tensor([[0.0], [1.0], [3.0]])  # distances 1, 2, 3
    assert median_bandwidth(points) == pytest.approx(2)
    assert median_bandwidth(points[:1], points[1:]) == pytest.approx(2)
    assert median_bandwidth(torch.zeros(3, 2)) == 1
    assert median_bandwidth(torch.zeros(1, 2)) == 1
    assert float(mmd(X, Y)) == pytest.approx(float(mmd(X, Y, bandwidth=median_bandwidth(X, Y))), rel=1e-12)
    large = normal(5000, 2)
    assert median_bandwidth(large) == pytest.approx(2 * math.sqrt(math.log(2)), rel=0.05)  # |x - y|^2 / 4 ~ Exp(1)


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_derivatives(name):
    s = torch.linspace(0, 5, 21, dtype=torch.float64).requires_grad_(True)
    kernel = KERNELS[name]
    value = kernel.value(s)
    slope = torch.autograd.grad(value.sum(), s, create_graph=True)[0]
    curvature = torch.autograd.grad(slope.sum(), s)[0]
    assert float(value[0].detach()) == 1
    torch.testing.assert_close(kernel.slope(s), slope)
    torch.testing.assert_close(kernel.curvature(s), curvature)


@pytest.mark.parametrize("chunk", [None, 5])
def test_energy_distance_is_scipys_square(chunk):
    x, y = X[:, :1], Y[:, :1]
    wanted = scipy_energy(x.flatten(), y.flatten()) ** 2
    assert float(energy_distance(x, y, chunk=chunk)) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_energy_distance_by_a_direct_loop(alpha):
    def mean(a, b, others=False):
        powers = [[float((u - v).norm() ** alpha) for v in b] for u in a]  # 0 on the diagonal of (x, x)
        return sum(map(sum, powers)) / (len(a) * (len(b) - others))

    for estimator, others in (("biased", False), ("unbiased", True)):
        wanted = 2 * mean(X, Y) - mean(X, X, others) - mean(Y, Y, others)
        got = energy_distance(X.reshape(13, 3, 1), Y.reshape(9, 3, 1), alpha, estimator, 4)
        assert float(got) == pytest.approx(wanted, rel=1e-10)
    assert float(energy_distance(X, X, alpha)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("alpha", "tau"), [(1.0, 1.0), (1.3, 0.99), (2.0, 0.0)])
def test_energy_score_by_a_direct_loop(alpha, tau, monkeypatch):
    samples, y = normal(4, 6, 2, 3), normal(6, 2, 3, seed=1)
    wanted = []
    for i in range(6):
        near = sum(float((s[i] - y[i]).norm() ** alpha) for s in samples) / 4
        apart = sum(float((s[i] - t[i]).norm() ** alpha) for s in samples for t in samples) / 12
        wanted.append(near - tau / 2 * apart)
    monkeypatch.setattr(_pairs, "ENTRIES", 32)  # two observations at a time
    torch.testing.assert_close(energy_score(samples, y, alpha, tau), torch.tensor(wanted, dtype=torch.float64))


def test_energy_score_in_one_dimension_is_the_fair_crps():
    samples, y = normal(5, 7, 1), normal(7, 1, seed=1)
    torch.testing.assert_close(energy_score(samples, y), almost_fair_crps(samples, y, alpha=1.0)[:, 0])


def test_crps_is_the_integral_over_distribution_functions():
    members, y = normal(6, 3), normal(3, seed=1)
    for column in range(3):
        e, t = members[:, column], float(y[column])

        def integrand(z, e=e, t=t):
            return (float((e <= z).double().mean()) - (t <= z)) ** 2

        cuts = sorted([*e.tolist(), t])
        wanted = sum(quad(integrand, a, b)[0] for a, b in itertools.pairwise(cuts))
        assert float(crps(members, y)[column]) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.95, 1.0])
def test_almost_fair_crps_as_printed(alpha):
    members, y = normal(5, 4), normal(4, seed=1)
    e = (1 - alpha) / 5
    pairs = (members[:, None] - members[None]).abs().sum((0, 1))
    wanted = (members - y).abs().mean(0) - (1 - e) / (2 * 5 * 4) * pairs
    torch.testing.assert_close(almost_fair_crps(members, y, alpha), wanted)
    if alpha == 0:
        torch.testing.assert_close(crps(members, y), wanted)


def test_fairness_takes_the_ensembles_size_out_of_the_mean():
    """For members and observation from N(0, 1), E CRPS = (1 + 1/m) / sqrt(pi), fair: 1 / sqrt(pi); the standard error
    of the mean over n is at most 1 / sqrt(n)."""
    n, limit = 40_000, 1 / math.sqrt(math.pi)
    y = normal(n)
    for m in (2, 10):
        members = normal(m, n, seed=m)
        assert abs(float(crps(members, y).mean()) - limit * (1 + 1 / m)) < 4 / math.sqrt(n)
        assert abs(float(almost_fair_crps(members, y, 1.0).mean()) - limit) < 4 / math.sqrt(n)
        almost = float(almost_fair_crps(members, y).mean())
        assert abs(almost - limit * (1 + 0.05 / m)) < 4 / math.sqrt(n)


def target_score(x):
    return -x + 0.3 * torch.sin(x.flip(1))


def direct_stein(x, score, kernel, h, boundary=None, jitter=0.0):
    """u(x_i, x_j) by automatic differentiation of the kernel, and of the boundary's correction."""
    k = KERNELS[kernel].value
    d = x.shape[1]

    def value(a, b):
        return k((a - b).square().sum() / h**2)

    def features(a):  # (d, m)
        return torch.stack([torch.autograd.functional.jacobian(lambda t, z=z: value(t, z), a) + score(a[None])[0]
                            * value(a, z) for z in boundary], 1)

    out = torch.zeros(len(x), len(x), dtype=x.dtype)
    gram = boundary is not None and torch.stack([torch.stack([value(a, b) for b in boundary]) for a in boundary])
    for i, a in enumerate(x):
        for j, b in enumerate(x):
            sa, sb = score(a[None])[0], score(b[None])[0]
            full = torch.autograd.functional.hessian(value, (a, b))
            ga, gb = torch.autograd.functional.jacobian(value, (a, b))
            out[i, j] = sa @ sb * value(a, b) + sa @ gb + sb @ ga + full[0][1].trace()
            if boundary is not None:
                inverse = torch.linalg.inv(gram + jitter * torch.eye(len(boundary), dtype=x.dtype))
                out[i, j] -= sum(features(a)[l] @ inverse @ features(b)[l] for l in range(d))
    return {"v": out.mean(), "u": (out.sum() - out.trace()) / (len(x) * (len(x) - 1))}


@pytest.mark.parametrize("kernel", ["imq", "gaussian", "rational_quadratic"])
def test_stein_discrepancy_by_a_direct_loop(kernel):
    x = X[:6]
    wanted = direct_stein(x, target_score, kernel, H)
    for estimator, chunk in itertools.product("uv", (None, 4)):
        got = kernel_stein_discrepancy(x, target_score, kernel, H, estimator, chunk)
        assert float(got) == pytest.approx(float(wanted[estimator]), rel=1e-9)
        given = kernel_stein_discrepancy(x.reshape(6, 1, 3), target_score(x).reshape(6, 1, 3), kernel, H, estimator)
        assert float(given) == pytest.approx(float(got), rel=1e-12)


@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_truncated_stein_discrepancy_by_a_direct_loop(kernel):
    x, boundary = X[:4], 2 * normal(5, 3, seed=3)
    wanted = direct_stein(x, target_score, kernel, H, boundary, 1e-3)
    for estimator, chunk in itertools.product("uv", (None, 3)):
        got = truncated_kernel_stein_discrepancy(x, target_score, boundary, kernel, H, estimator, chunk=chunk)
        assert float(got) == pytest.approx(float(wanted[estimator]), rel=1e-8)


def test_only_the_truncated_one_vanishes_on_a_truncated_density():
    """Samples are the 2,000 midpoint quantiles of N(0.5, 1) on [0, 2]: means over them are integrals to 1 / n^2."""
    law = torch.distributions.Normal(torch.tensor(0.5, dtype=torch.float64), 1.0)
    low, high = law.cdf(torch.tensor([0.0, 2.0], dtype=torch.float64))
    share = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    x = law.icdf(low + share * (high - low)).unsqueeze(1)
    edge = torch.tensor([[0.0], [2.0]], dtype=torch.float64)

    def both(mean):
        def score(x):
            return mean - x

        options = {"kernel": "gaussian", "bandwidth": 0.7, "estimator": "v"}
        return (float(kernel_stein_discrepancy(x, score, **options)),
                float(truncated_kernel_stein_discrepancy(x, score, edge, jitter=1e-12, **options)))

    plain, truncated = both(0.5)
    assert plain > 0.05
    assert abs(truncated) < 1e-5
    assert both(0.9)[1] > 1e-3
    assert both(0.1)[1] > 1e-3


def test_stein_discrepancy_of_exact_samples_and_its_blind_spot():
    """V-statistics: 2,000 exact samples are near 0 (their mean is E u(x, x) / n), a shift is not, wrong weights are."""
    law = GaussianMixture(torch.tensor([[-6.0], [6.0]], dtype=torch.float64), 1.0)
    x = law.sample(2000, rng())
    exact = float(kernel_stein_discrepancy(x, law.score, bandwidth=1.0, estimator="v"))
    moved = float(kernel_stein_discrepancy(x + 0.3, law.score, bandwidth=1.0, estimator="v"))
    one_mode = float(kernel_stein_discrepancy(x[x[:, 0] > 0], law.score, bandwidth=1.0, estimator="v"))
    assert exact < 5e-3
    assert moved > 10 * exact
    assert one_mode < 3 * exact  # half of the mass is missing, and the score does not say


EACH = {
    "mmd": lambda x, y: mmd(x, y, bandwidth=H),
    "mmd, blocks": lambda x, y: mmd(x, y, "imq", H, chunk=2),
    "mmd, linear": lambda x, y: mmd(x, y, "rational_quadratic", H, "linear"),
    "energy": lambda x, y: energy_distance(x, y, chunk=2),
    "energy, 1.5": lambda x, y: energy_distance(x, y, 1.5, "unbiased"),
    "energy score": lambda x, y: energy_score(torch.stack([x, 2 * x, y]), y - 1).sum(),
    "crps": lambda x, y: (crps(x, y[0]) + almost_fair_crps(x, y[0])).sum(),
    "stein": lambda x, y: kernel_stein_discrepancy(x, target_score, "imq", H, chunk=2),
    "truncated": lambda x, y: truncated_kernel_stein_discrepancy(x, target_score, y, bandwidth=H, chunk=2),
}


@pytest.mark.parametrize("name", EACH)
def test_gradients(name):
    x, y = X[:4].clone().requires_grad_(True), Y[:4].clone().requires_grad_(True)
    assert gradcheck(EACH[name], (x, y))


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("name", ["mmd", "energy", "crps", "score", "stein"])
def test_float32_extremes_are_finite(name, scale):
    """Very small and large data, duplicates, an outlier; values and gradients."""
    x, y = X[:8].float(), Y[:8].float()
    x[3], x[4] = x[2], 1e4
    x, y = (x * scale).requires_grad_(True), y * scale
    value = {
        "mmd": lambda: mmd(x, y) + mmd(x, x.detach(), "imq") + mmd(x, y, bandwidth=1e-6),
        "energy": lambda: energy_distance(x, y) + energy_distance(x, x.detach(), 0.5),
        "crps": lambda: crps(x, y[0]).sum() + almost_fair_crps(x, x[0].detach()).sum(),
        "score": lambda: energy_score(torch.stack([x, x, y]), x.detach()).sum(),
        "stein": lambda: kernel_stein_discrepancy(x, lambda x: -x / scale**2) * scale**2,
    }[name]()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert torch.autograd.grad(value, x)[0].isfinite().all()


def test_float32_keeps_small_distances_far_from_the_origin():
    x, y = X.float() + 1000, Y.float() + 1000
    wanted = float(mmd(x.double(), y.double(), bandwidth=H))
    assert float(mmd(x, y, bandwidth=H)) == pytest.approx(wanted, rel=1e-3)
    spread = torch.cat([X, X + 1e4]).float()  # two clusters, one bandwidth
    wanted = float(mmd(spread.double(), spread[:13].double(), bandwidth=H))
    assert float(mmd(spread, spread[:13], bandwidth=H)) == pytest.approx(wanted, rel=1e-3)


X32 = torch.zeros(4, 2)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: mmd(X32, X32, "gauss"), ValueError, "kernel='gauss' is not known; did you mean 'gaussian'"),
    (lambda: mmd(X32, X32, estimator="u"), ValueError, "estimator='u' is not known"),
    (lambda: mmd(X32, X32, bandwidth=0.0), ValueError, "bandwidth=0.0"),
    (lambda: mmd(X32, X32, bandwidth=[]), ValueError, "bandwidth is empty"),
    (lambda: mmd(X32, X32[:1]), ValueError, "y has 1 samples; wanted at least 2"),
    (lambda: mmd(X32, X32, chunk=0), ValueError, "chunk=0"),
    (lambda: energy_distance(X32, X32, alpha=2.0), ValueError, "alpha=2.0"),
    (lambda: energy_distance(X32, X32, estimator="linear"), ValueError, "estimator='linear'"),
    (lambda: energy_score(X32, X32), ValueError, r"samples has shape \(4, 2\); wanted \(m, \*\(4, 2\)\)"),
    (lambda: energy_score(X32[None], X32), ValueError, "m >= 2"),
    (lambda: crps(X32, X32), ValueError, r"ensemble has shape \(4, 2\); wanted \(m, \*\(4, 2\)\)"),
    (lambda: crps(X32.long(), X32[0]), TypeError, "ensemble is"),
    (lambda: almost_fair_crps(X32, X32[0], alpha=1.1), ValueError, "alpha=1.1"),
    (lambda: kernel_stein_discrepancy(X32, X32[:2]), ValueError, "score has 2 rows; wanted 4"),
    (lambda: kernel_stein_discrepancy(X32, X32, estimator="w"), ValueError, "estimator='w'"),
    (lambda: kernel_stein_discrepancy(X32, lambda x: x / 0), ValueError, "score holds a NaN"),
    (lambda: truncated_kernel_stein_discrepancy(X32, X32, X32[:, :1]), ValueError, "boundary has shape"),
    (lambda: truncated_kernel_stein_discrepancy(X32, X32, X32, jitter=0.0), ValueError, "jitter=0.0"),
    (lambda: rational_quadratic(0.0), ValueError, "alpha=0.0"),
])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


