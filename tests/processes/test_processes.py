"""Forward processes: alpha, sigma and all that follows from them, by hand, by simulation and by quadrature."""

import itertools
import math

import pytest
import torch

from minidistill.distributions import GaussianMixture, ring
from minidistill.processes import (
    PROCESSES,
    Process,
    cosine,
    ddpm,
    edm,
    flow,
    iadb,
    interpolant,
    prior_kl,
    sub_vp,
    ve,
    vp,
)
from tests.helpers import MANY, assert_close, f64, line, mixture_1d, mixture_2d, normal, rng, times

TIMES = torch.linspace(0.01, 1.0, 25, dtype=torch.float64)
BETA = (0.1, 20.0)


def test_vp_preserves_variance_at_all_times():
    p = vp()
    assert_close(p.alpha(TIMES).square() + p.sigma(TIMES).square(), torch.ones_like(TIMES))


@pytest.mark.parametrize("beta", [BETA, (1.0, 5.0)])
def test_vp_drift_and_diffusion_are_songs(beta):
    """dx = -beta/2 x dt + sqrt(beta) dW (Song 2021, equation 11)."""
    p = vp(*beta)
    rate = beta[0] + (beta[1] - beta[0]) * TIMES
    assert_close(p.drift(TIMES), -rate / 2)
    assert_close(p.diffusion(TIMES), rate.sqrt())


def test_vp_alpha_is_the_exponential_of_the_integrated_rate():
    p, n = vp(), 200_001
    t = torch.linspace(0, 0.7, n, dtype=torch.float64)
    integral = torch.trapezoid(BETA[0] + (BETA[1] - BETA[0]) * t, t)
    assert_close(p.alpha(f64(0.7)), torch.exp(-integral / 2))


def test_edm_is_the_identity():
    p = edm()
    t = TIMES * 10
    assert_close(p.alpha(t), torch.ones_like(t))
    assert_close(p.sigma(t), t)
    assert_close(p.drift(t), torch.zeros_like(t))
    assert_close(p.diffusion(t), (2 * t).sqrt())  # g^2 = d sigma^2 / dt


def by_hand(name, t):
    """alpha, sigma, alpha', sigma' and g^2 of the usual processes, differentiated on paper."""
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    rate, integral = BETA[0] + (BETA[1] - BETA[0]) * t, BETA[0] * t + (BETA[1] - BETA[0]) * t**2 / 2
    alpha, noise = torch.exp(-integral / 2), -torch.expm1(-integral)
    if name == "edm":
        return one, t, zero, one, 2 * t
    if name == "ve":
        sigma, log_ratio = 0.01 * 5000**t, math.log(5000)
        return one, sigma, zero, sigma * log_ratio, 2 * log_ratio * sigma**2
    if name == "vp":
        return alpha, noise.sqrt(), -rate / 2 * alpha, rate / 2 * alpha**2 / noise.sqrt(), rate
    if name == "sub_vp":  # g^2 is equation 12's
        return alpha, noise, -rate / 2 * alpha, rate * alpha**2, rate * (1 - torch.exp(-2 * integral))
    if name == "cosine":
        unit = math.pi / 2 / 1.008
        h, start = unit * (t + 0.008), math.cos(unit * 0.008)
        alpha, fall = h.cos() / start, -unit * h.sin() / start
        sigma = (1 - alpha**2).sqrt()
        return alpha, sigma, fall, -alpha * fall / sigma, 2 * unit * h.tan()
    if name in ("flow", "iadb"):
        return 1 - t, t, -one, one, 2 * t / (1 - t)
    if name == "interpolant":
        sigma = (t**2 + 2 * t * (1 - t)).sqrt()
        return 1 - t, sigma, -one, (1 - t) / sigma, 2 / (1 - t)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)  # ddpm
    low = t.floor().long()
    table = 0.5 * (1 / abar - 1).log()
    slope = table[low + 1] - table[low]
    level = (table[low] + (t - low) * slope).exp()
    alpha = (1 + level**2).rsqrt()
    rise = level * slope * alpha**3
    return alpha, level * alpha, -level * rise, rise, 2 * slope * (alpha * level) ** 2


@pytest.mark.parametrize("name", PROCESSES)
def test_alpha_sigma_rates_drift_and_diffusion_are_those_on_paper(name):
    p = PROCESSES[name]()
    t = times(p)[2:-2]
    alpha, sigma, d_alpha, d_sigma, g2 = by_hand(name, t)
    assert_close(p.alpha(t), alpha)
    assert_close(p.sigma(t), sigma)
    assert_close(p.rates(t)[0], d_alpha)
    assert_close(p.rates(t)[1], d_sigma)
    assert_close(p.drift(t), d_alpha / alpha)
    assert_close(p.diffusion(t).square(), g2)


@pytest.mark.parametrize("name", MANY)
def test_drift_and_diffusion_are_what_alpha_and_sigma_do(name):
    """d ln alpha / dt = f and d sigma^2 / dt = 2 f sigma^2 + g^2, by central differences; DDPM's kinks are avoided."""
    p = MANY[name]()
    t = times(p)[2:-2] if p.name != "ddpm" else torch.arange(0.5, p.t_max, dtype=torch.float64)
    step = 1e-4 * t.clamp(max=1) * (p.t_max - t).clamp(max=1)
    f, g2, sigma2 = p.drift(t), p.diffusion(t).square(), p.sigma(t).square()
    shrink = (p.alpha(t + step).log() - p.alpha(t - step).log()) / (2 * step)
    torch.testing.assert_close(shrink, f, rtol=1e-6, atol=1e-7)
    growth = (p.sigma(t + step).square() - p.sigma(t - step).square()) / (2 * step)
    scale = (2 * f * sigma2).abs() + g2
    assert ((growth - 2 * f * sigma2 - g2).abs() < 1e-6 * scale + 1e-9).all()


@pytest.mark.parametrize("name", MANY)
def test_the_linear_sde_has_the_moments_alpha_and_sigma(name):
    """m' = f m, v' = 2 f v + g^2 from near t_min to near t_max, with f and g^2 frozen at the middle of each step."""
    p = MANY[name]()
    steps = 20_000 if p.name != "ddpm" else 16 * int(p.t_max)  # steps never cross a kink of DDPM's
    low, high = (p.t_max * 0.001, p.t_max * 0.98) if p.name != "ddpm" else (p.t_min, p.t_max)
    edges = torch.linspace(low, high, steps + 1, dtype=torch.float64)
    middle, h = (edges[1:] + edges[:-1]) / 2, (high - low) / steps
    grow, noise = p.drift(middle) * h, p.diffusion(middle).square() * h
    noise = noise * torch.where(grow.abs() > 1e-9, torch.expm1(2 * grow) / (2 * grow), 1)
    m, v = float(p.alpha(edges[0])), float(p.sigma(edges[0]).square())
    for a, b in zip((2 * grow).exp().tolist(), noise.tolist(), strict=True):
        m, v = m * math.sqrt(a), v * a + b
    assert m == pytest.approx(float(p.alpha(edges[-1])), rel=2e-5)
    assert v == pytest.approx(float(p.sigma(edges[-1]).square()), rel=2e-5)


@pytest.mark.parametrize("name", ["vp", "sub_vp", "flow"])
def test_simulated_sdes_have_the_marginals(name):
    """Euler-Maruyama from x0 = 1.5: mean and variance at t = 0.6 within 4 standard errors and the step's bias."""
    p, n, steps, generator = PROCESSES[name](), 20_000, 400, rng()
    x, h = torch.full((n,), 1.5, dtype=torch.float64), 0.6 / 400
    t = torch.arange(steps, dtype=torch.float64) * h
    for f, g in zip(p.drift(t).tolist(), p.diffusion(t).tolist(), strict=True):
        x = x + f * h * x + g * math.sqrt(h) * torch.randn(n, generator=generator, dtype=torch.float64)
    alpha, sigma = float(p.alpha(f64(0.6))), float(p.sigma(f64(0.6)))
    assert abs(x.mean() - 1.5 * alpha) < 4 * sigma / math.sqrt(n) + 5 * h
    assert abs(x.var() - sigma**2) < 4 * sigma**2 * math.sqrt(2 / n) + 5 * h


def test_sub_vp_is_vp_with_less_noise():
    """Same alpha and drift; sigma and g lie below VP's, and both reach N(0, I)."""
    a, b, t = sub_vp(), vp(), TIMES
    assert_close(a.alpha(t), b.alpha(t))
    assert_close(a.drift(t), b.drift(t))
    assert (a.sigma(t) < b.sigma(t)).all()
    assert (a.diffusion(t) < b.diffusion(t)).all()
    assert a.prior() == b.prior() == (0.0, 1.0)


def vp_error(steps):
    """The largest differences from VP at its time (t + 1) / steps: of alpha, sigma and the rescaled f and g^2."""
    p, q = ddpm(steps), vp()
    t = torch.arange(steps, dtype=torch.float64)
    middle, s = t[:-1] + 0.5, (t + 1) / steps
    half = (middle + 1) / steps
    return f64([
        (p.alpha(t) - q.alpha(s)).abs().max(), (p.sigma(t) - q.sigma(s)).abs().max(),
        (steps * p.drift(middle) - q.drift(half)).abs().max(),
        (steps * p.diffusion(middle).square() - q.diffusion(half).square())[steps // 10 :].abs().max(),
    ])


def test_ddpm_goes_to_vp_as_one_over_the_number_of_steps():
    errors = torch.stack([vp_error(n) for n in (500, 1000, 2000, 4000, 8000)])
    rates = (errors[:-1] / errors[1:]).log2()
    assert (rates[-1, :2] - 1).abs().max() < 0.05  # alpha and sigma: halving the step halves the error
    assert (rates[-1, 2:] > 0.9).all()
    assert errors[1, 0] < 2.5e-3  # at DDPM's own 1000 steps


def test_ddpm_is_diffusers_table():
    diffusers = pytest.importorskip("diffusers")
    t = torch.arange(1000, dtype=torch.float64)
    table = diffusers.DDPMScheduler().alphas_cumprod.double()  # float32 products
    torch.testing.assert_close(ddpm().alpha(t).square(), table, rtol=1e-6, atol=0)
    betas = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).betas
    abar = torch.cumprod(1 - betas.double(), 0)
    assert_close(ddpm(betas=betas).alpha(t).square(), abar, 1e-12)
    table = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    torch.testing.assert_close(cosine().alpha((t + 1) / 1000).square()[:-1], table[:-1], rtol=1e-6, atol=0)  # cap: last


def test_interpolants_collapse_when_x1_is_gaussian():
    """The variance of beta x1 + gamma z is sigma^2, and its rate's projection on it sigma sigma'; special cases."""
    t = TIMES[:-1]
    for latent in (0.5, 1.0, 2.0):
        p = interpolant(latent)
        gamma = (latent * t * (1 - t)).sqrt()
        d_gamma = latent * (1 - 2 * t) / (2 * gamma)
        assert_close(p.sigma(t).square(), t.square() + gamma.square())
        assert_close(p.sigma(t) * p.rates(t)[1], t * 1 + gamma * d_gamma)
    assert_close(interpolant(0.0).sigma(t), flow().sigma(t))
    assert_close(interpolant(1.0).sigma(t).square(), t)
    assert_close(interpolant(2.0).alpha(t).square() + interpolant(2.0).sigma(t).square(), torch.ones_like(t))
    assert_close(cosine().alpha(t).square() + cosine().sigma(t).square(), torch.ones_like(t))


@pytest.mark.parametrize("name", MANY)
def test_time_inverts_the_edm_noise_level(name):
    p = MANY[name]()
    t = torch.cat([f64([p.t_min]), times(p), f64([p.t_max])])
    assert_close(p.level(t), p.sigma(t) / p.alpha(t))
    assert_close(p.time(p.level(t)), t)
    assert (p.level(t).diff() > 0).all()


@pytest.mark.parametrize("name", [name for name in PROCESSES if name not in ("ve", "ddpm")])
def test_time_is_accurate_next_to_zero(name):
    p, t = MANY[name](), f64([1e-8, 1e-6, 1e-4])
    torch.testing.assert_close(p.time(p.sigma(t) / p.alpha(t)), t, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", MANY)
def test_log_snr(name):
    p = MANY[name]()
    t = times(p)
    snr = (p.alpha(t) / p.sigma(t)).square()
    assert_close(p.log_snr(t), snr.log())
    assert (p.log_snr(t).diff() < 0).all()


@pytest.mark.parametrize("name", MANY)
def test_edm_round_trip(name):
    p = MANY[name]()
    t, x = times(p), normal(29, 3)
    there, sigma = p.to_edm(x, t)
    back, t_back = p.from_edm(there, sigma)
    assert_close(back, x)
    assert_close(t_back, t)
    there, sigma = p.to_edm(x, 0.5)
    assert sigma.ndim == 0
    assert_close(p.from_edm(there, sigma)[0], x)
    there, sigma = p.to_edm(x[:2], f64([p.t_min, p.t_max]))  # rounding does not step over the ends
    assert_close(p.from_edm(there, sigma)[1], f64([p.t_min, p.t_max]))


@pytest.mark.parametrize("name", MANY)
def test_noised_samples_are_edms_after_the_change_of_variables(name):
    """x_t / alpha = x0 + (sigma / alpha) e."""
    p, (x0, e) = MANY[name](), normal(2, 29, 3)
    x, sigma = p.to_edm(p.add_noise(x0, e, times(p)), times(p))
    assert_close(x, x0 + sigma[:, None] * e)


@pytest.mark.parametrize("name", PROCESSES)
def test_derivatives_do_not_depend_on_the_grad_mode(name):
    p = PROCESSES[name]()
    t = times(p)
    known = [p.drift(t), p.diffusion(t), *p.rates(t)]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert all(torch.equal(a, b) for a, b in zip(known, [p.drift(t), p.diffusion(t), *p.rates(t)], strict=True))


NORMAL = torch.distributions.Normal(0.0, 1.0)


@pytest.mark.parametrize(("make", "cdf"), [
    (edm, lambda t: NORMAL.cdf((t.log() + 1.2) / 1.2)),
    (lambda: edm(log_mean=-0.4, log_std=1.6), lambda t: NORMAL.cdf((t.log() + 0.4) / 1.6)),
    (flow, lambda t: t), (iadb, lambda t: t), (interpolant, lambda t: t), (cosine, lambda t: t),
    (lambda: flow((0.5, 0.8)), lambda t: NORMAL.cdf((t.logit() - 0.5) / 0.8)),
    *[(make, lambda t: (t - 1e-5) / (1 - 1e-5)) for make in (vp, sub_vp, ve)],
    (ddpm, lambda t: (t + 0.5) / 1000),
])
def test_times_in_training_follow_each_process_law(make, cdf):
    """Kolmogorov-Smirnov: sup |F_n - F| sqrt(n) exceeds 2 with probability 7e-4."""
    p, n = make(), 20_000
    t = p.sample_time(n, rng(1))
    assert t.shape == (n,)
    assert (t > p.t_min).all() or p.name == "ddpm"
    assert (t <= p.t_max).all()
    assert torch.equal(t, p.sample_time(n, rng(1)))
    u = cdf(t.sort().values.double())
    assert (u - (torch.arange(n) + 0.5) / n).abs().max() * math.sqrt(n) < 2
    assert p.sample_time(0).shape == (0,)


def test_ddpms_times_in_training_are_whole_and_reach_both_ends():
    t = ddpm(50).sample_time(2000, rng())
    assert t.unique().tolist() == list(range(50))


def test_marginal_is_the_law_of_x_t():
    mixture, p, t = mixture_2d(), vp(), 0.3
    alpha, level, x = p.alpha(f64(t)), p.level(f64(t)), normal(6, 2)
    expected = mixture.noised(float(level)).log_prob(x / alpha) - 2 * alpha.log()
    assert_close(p.marginal(mixture, t).log_prob(x), expected)
    assert p.marginal(ring(), 0.5).means.dtype == torch.float64


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_prior_kl_of_one_gaussian_is_the_closed_form(name, share):
    p = PROCESSES[name]()
    t = p.t_min + share * (p.t_max - p.t_min)
    mean, cov = f64([0.5, -1.0]), f64([[0.5, 0.3], [0.3, 0.4]])
    alpha, sigma, std = p.alpha(f64(t)), p.sigma(f64(t)), p.prior(t)[1]
    normal = torch.distributions.MultivariateNormal
    p_t = normal(alpha * mean, alpha**2 * cov + sigma**2 * torch.eye(2).double())
    prior = normal(f64([0.0, 0.0]), std**2 * torch.eye(2).double())
    exact = torch.distributions.kl_divergence(p_t, prior)
    for method in ("quadrature", "lower", "upper"):
        assert prior_kl(p, GaussianMixture(mean[None], cov[None]), t, method) == pytest.approx(float(exact), abs=1e-12)


@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
@pytest.mark.parametrize("t", [0.1, 0.4, 0.8])
def test_prior_kl_of_mixtures_is_the_integral_and_lies_within_its_bounds(name, t):
    p = PROCESSES[name]()
    for mixture, n in ((mixture_1d(), 20_001), (mixture_2d(), 801)):
        marginal, std = p.marginal(mixture, t), p.prior(t)[1]
        nodes, step = line(-9 * max(1.0, float(p.sigma(f64(t)))), 9 * max(1.0, float(p.sigma(f64(t)))), n)
        d = mixture.means.shape[1]
        x = torch.cartesian_prod(*[nodes] * d).reshape(-1, d)
        log_p = marginal.log_prob(x)
        log_prior = GaussianMixture(torch.zeros(1, d, dtype=torch.float64), std).log_prob(x)
        exact = float((log_p.exp() * (log_p - log_prior)).sum() * step**d)
        assert prior_kl(p, mixture, t) == pytest.approx(exact, rel=1e-8)
        assert prior_kl(p, mixture, t, "lower") <= exact <= prior_kl(p, mixture, t, "upper")


def test_prior_kl_falls_with_time():
    """Always; in VP at least as alpha^2 (the log-Sobolev inequality of N(0, I)), to 0 at the end of flow."""
    mixture = mixture_1d()
    for name, make in PROCESSES.items():
        p = make()
        values = [prior_kl(p, mixture, p.t_min + s * (p.t_max - p.t_min)) for s in (0.05, 0.2, 0.4, 0.6, 0.8, 1.0)]
        assert all(a > b for a, b in itertools.pairwise(values)), name
    p, start = vp(), prior_kl(vp(), mixture, 0.0)
    for t in (0.1, 0.3, 0.6, 1.0):
        assert prior_kl(p, mixture, t) <= float(p.alpha(f64(t)).square()) * start
    assert abs(prior_kl(flow(), mixture)) < 1e-12
    mean, alpha = float(mixture.mean), float(p.alpha(f64(1.0)))  # at the end only the mean is left: |alpha mean|^2 / 2
    assert prior_kl(p, mixture) == pytest.approx((alpha * mean) ** 2 / 2, rel=0.01)


def test_a_process_of_ones_own_needs_only_alpha_sigma_and_time():
    """TrigFlow: alpha = cos t, sigma = sin t (Lu & Song 2025)."""
    p = Process("trig", torch.cos, torch.sin, torch.atan, 0.0, math.pi / 2)
    t = TIMES
    assert_close(p.drift(t), -t.tan())
    assert_close(p.diffusion(t).square(), 2 * t.tan())
    assert_close(p.loss_weight(t, "velocity"), p.loss_weight(t, "v"))  # v is the velocity here
    assert p.prior() == (0.0, 1.0)


X = torch.zeros(3, 2)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: vp().to_edm(X, 1.5), "t runs from 1.5 to 1.5; wanted times of the vp process, 0 to 1"),
    (lambda: vp().add_noise(X, X, -0.1), "t runs from -0.1"),
    (lambda: vp().add_noise(X, X, math.nan), "t runs from nan"),
    (lambda: vp().add_noise(X, X, torch.rand(2)), "sigma has shape"),
    (lambda: vp().from_edm(X, -0.5), "sigma holds -0.5"),
    (lambda: vp().from_edm(X, 200.0), "sigma runs from 200 to 200; wanted levels of the vp process, 0 to 152"),
    (lambda: ve().from_edm(X, 0.005), "wanted levels of the ve process, 0.01 to 50"),
    (lambda: vp().sample_time(-1), "n=-1"),
    (lambda: vp().prior(1.5), "t runs from 1.5"),
    (lambda: vp(beta_min=-1.0), "beta_min=-1.0"),
    (lambda: sub_vp(beta_max=0.0), "beta_max=0.0"),
    (lambda: edm(0.0), "sigma_max=0.0"),
    (lambda: edm(log_std=0.0), "log_std=0.0"),
    (lambda: ve(0.0), "sigma_min=0.0"),
    (lambda: ve(1.0, 0.5), "sigma_max=0.5: wanted a number above sigma_min=1.0"),
    (lambda: ddpm(1), "steps=1"),
    (lambda: ddpm(15), "betas=.*wanted two or more between 0 and 1"),
    (lambda: ddpm(betas=f64([0.1, 0.0])), "betas="),
    (lambda: ddpm(betas=f64([])), "betas="),
    (lambda: cosine(0.0), "offset=0.0"),
    (lambda: interpolant(-1.0), "latent=-1.0"),
    (lambda: flow((0.0, 0.0)), "logit_normal's std=0.0"),
    (lambda: prior_kl(vp(), ring(), 2.0), "t runs from 2"),
    (lambda: prior_kl(vp(), ring(), 0.5, "exact"), "method='exact'"),
    (lambda: prior_kl(edm(), ring(), 0.0), "the prior's std at t=0.0"),
    (lambda: prior_kl(vp(), GaussianMixture(torch.eye(3), 1.0)), "method='quadrature' in 3 dimensions"),
    (lambda: edm(80.0).to_edm(X, 81.0), "edm process, 0 to 80"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
