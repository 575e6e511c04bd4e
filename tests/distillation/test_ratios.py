"""Objectives whose critic tells real samples from made ones: with exact ratios, mixtures and denoisers their gradients
are those of the divergences, and the critics' losses are least at them; the penalty by hand; what stays frozen."""

import pytest
import torch

from minidistill import divergences as dv
from minidistill.distillation import (
    GAN,
    Batch,
    ClassRatio,
    DistributionMatching,
    RealUID,
    ScoreIdentity,
    ScoreMismatching,
    ScoreOfMixtureTraining,
    distill,
)
from minidistill.distillation.objectives.ratios import freeze, gaussian_scale, gradient_penalty
from minidistill.distributions import GaussianMixture, ring
from minidistill.networks import MLP, Denoiser, Generator, UNet
from minidistill.teachers import train_denoiser
from tests.distillation.test_matching import f_divergence
from tests.distillation.test_moments import SETTINGS
from tests.helpers import (
    assert_close,
    f64,
    line,
    mixture_1d,
    mixture_2d,
    normal,
    normal_log_prob,
    normal_pairs,
    rng,
    small_ring,
    states_equal,
)
from tests.quadrature import A, B, exact_gradient, loss_gradient, relative_error, student_denoiser

ROWS = {**dv.F, "alpha": dv.alpha_divergence(0.3), "skew": dv.skew_jensen_shannon(0.25)}


@pytest.mark.parametrize("sigma", [0.4, 1.0])
@pytest.mark.parametrize("name", ROWS)
def test_with_the_exact_ratio_its_gradient_is_the_divergences(name, sigma):
    """(sigma / sigma_data)^2 times that of D_f(p_sigma || q_sigma): no score is asked for."""
    target = mixture_1d()
    got = loss_gradient(ClassRatio(ROWS[name], normalise=False), target, sigma) / sigma**2
    assert relative_error(got, f_divergence(ROWS[name], target, sigma)) < 1e-6


def plane(**more):
    """A batch of 20 with exact denoisers and ratio of two mixtures in the plane."""
    p, q = mixture_2d(), ring(3).to(torch.float64)
    x0, noise, sigma = normal(20, 2), normal(20, 2, seed=1), torch.linspace(0.2, 2.0, 20, dtype=torch.float64)

    def log_ratio(x, s, label=None):
        return torch.stack([p.noised(float(v)).log_prob(row[None])[0] - q.noised(float(v)).log_prob(row[None])[0]
                            for v, row in zip(s, x, strict=True)])

    return Batch(x0, sigma, noise, p, q, ratio=log_ratio, **more)


@pytest.mark.parametrize("name", dv.F)
def test_with_the_exact_ratio_its_pull_is_the_exact_score_difference(name):
    """Sample by sample that of distribution matching with both denoisers exact; and it asks neither of the two."""
    batch, row = plane(sigma_data=1.3), dv.F[name]
    wanted = DistributionMatching(row, normalise=False).pull(batch)[0]
    batch.teacher = batch.fake = None
    assert_close(ClassRatio(row, normalise=False).pull(batch)[0], wanted)
    scaled, scale = ClassRatio(row, clip=None, levels=0, unit_mean=False).pull(batch)
    assert_close(scaled, gaussian_scale(batch) * wanted)
    assert torch.equal(scale, gaussian_scale(batch))


def test_the_scale_is_dmds_for_gaussian_data():
    """sigma_data over the root mean square of x0 - D, exactly."""
    sigma = torch.tensor([0.3, 2.0], dtype=torch.float64)
    batch = Batch(normal(2, 3), sigma, normal(2, 3), None, sigma_data=1.5)
    assert_close(1.5 / gaussian_scale(batch).flatten(), (1 / (1 / 1.5**2 + 1 / sigma**2)).sqrt())


@pytest.mark.parametrize("sigma", [0.4, 1.0])
def test_a_gan_with_the_exact_ratio_descends_the_softened_reverse_kl(sigma):
    target = mixture_1d()
    got = loss_gradient(GAN(), target, sigma)
    assert relative_error(got, f_divergence(dv.F["softened_reverse_kl"], target, sigma)) < 1e-6


@pytest.mark.parametrize("name", ROWS)
def test_a_gan_of_any_loss_is_distribution_matching_through_its_ratios_gradient(name):
    """DMD as a GAN: minus the dual's cost f*(f'(r)) of the made samples, differentiated through x_t, has the gradient
    of D_f itself; for reverse KL the loss is -log r."""
    row, target, sigma = ROWS[name], mixture_1d(), 0.6

    class Dual:
        def generator_loss(self, batch):
            return -row.cost(batch.ratio(batch.xt, batch.sigma, None))

    assert relative_error(loss_gradient(Dual(), target, sigma), f_divergence(row, target, sigma)) < 1e-6


def test_the_penalty_is_half_the_squared_gradient_in_units_of_the_noise():
    """In its mean over 20,000 directions; and it joins both critics' losses by its weight."""
    slope, sigma = torch.tensor([0.3, -1.1], dtype=torch.float64), 1.7
    x = normal(20_000, 2)
    batch = Batch(x, torch.full((20_000,), sigma, dtype=x.dtype), x, None, real=normal(20_000, 2, seed=2),
                  ratio=lambda x, s, label: (x @ slope) + 5, generator=rng())
    wanted = sigma**2 * float(slope.square().sum()) / 2
    assert float(gradient_penalty(batch).mean()) == pytest.approx(wanted, rel=5 * 2**0.5 / 20_000**0.5)
    for one, other in ((ClassRatio(r1=2.0), ClassRatio()), (GAN(r1=2.0), GAN(r1=0.0))):
        losses = []
        for rule in (one, other):
            batch.generator = rng()
            losses.append(rule.critic_loss(batch))
        batch.generator = rng()
        assert_close(losses[0] - losses[1], 2 * gradient_penalty(batch))


def test_most_of_a_student_stays_frozen():
    """The inner layers of a U-Net hold nearly all of its weights, and do not move; an MLP's blocks."""
    torch.manual_seed(0)
    assert freeze(Generator(Denoiser(UNet((1, 8, 8), 16, (1, 2), 1), 0.5), 1.0)) > 0.9
    teacher = train_denoiser(ring().sample(200, rng()), MLP((2,), hidden=32, depth=2), steps=2, progress=False)
    options = {"data": ring().sample(200, rng()), "steps": 3, "batch_size": 8, "progress": False}
    out = distill(teacher, objective=GAN(frozen=True), **options)
    moved = {name: not torch.equal(value, teacher.state_dict()[name.removeprefix("denoiser.")])
             for name, value in out.generator.state_dict().items() if "frequencies" not in name}
    assert {name for name, one in moved.items() if not one} == {
        f"denoiser.network.{layer}.weight" for layer in ("condition", "blocks.0", "blocks.1")}
    assert all(one for name, one in moved.items() if name.endswith("bias"))
    with pytest.raises(ValueError, match="without inner layers to freeze"):
        freeze(torch.nn.Flatten())


@pytest.mark.parametrize("rule", [
    ClassRatio(dv.F["forward_kl"], r1=0.1), GAN(frozen=True), ScoreMismatching(), ScoreOfMixtureTraining(),
])
def test_it_resumes_to_the_bit(rule, tmp_path):
    def crash(state):
        raise RuntimeError("crash")

    options = {"objective": rule, "steps": 6, "batch_size": 8, "progress": False, "evaluate_every": 4}
    path = tmp_path / "run.safetensors"
    with pytest.raises(RuntimeError, match="crash"):
        distill(small_ring(), checkpoint=path, checkpoint_every=2, callbacks=[crash], **options)
    whole = distill(small_ring(), **options)
    assert whole.fake is None
    assert states_equal(distill(small_ring(), checkpoint=path, resume=True, **options).ema.state_dict(),
                        whole.ema.state_dict())


# ------------------------------------------------- score of mixture from data

P_MEAN, P_STD = 0.9, 0.5
PROBES = {"1": torch.ones_like, "x": lambda x: x, "sin": torch.sin}


def laws(x, sigma):
    """Noised p and q at x, (n,) each: of two Gaussians, q the usual student."""
    return (normal_log_prob(x, P_MEAN, (P_STD**2 + sigma**2) ** 0.5).exp(),
            normal_log_prob(x, B, (A**2 + sigma**2) ** 0.5).exp())


def mixed(x, sigma, alpha):
    """The exact denoiser of alpha p + (1 - alpha) q."""
    p, q = laws(x, sigma)
    both = student_denoiser(x, P_STD, P_MEAN, sigma), student_denoiser(x, A, B, sigma)
    return (alpha * p * both[0] + (1 - alpha) * q * both[1]) / (alpha * p + (1 - alpha) * q)


@pytest.mark.parametrize("sigma", [0.4, 1.0])
@pytest.mark.parametrize("uniform", [0.0, 0.3, 1.0])
def test_mixture_training_has_the_gradient_of_the_skew_divergence(uniform, sigma):
    """[alpha KL(p || m) + (1 - alpha) KL(q || m)] / (alpha (1 - alpha)), with the exact mixture in the network's place
    and no teacher; at alpha = 1 that is reverse KL."""
    rule = ScoreOfMixtureTraining(least=0.2, normalise=False)
    alpha = 0.2 + 0.8 * uniform

    def own(x, s, label, to):
        return mixed(x, sigma, to.atan()[:, None])

    target = GaussianMixture(f64([[P_MEAN]]), f64([P_STD]))
    got = loss_gradient(rule, target, sigma, uniform=torch.full((201**2,), uniform, dtype=torch.float64), own=own)
    row = dv.F["reverse_kl"] if alpha == 1 else dv.skew_jensen_shannon(alpha)
    wanted = f_divergence(row, target, sigma) / (1 if alpha == 1 else alpha * (1 - alpha))
    assert relative_error(got / sigma**2, wanted) < 1e-6


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
@pytest.mark.parametrize("uniform", [0.1, 0.4, 0.9])
def test_mixture_trainings_critic_is_least_at_the_mixtures_denoiser(uniform, probe):
    """Derivative zero and curvature positive along every probe; nonzero beside it. Alpha is 0, 0.3 and 1."""
    sigma, (z, e, weight) = 0.5, normal_pairs(reach=9.0)
    batch = Batch((A * z + B)[:, None], torch.full_like(z, sigma), e[:, None], None, real=(P_STD * z + P_MEAN)[:, None],
                  uniform=torch.full_like(z, uniform))

    def derivatives(offset):
        step = f64(offset).requires_grad_(True)
        batch.own = lambda x, s, label, to: mixed(x, sigma, to.atan()[:, None]) + step * probe(x)
        first = torch.autograd.grad((weight * ScoreOfMixtureTraining().critic_loss(batch)).sum(), step,
                                    create_graph=True)[0]
        return float(first.detach()), float(torch.autograd.grad(first, step)[0])

    first, second = derivatives(0.0)
    assert abs(first) < 1e-9
    assert second > 1e-3
    assert abs(derivatives(0.2)[0]) > 1e-3


# ------------------------------------------------- score mismatching

def mismatch_batch(**more):
    sigma, (z, e, weight) = 0.5, normal_pairs(reach=9.0)
    return Batch((A * z + B)[:, None], torch.full_like(z, sigma), e[:, None], None,
                 real=(P_STD * z + P_MEAN)[:, None], generator=rng(), **more), weight, sigma


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_mismatchings_critic_is_least_at_rho_times_the_noise(probe):
    """E = rho E[e | x, real], rho = p / (p + q): stationary along every probe; nonzero beside it."""
    batch, weight, sigma = mismatch_batch()

    def derivative(offset):
        step = f64(offset).requires_grad_(True)

        def own(x, s, label):
            p, q = laws(x, sigma)
            noise = p / (p + q) * (x - student_denoiser(x, P_STD, P_MEAN, sigma)) / sigma
            return x - sigma * (noise + step * probe(x))

        batch.own, batch.generator = own, rng()
        loss = ScoreMismatching(r1=0.0).critic_loss(batch)
        return float(torch.autograd.grad((weight * loss).sum(), step)[0])

    assert abs(derivative(0.0)) < 1e-9
    assert abs(derivative(0.3)) > 0.1


def test_mismatchings_student_is_scored_by_the_noise_left():
    batch, _, sigma = mismatch_batch(own=lambda x, s, label: 0.3 * x)
    batch.x0 = batch.x0.requires_grad_()
    found = 0.7 * batch.xt / sigma
    loss = ScoreMismatching().generator_loss(batch)
    assert_close(loss, (found - batch.noise).square().sum(1) / 2)
    assert_close(torch.autograd.grad(loss.sum(), batch.x0)[0], (found - batch.noise) * 0.7 / sigma)


def test_mismatching_does_not_rest_at_the_real_law():
    """There E is half of the noise expected, J (x - b) with J = sigma / (a^2 + sigma^2) / 2, and the loss's gradient in
    the student's spread a is J^2 a, above 0: it would rather be narrower, where noise is easier to find."""
    sigma, (z, e, weight) = 0.5, normal_pairs(reach=9.0)
    slope = sigma / (A**2 + sigma**2) / 2
    x0 = (A * z + B)[:, None].requires_grad_()
    batch = Batch(x0, torch.full_like(z, sigma), e[:, None], None, own=lambda x, s, label: x - sigma * slope * (x - B))
    gradient = torch.autograd.grad(ScoreMismatching().generator_loss(batch).sum(), x0)[0].flatten()
    assert_close((weight * gradient * z).sum(), f64(slope**2 * A))


def test_mismatchings_levels_end_at_the_highest():
    levels = ScoreMismatching(highest=0.6).noise_levels(4000, SETTINGS, 0.0, rng())
    assert 0.07 <= float(levels.min()) < 0.08
    assert 1.15 < float(levels.max()) <= 1.2


# ------------------------------------------------- inverse distillation with real data

def test_inverse_distillation_without_data_is_fishers_divergence():
    """UID and FGM: |D_p - x|^2 - |D_q - x|^2 is twice SiD at alpha = 1/2, loss for loss in its gradient, and not at
    another alpha; its fake network learns to denoise."""
    target = mixture_1d()
    got = loss_gradient(RealUID(1.0, 1.0), target, 0.6)
    assert_close(got, loss_gradient(ScoreIdentity(0.5), target, 0.6))
    assert relative_error(got, loss_gradient(ScoreIdentity(1.0), target, 0.6)) > 1e-2


@pytest.mark.parametrize(("alpha", "beta"), [(0.92, 0.94), (0.7, 0.6), (0.5, 1.0)])
def test_inverse_distillation_descends_the_games_value(alpha, beta):
    """V(q) = max over D of alpha E_q [|D_p - c x|^2 - |D - c x|^2] + (1 - alpha) E_p [the same with c' and y], c = beta
    / alpha, c' = (1 - beta) / (1 - alpha): its gradient on a grid, the best D moving along, against the student's loss
    with that D frozen. It is 0 for q = p and positive elsewhere."""
    target, sigma, shape = GaussianMixture(f64([[P_MEAN]]), f64([P_STD])), 0.6, (A, B)

    def best(x, a, b):
        p, q = normal_log_prob(x, P_MEAN, (P_STD**2 + sigma**2) ** 0.5).exp(), normal_log_prob(
            x, b, (a**2 + sigma**2) ** 0.5).exp()
        d_p, d_q = student_denoiser(x, P_STD, P_MEAN, sigma), student_denoiser(x, a, b, sigma)
        return p, q, d_p, d_q, (beta * q * d_q + (1 - beta) * p * d_p) / (alpha * q + (1 - alpha) * p)

    def value(x, a, b, cell):
        p, q, d_p, d_q, d = best(x, a, b)
        gain = (alpha * q + (1 - alpha) * p) * (d_p**2 - d**2)
        return ((gain - 2 * (d_p - d) * (beta * q * d_q + (1 - beta) * p * d_p)) * cell).sum() / 2

    class Best:
        def __call__(self, x, s, label=None):
            return best(x, f64(A), f64(B))[4]

    rule = RealUID(alpha, beta, normalise=False)

    class WithBest:
        def generator_loss(self, batch):
            batch.fake = Best()
            return rule.generator_loss(batch)

    assert relative_error(loss_gradient(WithBest(), target, sigma), exact_gradient(value, shape)) < 1e-6
    x, cell = line(-16, 16, 6401)
    assert abs(float(value(x, f64(P_STD), f64(P_MEAN), cell))) < 1e-12
    assert float(value(x, f64(A), f64(B), cell)) > 1e-3


def test_what_is_refused():
    for options, message in (({"alpha": 0.0}, "alpha=0.0"), ({"beta": 1.2}, "beta=1.2"),
                             ({"alpha": 1.0, "beta": 0.9}, "leaves data out")):
        with pytest.raises(ValueError, match=message):
            RealUID(**options)
    with pytest.raises(ValueError, match="least=0"):
        ScoreOfMixtureTraining(least=0.0)
