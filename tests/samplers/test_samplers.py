"""What all solvers share, and the deterministic ones: orders, identities, diffusers as a referee, teleportation."""

import math
from typing import Any

import pytest
import torch

from minidistill import samplers
from minidistill.distributions import GaussianMixture, ring
from minidistill.samplers import (
    SOLVERS,
    Report,
    accelerated_ddim,
    conjugate,
    ddim,
    dpm_solver_2m,
    euler,
    euler_maruyama,
    gradient_estimation,
    heun,
    karras_sigmas,
    log_linear_sigmas,
    sample,
    teleported,
)
from minidistill.samplers.conjugate_ddim import CLOCKS
from minidistill.transport import sliced_wasserstein
from tests.helpers import f64, fitted_slope, levels, mixture_1d, mixture_2d, start

MU, STD = 0.5, 0.8
TARGET = GaussianMixture(f64([[MU]]), STD)
FIXED = [name for name in SOLVERS if name != "gotta_go_fast"]  # those that visit the given levels
NOISY: dict[str, dict[str, Any]] = {
    "euler_maruyama": {}, "ddim": {"eta": 1.0}, "ancestral": {"variance": "large"}, "edm_stochastic": {},
    "predictor_corrector": {}, "accelerated_ddpm": {}, "annealed_langevin": {}, "gotta_go_fast": {},
}
PLAIN = [name for name in SOLVERS if name not in NOISY or name == "ddim"]


def gaussian_flow(x, sigma, after, mean=MU, std=STD):
    return mean + (x - mean) * math.sqrt((std**2 + after**2) / (std**2 + sigma**2))


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (dpm_solver_2m, 2)])
def test_order_of_convergence_on_a_gaussian(solver, order):
    """Its flow x(s') = mu + (x - mu) sqrt((std^2 + s'^2) / (std^2 + s^2)) is the referee: errors fall as n^-order."""
    low, high, x = 0.05, 5.0, start(4, 5.0)
    exact, counts = gaussian_flow(x, high, low), [64, 128, 256, 512]
    errors = [float((solver(TARGET, x, levels(n, low, high), early_stop=True) - exact).norm()) for n in counts]
    assert fitted_slope(counts, errors) == pytest.approx(-order, abs=0.15)


@pytest.fixture(scope="module")
def on_a_mixture():
    """200 starts on a 1-D mixture, and their ends by Heun on 3000 levels: an error of 1e-6 of the smallest here."""
    x, low, high = start(200, 10.0), 0.02, 10.0
    exact = heun(mixture_1d(), x, levels(3000, low, high), early_stop=True)

    def errors(solver, counts, **options):
        ends = [solver(mixture_1d(), x, levels(n, low, high), early_stop=True, **options) for n in counts]
        return [float((end - exact).abs().mean()) for end in ends]

    return errors


@pytest.mark.parametrize(("solver", "options", "order"), [
    (euler, {}, 1), (heun, {}, 2), (dpm_solver_2m, {}, 2), (conjugate, {"lam": 0.3, "clock": "log_sigma"}, 1),
    (conjugate, {"lam": -1.0, "clock": "log_sigma"}, 1), (conjugate, {"lam": -1.5}, 1), (conjugate, {"lam": 0.5}, 1),
    (gradient_estimation, {}, 1),
])
def test_order_of_convergence_on_a_mixture(on_a_mixture, solver, options, order):
    counts = [80, 160, 320]
    assert fitted_slope(counts, on_a_mixture(solver, counts, **options)) == pytest.approx(-order, abs=0.15)


def test_accelerated_ddim_gains_an_order(on_a_mixture):
    counts = [160, 320, 640]
    fast = on_a_mixture(accelerated_ddim, counts)
    assert fitted_slope(counts, fast) <= -1.8
    plain = on_a_mixture(ddim, [*counts, 1280])
    assert fitted_slope(counts, plain[:3]) == pytest.approx(-1, abs=0.15)
    assert all(a < b / 4 for a, b in zip(fast, plain[1:], strict=True))  # at about the same calls, 2n - 1 and 2n


@pytest.mark.parametrize(("solver", "options", "peer"), [
    (ddim, {}, euler), (gradient_estimation, {"gamma": 1.0}, ddim), (conjugate, {}, ddim),
    (conjugate, {"clock": "log_sigma"}, ddim),
    (SOLVERS["edm_stochastic"], {"churn": 0.0}, heun),
    (SOLVERS["edm_stochastic"], {"s_min": 90.0}, heun), (SOLVERS["edm_stochastic"], {"s_max": 0.001}, heun),
    (SOLVERS["predictor_corrector"], {"corrector_steps": 0}, euler_maruyama), (SOLVERS["ancestral"], {},
     lambda *args, **options: ddim(*args, eta=1.0, **options)),
])
def test_solvers_that_are_the_same(solver, options, peer):
    x, mixture = start(8, d=2), mixture_2d()
    ours, theirs = (
        run(mixture, x, levels(12), torch.Generator().manual_seed(3), trajectory=True, **chosen)
        for run, chosen in ((solver, options), (peer, {}))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clock", CLOCKS)
def test_conjugate_integrates_its_own_equation(clock):
    """One step against z = e^(lam t) x with dz = lam z dt + e^(lam t) eps dsigma, the first term by Euler and the
    second by a fine sum, for a constant eps; t is a function of the level in units of twice the data's scale."""
    x, eps, high, low = 1.3, 0.7, 2.0, 0.5

    def denoiser(x, sigma):
        return x - sigma * eps

    denoiser.sigma_data = 0.4
    nodes = torch.linspace(low, high, 20_001, dtype=torch.float64)
    total = torch.log1p((nodes / 0.8) ** 2)  # the integral of beta: 0.1 t + 9.95 t^2
    t = {"vp": (-0.1 + (0.01 + 39.8 * total).sqrt()) / 19.9, "log_sigma": nodes.log()}[clock]
    for lam in (-2.5, -1.0, -0.3, 0.0, 0.8):
        grown = (lam * t).exp()
        inner = (grown[1:] + grown[:-1]).sum() / 2 * (high - low) / 20_000
        z = grown[-1] * x * (1 + lam * (t[0] - t[-1])) - eps * inner
        ours = conjugate(denoiser, f64([[x]]), f64([high, low, 0.0]), lam=lam, clock=clock, early_stop=True)
        assert float(ours) == pytest.approx(float(z / grown[0]), rel=1e-7)


@pytest.mark.parametrize("clock", CLOCKS)
def test_conjugate_knows_no_units(clock):
    """Data a thousand times as large: samples a thousand times as large."""
    x, mixture = start(8, d=2), mixture_2d()
    large = GaussianMixture(1000 * mixture.means, 1e6 * mixture.covs, mixture.weights)
    ours, theirs = (conjugate(target, scale * x, scale * levels(12), lam=-1.5, clock=clock)
                    for target, scale in ((mixture, 1), (large, 1000)))
    torch.testing.assert_close(theirs, 1000 * ours, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("clock", "lam", "gain"), [("log_sigma", 0.1, 1.2), ("vp", 1.0, 1.5)])
@pytest.mark.parametrize("n", [8, 20, 50])
def test_a_little_conjugation_beats_ddim(n, clock, lam, gain):
    """In the mean distance to the end of the exact flow, on a 1-D mixture; the wrong sign loses as much. The clock of
    the variance-preserving process gains more."""
    x = start(500)
    exact = heun(mixture_1d(), x, levels(400), early_stop=True)
    minus, zero, plus = (
        float((conjugate(mixture_1d(), x, levels(n), lam=one, clock=clock, early_stop=True) - exact).abs().mean())
        for one in (-lam, 0.0, lam)
    )
    assert gain * minus < zero < plus / gain


def diffusers_run(name, denoiser, x, sigmas):
    """The samples of diffusers' scheduler on our levels and denoiser; its network predicts in its own coordinates."""
    diffusers = pytest.importorskip("diffusers")
    sigmas = sigmas.float()
    if name == "heun":  # it predicts the noise, and its x is ours
        scheduler = diffusers.HeunDiscreteScheduler()
        scheduler.set_timesteps(len(sigmas) - 1)
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        for index in range(len(scheduler.sigmas) - 1):
            sigma = scheduler.sigmas[index]
            scheduler._step_index = index
            x = scheduler.step((x - denoiser(x, sigma)) / sigma, scheduler.timesteps[index], x).prev_sample
        return x
    kinds = {"euler": diffusers.EDMEulerScheduler, "dpm_solver_2m": diffusers.EDMDPMSolverMultistepScheduler}
    scheduler = kinds[name]()
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas
    for index, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index]
        scheduler._step_index = index
        skip = scheduler.config.sigma_data**2 / (scheduler.config.sigma_data**2 + sigma**2)
        out = sigma * scheduler.config.sigma_data / (scheduler.config.sigma_data**2 + sigma**2).sqrt()
        x = scheduler.step((denoiser(x, sigma) - skip * x) / out, t, x).prev_sample
    return x


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers' own, with NumPy 2
@pytest.mark.parametrize("n", [6, 20])
@pytest.mark.parametrize("name", ["euler", "heun", "dpm_solver_2m"])
def test_diffusers_agrees(name, n):
    """To 1e-5 on samples of size 1; diffusers' sums run in float32, so start low enough for that to be visible."""
    mixture, sigmas = mixture_2d().to(torch.float32), karras_sigmas(n, 0.01, 10.0)
    x = start(16, 10.0, d=2).float()
    torch.testing.assert_close(sample(mixture, x, sigmas, name), diffusers_run(name, mixture, x, sigmas),
                               rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_last_step_lands_on_the_denoiser(name):
    mixture, x, sigmas = mixture_2d(), start(8, d=2), levels(6)
    options = {"s_min": 0.01} if name == "edm_stochastic" else {}  # no noise on its last step
    path = SOLVERS[name](mixture, x, sigmas, torch.Generator().manual_seed(0), trajectory=True, **options)
    torch.testing.assert_close(path[-1], mixture(path[-2], sigmas[-2]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "options", "calls"), [
    ("euler", {}, 7), ("heun", {}, 13), ("ddim", {}, 7), ("dpm_solver_2m", {}, 7), ("gradient_estimation", {}, 7),
    ("accelerated_ddim", {}, 12), ("conjugate", {}, 7), ("euler_maruyama", {}, 7), ("ancestral", {}, 7),
    ("edm_stochastic", {}, 13), ("predictor_corrector", {}, 13), ("predictor_corrector", {"corrector_steps": 3}, 25),
    ("accelerated_ddpm", {}, 7), ("annealed_langevin", {"steps_per_level": 4}, 25),
])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_number_of_network_calls(name, options, calls, batch_size):
    """In the report and counted here, over the samples: chunks of 3, 3, 1."""
    seen, report = [], Report(calls=99.0, rejected=1.0)

    def counting(x, sigma):
        seen.extend(sigma.tolist())
        return TARGET(x, sigma)

    sample(counting, start(7), levels(7), name, report=report, batch_size=batch_size, **options)
    assert len(seen) == 7 * calls
    assert report == Report(calls=calls, levels=levels(7).tolist())
    if name not in ("edm_stochastic", "annealed_langevin"):  # which raise the levels, and skip the first
        assert set(seen) == set(levels(7)[:-1].tolist())


@pytest.mark.parametrize("name", FIXED)
def test_early_stop_is_the_path_without_its_end(name):
    def run(**options):
        rng, report = torch.Generator().manual_seed(0), Report()
        return sample(mixture_2d(), start(5, d=2), levels(6), name, generator=rng, report=report, **options), report

    (path, full), (stopped, short) = run(trajectory=True), run(early_stop=True)
    assert torch.equal(stopped, path[-2])
    assert short.levels == full.levels[:-1]
    assert short.calls == full.calls - 1
    assert torch.equal(run(early_stop=True, trajectory=True)[0], path[:-1])


@pytest.mark.parametrize("trajectory", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_chunks_change_nothing_without_noise(name, trajectory):
    """Memory of multistep solvers starts anew in each chunk, and labels are cut along."""
    mixture, x, label = mixture_2d(), start(8, d=2), torch.arange(8) % 3
    whole, cut = (
        sample(mixture, x, levels(6), name, label=label, batch_size=size, trajectory=trajectory) for size in (None, 3)
    )
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)


def test_chunks_bound_the_batch():
    sizes = set()

    def denoiser(x, sigma):
        sizes.add(len(x))
        return TARGET(x, sigma)

    euler(denoiser, start(8), levels(3), batch_size=3)
    assert sizes == {3, 2}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_no_samples(name, batch_size):
    assert sample(mixture_2d(), start(0, d=2), levels(4), name, batch_size=batch_size).shape == (0, 2)


@pytest.mark.parametrize("name", SOLVERS)
def test_one_level_is_one_call(name):
    x, options = start(5, d=2), {"churn": 0.0} if name == "edm_stochastic" else {}
    report = Report()
    out = sample(mixture_2d(), x, levels(1), name, report=report, **options)
    torch.testing.assert_close(out, mixture_2d()(x, 80.0), rtol=1e-12, atol=1e-12)
    assert report.calls == 1
    assert torch.equal(sample(mixture_2d(), x, levels(1), name, early_stop=True), x)


@pytest.mark.parametrize("name", ["heun", "gotta_go_fast"])
def test_progress_bar_runs_to_its_end(name, capsys):
    sample(TARGET, start(4), levels(5), name, progress=True, batch_size=2, generator=torch.Generator().manual_seed(0))
    assert "sampling: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("name", FIXED)
def test_trajectory_runs_from_x_to_the_samples(name):
    x = start(5, d=2)

    def run(trajectory):
        rng = torch.Generator().manual_seed(0)
        return sample(mixture_2d(), x, levels(6), name, trajectory=trajectory, generator=rng)

    path = run(True)
    assert path.shape == (7, 5, 2)
    assert torch.equal(path[0], x)
    assert torch.equal(path[-1], run(False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SOLVERS)
def test_dtype_is_kept(name, dtype):
    assert sample(TARGET.to(dtype), start(4).to(dtype), levels(4), name).dtype == dtype


@pytest.mark.parametrize("name", NOISY)
def test_noise_follows_the_generator(name):
    def run(seed):
        rng = torch.Generator().manual_seed(seed)
        return sample(TARGET, start(4), levels(5), name, generator=rng, **NOISY[name])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("name", SOLVERS)
def test_label_reaches_the_denoiser(name):
    """With a label the samples go to that component: within 6 of its standard deviations."""
    mixture = GaussianMixture(f64([[-5.0, 0.0], [5.0, 0.0], [0.0, 9.0]]), 0.1)
    label = torch.arange(30) % 3
    x = sample(mixture, start(30, d=2), levels(60), name, label=label, generator=torch.Generator().manual_seed(0))
    assert ((x - mixture.means[label]).norm(dim=1) < 0.6).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_no_graph_is_kept_and_x_is_untouched(name):
    x = start(4).requires_grad_(True)
    before = x.detach().clone()
    assert not sample(TARGET, x, levels(4), name).requires_grad
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("calls", range(5, 11))
def test_gradient_estimation_beats_ddim_at_few_calls(calls):
    """On the ring, on the paper's log-linear levels, in the mean distance to the end of the exact flow."""
    mixture, x = ring().to(torch.float64), start(500, d=2)
    exact = heun(mixture, x, levels(300), early_stop=True)
    sigmas = log_linear_sigmas(calls + 1, dtype=torch.float64)
    ours, plain = (
        float((solver(mixture, x, sigmas, early_stop=True) - exact).norm(dim=1).mean())
        for solver in (gradient_estimation, ddim)
    )
    assert ours < 0.8 * plain


class Gaussian:
    """mean (d,), cov (d, d), with its flow in closed form."""

    def __init__(self, mean, cov):
        self.mean, (self.variances, self.axes) = mean, torch.linalg.eigh(cov)

    def flow(self, x, sigma, after):
        grown = ((self.variances + after**2) / (self.variances + sigma**2)).sqrt()
        return self.mean + (x - self.mean) @ self.axes * grown @ self.axes.T


def test_teleporting_on_a_gaussian_is_exact():
    cov = f64([[0.5, 0.3], [0.3, 0.4]])
    target, x = GaussianMixture(f64([[1.0, -0.5]]), cov.unsqueeze(0)), start(6, d=2)
    report, sigmas = Report(), levels(12)
    jump = teleported(Gaussian(f64([1.0, -0.5]), cov), heun, float(sigmas[5]))
    path = jump(target, x, sigmas, trajectory=True, report=report)
    exact = heun(target, x, levels(4000, float(sigmas[5])), early_stop=True)
    torch.testing.assert_close(path[1], exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(path[0], x)
    torch.testing.assert_close(path[1:], heun(target, path[1], sigmas[5:], trajectory=True))
    assert report == Report(calls=2 * 7 - 1, levels=[float(sigmas[0]), *sigmas[5:].tolist()])
    between = math.sqrt(float(sigmas[5] * sigmas[6]))  # a level of its own
    teleported(Gaussian(f64([1.0, -0.5]), cov), "heun", between)(target, x, sigmas, report=report)
    assert report.levels == pytest.approx([float(sigmas[0]), between, *sigmas[6:].tolist()])


def test_teleporting_hands_the_label_to_a_gaussian_with_classes():
    class Classes(Gaussian):
        n_classes = 2

        def flow(self, x, sigma, after, label):
            return super().flow(x, sigma, after) + label.unsqueeze(1)

    mixture, x, label = GaussianMixture(f64([[MU], [-MU]]), STD), start(4), torch.tensor([0, 1, 1, 0])
    plain, classes = (teleported(kind(f64([MU]), f64([[STD**2]])), "euler", 1.0) for kind in (Gaussian, Classes))
    jumps = [run(mixture, x, levels(5), label=label, trajectory=True)[1] for run in (plain, classes)]
    torch.testing.assert_close(jumps[1] - jumps[0], label.unsqueeze(1).double())


@pytest.mark.parametrize("solver", ["heun", "dpm_solver_2m"])
def test_teleporting_saves_a_fifth_of_the_calls(solver):
    """On the ring, with the mixture's mean and covariance: no quality is lost, by sliced W2 and by the map's error."""
    mixture, x, sigmas = ring().to(torch.float64), start(1000, d=2), levels(18)
    centred = mixture.means - mixture.mean
    fit = Gaussian(mixture.mean, torch.einsum("k,kij->ij", mixture.weights, mixture.covs) + centred.T @ centred / 8)
    data = mixture.sample(5000, torch.Generator().manual_seed(1))
    exact = heun(mixture, x, levels(300))

    def quality(run):
        report = Report()
        y = run(mixture, x, sigmas, report=report)
        return (report.calls, float((y - exact).norm(dim=1).mean()),
                float(sliced_wasserstein(y, data, generator=torch.Generator().manual_seed(2))))

    calls, error, distance = quality(SOLVERS[solver])
    fewer, error_after, distance_after = quality(teleported(fit, solver, float(sigmas[6])))
    assert fewer <= 0.8 * calls
    assert error_after < 1.01 * error
    assert distance_after < 1.05 * distance


X, FIT = torch.zeros(3, 1, dtype=torch.float64), Gaussian(f64([MU]), f64([[STD**2]]))


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: sample(TARGET, X, levels(3), "huen"), ValueError,
     "solver='huen'.*did you mean 'heun'.*Valid names: accelerated_ddim, .*euler, euler_maruyama, .*heun"),
    (lambda: heun(TARGET, X, f64([1.0, 2.0, 0.0])), ValueError, "sigmas=.*descending"),
    (lambda: heun(TARGET, X, f64([1.0, 1.0, 0.0])), ValueError, "sigmas="),
    (lambda: heun(TARGET, X, f64([2.0, 1.0])), ValueError, "and then 0"),
    (lambda: heun(TARGET, X, f64([1.0, -1.0, 0.0])), ValueError, "sigmas="),
    (lambda: heun(TARGET, X, f64([1.0, math.nan, 0.0])), ValueError, "sigmas="),
    (lambda: heun(TARGET, X, f64([0.0])), ValueError, "at least one level"),
    (lambda: heun(TARGET, X, f64([[1.0, 0.0]])), ValueError, "sigmas="),
    (lambda: heun(TARGET, X * math.nan, levels(3)), ValueError, "x holds a NaN"),
    (lambda: heun(TARGET, X.long(), levels(3)), TypeError, "x is a tensor of torch.int64"),
    (lambda: heun(TARGET, X[:, 0], levels(3)), ValueError, "x has shape"),
    (lambda: ddim(TARGET, X, levels(3), eta=1.5), ValueError, "eta=1.5"),
    (lambda: gradient_estimation(TARGET, X, levels(3), gamma=math.inf), ValueError, "gamma=inf"),
    (lambda: conjugate(TARGET, X, levels(3), lam=math.nan), ValueError, "lam=nan"),
    (lambda: conjugate(TARGET, X, levels(3), clock="ve"), ValueError, "clock='ve'"),
    (lambda: heun(TARGET, X, levels(3), batch_size=0), ValueError, "batch_size=0"),
    (lambda: heun(TARGET, X, levels(3), label=torch.zeros(2)), ValueError, r"label is .* \(2,\); wanted .* \(3,\)"),
    (lambda: heun(TARGET, X, levels(3), label=[0, 0, 0]), TypeError, "label is list; wanted an integer tensor"),
    (lambda: heun(TARGET, X, levels(3), steps=3), TypeError, "steps"),
    (lambda: teleported(FIT, "huen", 1.0), ValueError, "solver='huen'"),
    (lambda: teleported(FIT, "heun", 0.0), ValueError, "sigma_skip=0.0"),
    (lambda: teleported(FIT, "heun", 80.5)(TARGET, X, levels(3)), ValueError, "sigma_skip=80.5.*below"),
    (lambda: euler_maruyama(TARGET, X, f64([1.0, 2.0])), ValueError, "sigmas="),
])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_infinite_levels_are_refused():
    with pytest.raises(ValueError, match="sigmas="):
        euler(mixture_2d(), torch.zeros(2, 2, dtype=torch.float64), f64([math.inf, 1, 0]))


@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_every_solver_gives_the_denoiser_one_level_a_sample(solver):
    seen = set()

    def denoiser(x, sigma):
        seen.add((tuple(x.shape), tuple(sigma.shape)))
        return 0.5 * x

    samplers.sample(denoiser, torch.ones(3, 2), samplers.karras_sigmas(4), solver, generator=torch.Generator())
    assert seen == {((3, 2), (3,))}
