"""DMD, DMD2, f-distill, SiDA, score of mixture, Uni-Instruct: each term's gradient against autograd of its name's."""

import math

import numpy as np
import pytest
import torch

from minidistill import divergences as dv
from minidistill.distillation import (
    DMD,
    DMD2,
    OBJECTIVES,
    AdversarialScoreIdentity,
    Batch,
    DistributionMatching,
    Needs,
    ScoreIdentity,
    ScoreOfMixture,
    UniInstruct,
)
from minidistill.distillation.objectives.implicit import feature_logit
from minidistill.distillation.objectives.matching import fake_loss, level_mean, ratio_loss
from minidistill.distillation.pairs import make_pairs
from minidistill.distributions import GaussianMixture, ring
from minidistill.networks import MLP, Correction, Denoiser
from minidistill.networks.unet import UNet
from minidistill.samplers import dpm_solver_2m, karras_sigmas
from tests.helpers import f64, line, mixture_1d, mixture_2d, normal_log_prob, normal_pairs, small_denoiser
from tests.quadrature import A, B, exact_batch, exact_gradient, loss_gradient, relative_error, student_denoiser

PLAIN = DistributionMatching(dv.F["reverse_kl"], normalise=False)
SIGMAS = [0.4, 1.0]


def f_divergence(row, target, sigma):
    """grad of D_f(p_sigma || q_sigma), on a grid."""
    log_p = target.noised(sigma).log_prob
    return exact_gradient(
        lambda x, a, b, cell: row.between(log_p(x[:, None]), normal_log_prob(x, b, (a**2 + sigma**2).sqrt()), cell)
    )


# ------------------------------------------------- DMD and DMD2

@pytest.mark.parametrize("name", ["reverse_kl", "diff_instruct", "dmd", "dmd2"])
def test_reverse_kl_in_all_its_clothes_is_one_term(name):
    """Diff-Instruct, DMD and DMD2 share one matching term, up to DMD's normaliser, whose own formula is here."""
    z, e, _ = normal_pairs(reach=4.0, n=15)
    target, sigma = mixture_1d(), 0.5
    a, b = f64(A).requires_grad_(True), f64(B).requires_grad_(True)
    batch = exact_batch(target, sigma, a, b, z, e)
    got = torch.autograd.grad(OBJECTIVES[name].terms(batch)["matching"].sum(), batch.x0)[0].flatten()
    x = batch.xt.detach()
    p, q = target(x, sigma), student_denoiser(x, A, B, sigma)
    scale = 1.0 if name == "diff_instruct" else 1 / (batch.x0.detach() - p).abs().clamp(min=1e-5)
    torch.testing.assert_close(got, (scale * (q - p)).flatten())


@pytest.mark.parametrize("weight", [0.25, 2.0])
def test_dmds_regression_term_pulls_towards_the_pairs(weight):
    """grad of weight E|a z + b - y|^2 / s^2 by hand, s = sigma_data, with y = 2 z - 1: (2w/s^2) (a - 2, b + 1)."""
    z, e, rule = normal_pairs()
    a, b = f64(A).requires_grad_(True), f64(B).requires_grad_(True)
    batch = exact_batch(mixture_1d(), 0.5, a, b, z, e, sigma_data=0.8, pair_x0=(a * z + b)[:, None],
                        pair_y=(2 * z - 1)[:, None])
    terms = DMD(PLAIN, weight).terms(batch)
    got = torch.autograd.grad((rule * terms["regression"]).sum(), (a, b))
    torch.testing.assert_close(torch.stack(got), 2 * weight / 0.8**2 * f64([A - 2, B + 1]))
    torch.testing.assert_close(terms["matching"], PLAIN.terms(batch)["matching"])


def test_dmd_without_pairs_is_plain_matching():
    assert torch.equal(loss_gradient(DMD(PLAIN), mixture_1d(), 0.5), loss_gradient(PLAIN, mixture_1d(), 0.5))


@pytest.mark.parametrize("teacher", ["mixture", "network"])
def test_pairs_are_what_the_teachers_flow_makes_of_the_noise(teacher):
    """Against the solver run by hand; for one Gaussian, against its flow in closed form, y = m + s z (the
    solver's error at 36 levels, measured against 400, is below 2 % of s at |z| = 1 and grows with |z|)."""
    if teacher == "network":
        model = small_denoiser(n_classes=3)
        pairs = make_pairs(model, 10, (2,), 0.7, 3, seed=4, device=torch.device("cpu"), batch_size=4, progress=False)
        assert pairs.label.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
        sigmas = karras_sigmas(36, 0.004 * 0.7, 160 * 0.7)
        wanted = dpm_solver_2m(model, sigmas[0] * pairs.z, sigmas, label=pairs.label, progress=False)
        torch.testing.assert_close(pairs.y, wanted, rtol=1e-4, atol=1e-4)
        assert not pairs.y.requires_grad
    else:
        gaussian = GaussianMixture([[1.0, -2.0]], 0.5)
        pairs = make_pairs(gaussian, 50, (2,), 0.5, 0, seed=4, device=torch.device("cpu"), progress=False)
        torch.testing.assert_close(pairs.y, gaussian.means + 0.5 * pairs.z, rtol=0.02, atol=0.03)
        assert torch.equal(pairs.y, make_pairs(gaussian, 50, (2,), 0.5, 0, seed=4, device=torch.device("cpu"),
                                               progress=False).y)
        some = pairs.draw(200, torch.Generator().manual_seed(0))
        torch.testing.assert_close(some.y, gaussian.means + 0.5 * some.z, rtol=0.02, atol=0.03)
        assert len(some.z.unique(dim=0)) > 40


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("kind", ["two", "three"])
@pytest.mark.parametrize("objective", [
    DMD2(PLAIN, weight=1.0), AdversarialScoreIdentity(normalise=False, weight=1.0),
    DistributionMatching(dv.F["jensen_shannon"], normalise=False, adversarial_weight=1.0),
], ids=["dmd2", "sida", "f_distill"])
def test_the_adversarial_term_is_softened_reverse_kl_at_the_exact_ratio(objective, kind, sigma):
    """grad of sigma^2 D_f with f = (r+1) log((r+1) / 2r), whose weight is 1 / (1 + r)."""
    target = mixture_1d(kind)
    got = loss_gradient(objective, target, sigma, term="adversarial") / sigma**2
    assert relative_error(got, f_divergence(dv.F["softened_reverse_kl"], target, sigma)) < 1e-6


def test_the_adversarial_weights_scale_their_terms_alone():
    target = mixture_1d()
    for make, score in ((lambda w: DMD2(PLAIN, weight=w), "matching"),
                        (lambda w: DistributionMatching(dv.F["forward_kl"], adversarial_weight=w), "matching"),
                        (lambda w: AdversarialScoreIdentity(normalise=False, weight=w), "identity")):
        one, three = (loss_gradient(make(w), target, 0.5, term="adversarial") for w in (1.0, 3.0))
        torch.testing.assert_close(three, 3 * one)
        assert torch.equal(*(loss_gradient(make(w), target, 0.5, term=score) for w in (1.0, 3.0)))


def test_two_time_scales_are_the_objectives_own():
    for name in ("dmd2", "f_distill"):
        assert OBJECTIVES[name].critic_steps == 5
        assert OBJECTIVES[name].needs_ratio
    assert Needs.of(OBJECTIVES["jensen_shannon"]).critic_steps is None
    assert OBJECTIVES["dmd"].needs_pairs > 0
    assert not OBJECTIVES["dmd"].needs_ratio


# ------------------------------------------------- f-distill: its adversarial term, its stabilisers one by one

def test_f_distill_is_the_divergences_matching_and_dmd2s_adversarial_term():
    """At an exact ratio, both terms to the bit: the first is Jensen-Shannon's own, the second DMD2's."""
    target, rule = mixture_1d(), OBJECTIVES["f_distill"]
    matching, help_ = (loss_gradient(rule, target, 0.5, term=term) for term in ("matching", "adversarial"))
    assert torch.equal(matching, loss_gradient(OBJECTIVES["jensen_shannon"], target, 0.5, term="matching"))
    assert torch.equal(help_, loss_gradient(OBJECTIVES["dmd2"], target, 0.5, term="adversarial"))
    assert help_.abs().max() > 1e-3


def test_an_adversarial_term_brings_a_ratio_that_reverse_kl_alone_does_without():
    """And its weight is still h = 1: the matching term is reverse KL's."""
    alone, helped = (DistributionMatching(dv.F["reverse_kl"], adversarial_weight=w) for w in (0.0, 0.1))
    assert (alone.needs_ratio, helped.needs_ratio) == (False, True)
    assert (alone.weighs, helped.weighs) == (False, False)
    target = mixture_1d()
    assert torch.equal(*(loss_gradient(rule, target, 0.5, term="matching") for rule in (alone, helped)))
    assert torch.equal(loss_gradient(helped, target, 0.5), loss_gradient(DMD2(weight=0.1), target, 0.5))
    assert not DMD2(weight=0.0).needs_ratio


def test_each_stabiliser_can_be_switched_off():
    """The weight of Jensen-Shannon with a given logit: clip, division by the level's mean, unit mean; each alone."""
    rng = torch.Generator().manual_seed(0)
    n, row = 80, dv.F["forward_kl"]
    logit, sigma = 3 * torch.randn(n, generator=rng), torch.linspace(0.1, 2.0, n)
    x0, noise = torch.randn(n, 2, generator=rng), torch.randn(n, 2, generator=rng)
    batch = Batch(x0, sigma, noise, ring(), lambda x, s, l: 0 * x, ratio=lambda x, s, l: logit)
    base = DistributionMatching(dv.F["reverse_kl"]).pull(batch)[0]

    def weight(**switches):
        off = {"clip": None, "levels": 0, "unit_mean": False}
        return (DistributionMatching(row, **(off | switches)).pull(batch)[0] / base).mean(1)

    r = logit.exp()
    torch.testing.assert_close(weight(), r)
    torch.testing.assert_close(weight(clip=2.0), r.clamp(math.exp(-2), math.exp(2)))
    torch.testing.assert_close(weight(unit_mean=True), r / r.mean())
    torch.testing.assert_close(weight(levels=4), r / level_mean(r, sigma, 4))
    assert float(weight(levels=4).reshape(4, -1).mean(1).sub(1).abs().max()) < 1e-5
    off = {"clip": None, "levels": 0, "unit_mean": False}
    bare, scaled = (DistributionMatching(row, scale=scale, **off).pull(batch) for scale in (False, True))
    torch.testing.assert_close(bare[0] * scaled[1], scaled[0])
    assert torch.equal(bare[1], torch.ones(n, 1))
    assert torch.equal(bare[0], DistributionMatching(row, normalise=False).pull(batch)[0])


# ------------------------------------------------- SiDA

def test_sidas_score_term_is_sid_at_alpha_one():
    target = mixture_1d()
    got = loss_gradient(AdversarialScoreIdentity(), target, 0.5, term="identity")
    torch.testing.assert_close(got, loss_gradient(ScoreIdentity(1.0), target, 0.5))


@pytest.mark.parametrize(("shape", "places"), [((2,), (5, 1)), ((1, 8, 8), (5, 4, 4))])
def test_the_logit_is_the_mean_over_channels_of_the_fakes_features(shape, places):
    torch.manual_seed(0)
    network = MLP(shape, hidden=16, depth=1) if shape == (2,) else UNet(shape, 16, (1, 2), 1)
    fake, x, sigma = Denoiser(network, 0.7), torch.randn(5, *shape), torch.rand(5) + 0.1
    got = feature_logit(fake, x, sigma, None)
    assert got.shape == places
    torch.testing.assert_close(got.flatten(), fake.features(x, sigma).mean(1).flatten())


def test_sida_has_no_parameters_of_its_own_and_its_critic_is_logistic_regression():
    """critic loss = denoising + weight (softplus(-real) + softplus(fake)), through the fake network's features."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    target, n = ring(), 16
    fake = Correction(target, MLP((2,), hidden=16, depth=1), 1.0)
    batch = Batch(torch.randn(n, 2, generator=rng), torch.rand(n, generator=rng) + 0.1,
                  torch.randn(n, 2, generator=rng), target, fake, real=target.sample(n, rng))
    noise = batch.xt - batch.x0
    real, made = (fake.features(x, batch.sigma).mean(1) for x in (batch.real + noise, batch.xt))
    logistic = torch.log1p(torch.exp(-real)) + torch.log1p(torch.exp(made))
    got = AdversarialScoreIdentity(critic_weight=0.3).critic_loss(batch)
    torch.testing.assert_close(got, fake_loss(batch) + 0.3 * logistic)


# ------------------------------------------------- score of mixture

@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.7, 0.95])
def test_score_of_mixture_has_the_gradient_of_the_skew_divergence(alpha, sigma):
    """[alpha KL(p || m) + (1 - alpha) KL(q || m)] / (alpha (1 - alpha)) on a grid, alpha fixed or drawn."""
    target = mixture_1d()
    wanted = f_divergence(dv.skew_jensen_shannon(alpha), target, sigma) / (alpha * (1 - alpha))
    fixed = loss_gradient(ScoreOfMixture(alpha, normalise=False), target, sigma) / sigma**2
    assert relative_error(fixed, wanted) < 1e-6
    uniform = torch.full((201**2,), alpha, dtype=torch.float64)
    drawn = loss_gradient(ScoreOfMixture(normalise=False), target, sigma, uniform=uniform) / sigma**2
    torch.testing.assert_close(drawn, fixed)


def test_score_of_mixture_runs_from_forward_to_reverse_kl():
    target, ends = mixture_1d(), {1e-7: "forward_kl", 1 - 1e-7: "reverse_kl"}
    for alpha, name in ends.items():
        got = loss_gradient(ScoreOfMixture(alpha, normalise=False), target, 0.6)
        wanted = loss_gradient(DistributionMatching(dv.F[name], normalise=False), target, 0.6)
        assert relative_error(got, wanted) < 1e-4
    forward = loss_gradient(DistributionMatching(dv.F["forward_kl"], normalise=False), target, 0.6)
    assert relative_error(got, forward) > 0.1


PROBES = {"1": torch.ones_like, "x": lambda x: x, "sin": torch.sin, "x^2": torch.square}


def mixture_critic(alpha, sigma, probe, on_fake, on_ratio, p_mean=0.9, p_std=0.5):
    """The expected critic loss for Gaussian p and q, at the exact denoiser and log ratio plus so much of a probe."""
    z, e, weight = normal_pairs(reach=9.0)

    def log_ratio(x):
        p_wide, q_wide = math.hypot(p_std, sigma), math.hypot(A, sigma)
        return normal_log_prob(x, p_mean, p_wide) - normal_log_prob(x, B, q_wide)

    batch = Batch(
        (A * z + B)[:, None], torch.full_like(z, sigma), e[:, None],
        teacher=lambda x, s, label: student_denoiser(x, p_std, p_mean, sigma),
        fake=lambda x, s, label: student_denoiser(x, A, B, sigma) + on_fake * probe(x),
        real=(p_std * z + p_mean)[:, None],
        ratio=lambda x, s, label: (log_ratio(x) + on_ratio * probe(x)).flatten(),
    )
    return (weight * ScoreOfMixture(alpha).critic_loss(batch)).sum()


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
def test_exact_denoiser_and_log_ratio_are_the_mixture_critics_fixed_point(alpha, probe):
    """Derivative zero and curvature positive along every probe of either; nonzero beside it."""
    for side in ("fake", "ratio"):
        for offset, stationary in ((0.0, True), (0.3, False)):
            step = f64(offset).requires_grad_(True)
            size = {"fake": (step, 0.0), "ratio": (0.0, step)}[side]
            first = torch.autograd.grad(mixture_critic(alpha, 0.5, probe, *size), step, create_graph=True)[0]
            second = torch.autograd.grad(first, step)[0]
            if stationary:
                assert abs(float(first.detach())) < 1e-9
                assert float(second) > 1e-3
            else:
                assert abs(float(first.detach())) > 1e-4


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_the_blend_of_two_denoisers_is_the_mixtures_own(alpha):
    """rho D_p + (1 - rho) D_q against the exact denoiser of m = alpha p + (1 - alpha) q, in 2-D."""
    p, q, sigma = mixture_2d(), GaussianMixture(f64([[0.3, 0.2]]), f64([[[1.2, 0.2], [0.2, 0.7]]])), 0.6
    m = GaussianMixture(torch.cat([p.means, q.means]), torch.cat([p.covs, q.covs]),
                        torch.cat([alpha * p.weights, (1 - alpha) * q.weights]))
    x = 2 * torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_r = p.noised(sigma).log_prob(x) - q.noised(sigma).log_prob(x)
    rho = torch.sigmoid(log_r + math.log(alpha / (1 - alpha)))[:, None]
    torch.testing.assert_close(rho * p(x, sigma) + (1 - rho) * q(x, sigma), m(x, sigma))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.2, float("nan")])
def test_score_of_mixture_refuses_a_bad_alpha(alpha):
    with pytest.raises(ValueError, match=r"alpha=.*between 0 and 1"):
        ScoreOfMixture(alpha)


# ------------------------------------------------- Uni-Instruct

FIVE = ["reverse_kl", "forward_kl", "jensen_shannon", "squared_hellinger", "le_cam"]


def expanded(row, target, sigma, students=(A, B)):
    """J = E_q[ h(r) |s_p - s_q|^2 ] at one noise level, as a function of (a, b), on a grid."""
    p = target.noised(sigma)

    def value(x, a, b, cell):
        wide = (a**2 + sigma**2).sqrt()
        log_q, log_p = normal_log_prob(x, b, wide), p.log_prob(x[:, None])
        gap = p.score(x[:, None]).flatten() + (x - b) / wide**2
        return (log_q.exp() * row.log_weight(log_p - log_q).exp() * gap.square()).sum() * cell

    return value


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("kind", ["two", "three"])
@pytest.mark.parametrize("name", FIVE)
def test_uni_instructs_two_terms_are_the_gradient_of_the_expansion(name, kind, sigma):
    """Against autograd of J and, for one parameter, central differences of it: all three agree."""
    row, target = dv.F[name], mixture_1d(kind)
    got = loss_gradient(UniInstruct(row, normalise=False), target, sigma) / sigma**4
    value = expanded(row, target, sigma)
    assert relative_error(got, exact_gradient(value)) < 1e-6
    x, cell = line(-16, 16, 6401)
    step = 1e-4
    up, down = (value(x, f64(A), f64(B + s), cell) for s in (step, -step))
    assert float(got[1]) == pytest.approx(float(up - down) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("name", FIVE)
def test_neither_term_alone_is_the_gradient_but_for_forward_kl(name):
    """Forward KL's landscape h - r h' vanishes, so its "law" term is 0; the others need both."""
    row, target, sigma = dv.F[name], mixture_1d(), 0.6
    rule, exact = UniInstruct(row, normalise=False), exact_gradient(expanded(dv.F[name], mixture_1d(), 0.6))
    law, score = (loss_gradient(rule, target, sigma, term=term) / sigma**4 for term in ("law", "score"))
    assert relative_error(law, exact) > 1e-2
    assert (relative_error(score, exact) < 1e-6) == (name == "forward_kl")
    assert (float(law.abs().max()) < 1e-12) == (name == "forward_kl")


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon"])
def test_the_gradients_of_all_levels_add_up_to_that_of_the_divergence(name):
    """integral of sigma grad J = grad D_f(at sigma_min) - grad D_f(at sigma_max), Gauss-Legendre in log sigma."""
    row, target, low, high = dv.F[name], mixture_1d(), 0.2, 3.0
    nodes, weights = (f64(v.tolist()) for v in np.polynomial.legendre.leggauss(12))
    logs = (math.log(high) + math.log(low)) / 2 + nodes * math.log(high / low) / 2
    total = torch.zeros(2, dtype=torch.float64)
    for log_sigma, weight in zip(logs, weights * math.log(high / low) / 2, strict=True):
        sigma = math.exp(log_sigma)
        total += weight * loss_gradient(UniInstruct(row, normalise=False), target, sigma) / sigma**2
    assert relative_error(total, f_divergence(row, target, low) - f_divergence(row, target, high)) < 1e-4


def test_uni_instruct_with_reverse_kl_is_fisher():
    """h = 1: twice SiD's loss at alpha = 1/2."""
    target = mixture_1d()
    got = loss_gradient(UniInstruct(dv.F["reverse_kl"], normalise=False), target, 0.6)
    assert relative_error(got, 2 * loss_gradient(ScoreIdentity(0.5, normalise=False), target, 0.6)) < 1e-10


def test_critics_with_a_ratio_learn_both():
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    batch = Batch(torch.randn(8, 2, generator=rng), torch.rand(8, generator=rng) + 0.1,
                  torch.randn(8, 2, generator=rng), ring(), small_denoiser(), real=ring().sample(8, rng),
                  ratio=lambda x, s, label: x.sum(1))
    for objective in (DMD2(), OBJECTIVES["f_distill"], UniInstruct(dv.F["jensen_shannon"])):
        torch.testing.assert_close(objective.critic_loss(batch), fake_loss(batch) + ratio_loss(batch))


@pytest.mark.parametrize(("f", "wanted"), [
    (lambda r: r * torch.log(r) - r + 1 + (r - 1) ** 2 / (2 * r), True),  # h = r + 1/r, alike at r and 1/r
    (lambda r: -2 * torch.log(r), False),
])
def test_a_ratio_is_needed_where_h_depends_on_it(f, wanted):
    assert DistributionMatching(dv.from_function(f)).needs_ratio is wanted


def test_a_constant_weight_counts_without_normalisation():
    """h = 2 for f = -2 log r, twice reverse KL's."""
    x0, sigma, noise = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0))
    target = mixture_2d().to(torch.float32)
    batch = Batch(x0, sigma[:, 0].abs() + 0.1, noise, target, lambda x, s, label: x / 2)
    twice = DistributionMatching(dv.from_function(lambda r: -2 * torch.log(r)), normalise=False)
    once = DistributionMatching(dv.F["reverse_kl"], normalise=False)
    torch.testing.assert_close(twice.generator_loss(batch), 2 * once.generator_loss(batch))
