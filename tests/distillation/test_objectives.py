"""The f-divergence and score-implicit objectives have the gradients of what they name: quadrature against autograd.
What holds for all objectives is here too; those with more than one term are proved in `test_matching.py`."""

import math

import pytest
import torch

from minidistill import divergences as dv
from minidistill.distillation import (
    OBJECTIVES,
    Batch,
    DistributionMatching,
    Needs,
    ScoreIdentity,
    ScoreImplicitMatching,
    term_gradients,
)
from minidistill.distillation.objectives.matching import ratio_loss
from minidistill.distributions import GaussianMixture, ring
from minidistill.networks import MLP, Correction, Denoiser, Discriminator, Generator
from minidistill.score_matching import log_uniform_sigma
from tests.helpers import f64, mixture_1d, normal_log_prob, normal_pairs
from tests.quadrature import A, B, exact_gradient, loss_gradient, relative_error, student_denoiser

ROWS = {**dv.F, "alpha": dv.alpha_divergence(0.3), "skew": dv.skew_jensen_shannon(0.25)}
SMOOTH = {"squared_l2": dv.squared_l2(), "pseudo_huber": dv.pseudo_huber(0.3),
          "custom": dv.from_distance(lambda y: y.cosh().flatten(1).sum(1) - y[0].numel())}
DISTANCES = {**SMOOTH, "l2": dv.l2(), "power": dv.power(1.7), "huber, steep": dv.huber(0.2), "huber": dv.huber(50.0)}
# d' of the others jumps or bends at y = 0 or delta, which autograd and the quadrature do not see. So they meet a
# Gaussian so far off that D_q = D_p only 8 standard deviations out.
FAR = GaussianMixture(f64([[3.5]]), 0.6)
WITH_A_FAKE = [name for name in OBJECTIVES if Needs.of(OBJECTIVES[name]).fake]
MEETINGS = [(name, kind) for name in DISTANCES for kind in ("far", *(("two", "three") if name in SMOOTH else ()))]


def target_1d(kind):
    return FAR if kind == "far" else mixture_1d(kind)


@pytest.mark.parametrize("sigma", [0.4, 1.0])
@pytest.mark.parametrize("kind", ["two", "three"])
@pytest.mark.parametrize("name", ROWS)
def test_distribution_matching_has_the_divergences_gradient(name, kind, sigma):
    """grad of the package's loss / sigma^2 = grad of D_f(p_sigma || q_sigma) (f-distill, theorem 1)."""
    row, target = ROWS[name], mixture_1d(kind)
    log_p = target.noised(sigma).log_prob

    def divergence(x, a, b, cell):
        return row.between(log_p(x[:, None]), normal_log_prob(x, b, (a**2 + sigma**2).sqrt()), cell)

    got = loss_gradient(DistributionMatching(row, normalise=False), target, sigma) / sigma**2
    assert relative_error(got, exact_gradient(divergence)) < 1e-6


def score_divergence(distance, target, sigma, frozen_law):
    def value(x, a, b, cell):
        gap = (student_denoiser(x, a, b, sigma) - target(x[:, None], sigma).flatten())[:, None]
        law = normal_log_prob(x, b, (a**2 + sigma**2).sqrt()).exp()
        return ((law.detach() if frozen_law else law) * distance.value(gap)).sum() * cell

    return exact_gradient(value)


@pytest.mark.parametrize("sigma", [0.4, 1.0])
@pytest.mark.parametrize(("name", "kind"), MEETINGS)
def test_sim_has_the_gradient_with_the_law_frozen(name, kind, sigma):
    """grad E_{sg[q]} d(D_q - D_p) (Luo 2024, theorem 3.1), and not the gradient with the law free."""
    target, distance = target_1d(kind), DISTANCES[name]
    got = loss_gradient(ScoreImplicitMatching(distance), target, sigma)
    assert relative_error(got, score_divergence(distance, target, sigma, frozen_law=True)) < 1e-7
    assert relative_error(got, score_divergence(distance, target, sigma, frozen_law=False)) > 1e-2


@pytest.mark.parametrize(("name", "kind"), MEETINGS)
def test_alpha_a_half_has_the_whole_gradient_of_every_distance(name, kind):
    """grad E_q d(D_q - D_p), law and scores free; and alpha = 0.7 has not."""
    target, distance, sigma = target_1d(kind), DISTANCES[name], 0.7
    exact = score_divergence(distance, target, sigma, frozen_law=False)
    got, other = (loss_gradient(ScoreImplicitMatching(distance, alpha=a), target, sigma) for a in (0.5, 0.7))
    assert relative_error(got, exact) < 1e-7
    assert relative_error(other, exact) > 1e-3


@pytest.mark.parametrize("sigma", [0.4, 1.0])
@pytest.mark.parametrize("kind", ["two", "three"])
@pytest.mark.parametrize(("alpha", "fisher", "sim"), [
    (0.5, True, False), (1.0, False, True), (0.0, False, False), (1.2, False, False),
])
def test_score_identity_is_fisher_at_a_half_and_sim_at_one(alpha, fisher, sim, kind, sigma):
    """Twice its gradient equals that of E_q |D_p - D_q|^2 at alpha = 1/2, SIM's at 1, and neither elsewhere."""
    target = mixture_1d(kind)
    got = 2 * loss_gradient(ScoreIdentity(alpha, normalise=False), target, sigma)
    exact = score_divergence(dv.squared_l2(), target, sigma, frozen_law=False)
    matching = loss_gradient(ScoreImplicitMatching(dv.squared_l2()), target, sigma)
    for error, equal in ((relative_error(got, exact), fisher), (relative_error(got, matching), sim)):
        assert error < 1e-8 if equal else error > 1e-3


def test_score_identity_is_the_papers_formula():
    """(1 - alpha) |D_p - D_q|^2 + (D_p - D_q) . (D_q - x0), over mean|x0 - D_p|, sample by sample."""
    batch, _ = tiny_batch(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(batch.fake.denoiser.network.outward.weight)
    p, q = batch.teacher(batch.xt, batch.sigma), batch.fake(batch.xt, batch.sigma)
    wanted = (-0.2 * (p - q).square() + (p - q) * (q - batch.x0)).sum(1) / (batch.x0 - p).abs().mean(1)
    torch.testing.assert_close(ScoreIdentity(1.2).generator_loss(batch), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "alpha"), [((2,), 1.0), ((5,), 1.0), ((3, 4), 1.0), ((1, 4, 4), 1.2)])
def test_sid_takes_the_papers_alpha_for_images_alone(shape, alpha):
    """The loss of `sid` is that of alpha = 1.2 for images and of 1 elsewhere, and not the other; both are slow."""
    n, rng = 6, torch.Generator().manual_seed(0)
    x0, noise, offset = (torch.randn(n, *shape, generator=rng) for _ in range(3))
    batch = Batch(x0, torch.rand(n, generator=rng) + 0.1, noise, lambda x, s, l: x / 2, lambda x, s, l: x / 3 + offset)
    sid = OBJECTIVES["sid"]
    assert sid.alpha_for(x0) == alpha
    losses = {a: ScoreIdentity(a).generator_loss(batch) for a in (1.0, 1.2)}
    assert torch.equal(sid.generator_loss(batch), losses.pop(alpha))
    assert not torch.allclose(sid.generator_loss(batch), *losses.values())
    assert Needs.of(sid) == Needs.of(ScoreIdentity(1.2)) == Needs(critic_steps=5, learning_rate=5e-4)
    assert ScoreIdentity(0.5).alpha_for(x0) == 0.5


def test_diff_instruct_is_reverse_kl_without_the_normaliser():
    target = mixture_1d()
    plain = DistributionMatching(dv.F["reverse_kl"], normalise=False)
    got = loss_gradient(OBJECTIVES["diff_instruct"], target, 0.5)
    assert torch.equal(got, loss_gradient(plain, target, 0.5))
    assert relative_error(loss_gradient(OBJECTIVES["reverse_kl"], target, 0.5), got) > 1e-2


@pytest.mark.parametrize("name", WITH_A_FAKE)
def test_gradient_vanishes_at_the_target(name):
    target = GaussianMixture(f64([[B]]), A)
    gradient = loss_gradient(OBJECTIVES[name], target, 0.6)
    assert gradient.abs().max() < 1e-12
    assert loss_gradient(OBJECTIVES[name], target, 0.6, (A, B + 0.1)).abs().max() > 1e-4


@pytest.mark.parametrize("name", WITH_A_FAKE)
def test_every_objective_pulls_the_mean_towards_the_target(name):
    """A student displaced upwards is moved down: the loss grows with b."""
    target = GaussianMixture(f64([[B]]), A)
    assert loss_gradient(OBJECTIVES[name], target, 0.6, (A, B + 0.3))[1] > 0
    assert loss_gradient(OBJECTIVES[name], target, 0.6, (A, B - 0.3))[1] < 0


@pytest.mark.parametrize("row", [*ROWS.values(), dv.alpha_divergence(0.0)], ids=lambda row: row.name)
def test_only_reverse_kl_needs_no_ratio(row):
    assert DistributionMatching(row).needs_ratio == (row.name not in ("reverse_kl", "alpha(0)"))


def tiny_batch(rng):
    """A batch with all that any objective needs, and the student that made it."""
    target, n = ring(), 32
    torch.manual_seed(0)
    generator = Generator(Denoiser(MLP((2,), hidden=8, depth=1), 1.0), 2.0)
    z = torch.randn(n, 2, generator=rng)
    batch = Batch(
        generator(z), log_uniform_sigma(n, 0.05, 5.0, rng, "cpu"),
        torch.randn(n, 2, generator=rng), target, Correction(target, MLP((2,), hidden=8, depth=1), 1.0),
        ratio=Discriminator(MLP((2,), hidden=8, depth=1, out_features=1), 1.0), real=target.sample(n, rng),
        uniform=torch.rand(n, generator=rng), pair_x0=generator(z), pair_y=target.sample(n, rng),
    )
    return batch, generator


@pytest.mark.parametrize("name", WITH_A_FAKE)
def test_losses_are_finite_one_a_sample_and_reach_their_networks(name):
    objective = OBJECTIVES[name]
    batch, generator = tiny_batch(torch.Generator().manual_seed(0))
    # A Correction starts as the teacher, where some objectives have nothing to learn yet.
    torch.nn.init.normal_(batch.fake.denoiser.network.outward.weight)
    generator_loss = objective.generator_loss(batch)
    torch.testing.assert_close(generator_loss, sum(objective.terms(batch).values()))
    for gradient in torch.autograd.grad(generator_loss.mean(), list(generator.parameters())):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0
    batch.x0 = batch.x0.detach()
    critic_loss = objective.critic_loss(batch)
    for loss in (generator_loss, critic_loss):
        assert loss.shape == (32,)
        assert torch.isfinite(loss).all()
    critic = [batch.fake.denoiser.network.outward.weight]
    if Needs.of(objective).ratio:
        critic.append(batch.ratio.network.outward.weight)
    for gradient in torch.autograd.grad(critic_loss.mean(), critic):
        assert gradient.abs().max() > 0


@pytest.mark.parametrize(("name", "terms"), [
    ("reverse_kl", {"matching"}), ("dmd", {"matching", "regression"}), ("dmd2", {"matching", "adversarial"}),
    ("f_distill", {"matching", "adversarial"}), ("sid", {"identity"}), ("sida", {"identity", "adversarial"}),
    ("uni_instruct", {"law", "score"}),
])
def test_the_terms_gradients_add_up_to_the_losss(name, terms):
    batch, generator = tiny_batch(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(batch.fake.denoiser.network.outward.weight)
    weights = list(generator.parameters())
    parts = term_gradients(OBJECTIVES[name], batch, weights)
    assert parts.keys() == terms
    whole = torch.autograd.grad(OBJECTIVES[name].generator_loss(batch).mean(), weights)
    for k, gradient in enumerate(whole):
        torch.testing.assert_close(sum(part[k] for part in parts.values()), gradient, rtol=1e-4, atol=1e-5)
    assert all(float(torch.cat([g.flatten() for g in part]).norm()) > 0 for part in parts.values())


def test_both_denoisers_are_the_same_whether_the_teacher_is_called_once_or_twice():
    batch, _ = tiny_batch(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(batch.fake.denoiser.network.outward.weight)
    calls = []
    teacher = batch.teacher

    def counted(*arguments):
        calls.append(1)
        return teacher(*arguments)

    once = batch.denoise_both(batch.xt)
    batch.teacher = counted  # no longer the very teacher that the Correction corrects
    for a, b in zip(once, batch.denoise_both(batch.xt), strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 1
    batch.fake._teacher[0] = counted
    batch.denoise_both(batch.xt)
    assert len(calls) == 2


PROBES = {"1": torch.ones_like, "x": lambda x: x, "x^2": torch.square, "sin": torch.sin}


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_the_exact_log_ratio_minimises_ratio_loss(probe):
    """Derivative zero and curvature positive along every probe, by quadrature; nonzero beside the minimiser."""
    z, e, weight = normal_pairs(reach=9.0)
    sigma, p_mean, p_std = 0.5, 0.4, 0.7

    def exact(x):
        p_wide, q_wide = math.hypot(p_std, sigma), math.hypot(A, sigma)
        return normal_log_prob(x, p_mean, p_wide) - normal_log_prob(x, B, q_wide)

    def derivatives(offset):
        step = f64(0.0).requires_grad_(True)
        batch = Batch(
            (A * z + B)[:, None], torch.full_like(z, sigma), e[:, None], mixture_1d(), mixture_1d(),
            real=(p_std * z + p_mean)[:, None],
            ratio=lambda x, s, label: (exact(x) + offset + step * probe(x)).flatten(),
        )
        first = torch.autograd.grad((weight * ratio_loss(batch)).sum(), step, create_graph=True)[0]
        return float(first.detach()), float(torch.autograd.grad(first, step)[0])

    first, second = derivatives(0.0)
    assert abs(first) < 1e-10
    assert second > 1e-3
    assert abs(derivatives(0.2)[0]) > 1e-3


def test_a_trained_discriminator_tracks_the_log_ratio():
    """Correlation above 0.95 with the exact log p_sigma / q_sigma over log-uniform noise levels, and slope near 1."""
    p, q = ring(k=4, radius=1.0, std=0.4), ring(k=3, radius=1.0, std=0.5)
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    ratio = Discriminator(MLP((2,), hidden=64, out_features=1), 0.8)
    steps, n = 1500, 512
    optimizer = torch.optim.Adam(ratio.parameters(), 3e-3)

    def batch_of(n):
        sigma = log_uniform_sigma(n, 0.05, 2.0, rng, "cpu")
        noise = torch.randn(n, 2, generator=rng)
        return Batch(q.sample(n, rng), sigma, noise, p, q, ratio=ratio, real=p.sample(n, rng))

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        loss = ratio_loss(batch_of(n)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    batch = batch_of(2000)
    with torch.no_grad():
        got = ratio(batch.xt, batch.sigma)
    exact = torch.cat([
        p.noised(float(s)).log_prob(x[None]) - q.noised(float(s)).log_prob(x[None])
        for s, x in zip(batch.sigma, batch.xt, strict=True)
    ])
    correlation = float(torch.corrcoef(torch.stack([got, exact]))[0, 1])
    slope = float(torch.cov(torch.stack([got, exact]))[0, 1] / exact.var())
    assert correlation > 0.95
    assert 0.7 < slope < 1.2
