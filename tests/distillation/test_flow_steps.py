"""Wasserstein flows: the student's gradient, the critic's least point, the first step's place; particles whose energy
falls."""

import pytest
import torch

from minidistill import divergences as dv
from minidistill.distillation import Batch, MeanDiscrepancy, WassersteinFlow, distill, particle_flow, wasserstein_flow
from minidistill.distillation.objectives.distances import kernel_pull
from minidistill.distributions import GaussianMixture
from minidistill.networks.draws import Entrance
from tests.distillation.test_matching import f_divergence
from tests.helpers import assert_close, f64, mixture_1d, normal, normal_log_prob, normal_pairs, rng, small_ring
from tests.quadrature import A, B, loss_gradient, relative_error

PROBES = {"1": torch.ones_like, "x": lambda x: x, "sin": torch.sin}


@pytest.mark.parametrize("name", dv.F)
def test_a_steps_gradient_is_the_divergences_and_the_way_back(name):
    """With the exact ratio: grad D_f plus (G - G_k) dG / a, here for G_k(z) = 0.5 z + 0.1, whose mean way is in closed
    form: E|(A - 0.5) z + B - 0.1|^2 / (2 a sigma_data^2)."""
    target, sigma, a = mixture_1d(), 0.6, 0.7
    z, _, _ = normal_pairs()
    more = {"entry": Entrance(z[:, None]), "sigma_data": 1.3}

    class Rule(WassersteinFlow):
        def terms(self, batch):
            batch.target = lambda x, s, label: 0.5 * x + 0.1
            return super().terms(batch)

    rule = Rule(dv.F[name], size=a)
    got = loss_gradient(rule, target, sigma, **more)
    way = f64([A - 0.5, B - 0.1]) / (a * 1.3**2)
    assert relative_error(got, f_divergence(dv.F[name], target, sigma) + way) < 1e-6
    assert relative_error(loss_gradient(rule, target, sigma, term="way", **more), way) < 1e-8


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
@pytest.mark.parametrize("name", ["jensen_shannon", "reverse_kl", "squared_hellinger"])
def test_the_critic_is_least_at_the_exact_log_ratio_and_minus_the_divergence_there(name, probe):
    z, e, weight = normal_pairs(reach=9.0)
    sigma, p_mean, p_std = 0.5, 0.4, 0.7

    def wide(std):
        return (std**2 + sigma**2) ** 0.5

    def exact(x):
        return normal_log_prob(x, p_mean, wide(p_std)) - normal_log_prob(x, B, wide(A))

    def loss(step):
        batch = Batch((A * z + B)[:, None], torch.full_like(z, sigma), e[:, None], None,
                      real=(p_std * z + p_mean)[:, None],
                      ratio=lambda x, s, label: (exact(x) + step * probe(x)).flatten())
        return (weight * WassersteinFlow(dv.F[name]).critic_loss(batch)).sum()

    step = f64(0.0).requires_grad_(True)
    first = torch.autograd.grad(loss(step), step, create_graph=True)[0]
    assert abs(float(first.detach())) < 1e-9
    assert float(torch.autograd.grad(first, step)[0]) > 1e-3
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    value = dv.F[name].between(normal_log_prob(x, p_mean, wide(p_std)), normal_log_prob(x, B, wide(A)), x[1] - x[0])
    assert float(loss(f64(0.0))) == pytest.approx(-float(value), abs=1e-8)


def test_steps_begin_where_the_last_one_ended():
    """At the first update the way is 0; and within a step the place it began at stays."""
    ways = []

    class Watched(WassersteinFlow):
        def terms(self, batch):
            terms = super().terms(batch)
            ways.append((batch.target(torch.ones(1, 2), None, None), float(terms["way"].mean().detach())))
            return terms

    distill(small_ring(), objective=Watched(needs_snapshots=2), steps=6, batch_size=16, ema_halflife=1.0,
            progress=False)
    places, far = [place for place, _ in ways], [way for _, way in ways]
    assert far[0] == 0
    assert far[2] > 0
    assert torch.equal(places[0], places[2])
    assert not torch.equal(places[2], places[3])
    assert torch.equal(places[3], places[5])


def test_particles_follow_a_distances_gradient_down():
    law = GaussianMixture([[3.0, 0.0]], 0.5)
    x = torch.randn(200, 2, generator=rng())
    real = law.sample(300, rng(1))
    rule = MeanDiscrepancy((1.0,), 0.5)
    flow = particle_flow(x, lambda: real, lambda x, real: rule.velocity(x, real, None, None), steps=5, size=2.0)
    assert flow.positions.shape == (6, 200, 2)
    assert_close(flow.positions[1], x + 2 * kernel_pull(x, real, (1.0,), 0.5), 1e-6)
    gaps = (flow.positions.mean(1) - law.means).norm(dim=1)
    assert (gaps.diff() < 0).all()


def test_the_energy_of_a_wasserstein_flow_falls():
    """Of two Gaussians two deviations apart, in every step but at most one; and all the while they come nearer."""
    law = GaussianMixture([[2.0, 0.0]], 0.7)
    x = torch.randn(300, 2, generator=rng())
    flow = wasserstein_flow(x, law.sample(600, rng(1)), steps=8, size=0.5, rounds=2, critic_steps=40, progress=False)
    assert flow.positions.shape == (9, 300, 2)
    assert (flow.energies.diff() < 0).sum() >= 7
    assert flow.energies[-1] < 0.5 * flow.energies[0]
    gaps = (flow.positions.mean(1) - law.means).norm(dim=1)
    assert (gaps.diff() < 0).all()
    assert gaps[-1] < 0.6 * gaps[0]
    again = wasserstein_flow(x, law.sample(600, rng(1)), steps=1, size=0.5, rounds=2, critic_steps=40, progress=False)
    assert torch.equal(again.positions, flow.positions[:2])


def test_what_is_refused():
    with pytest.raises(ValueError, match="size=0"):
        WassersteinFlow(size=0.0)
    with pytest.raises(ValueError, match="steps=0"):
        wasserstein_flow(normal(9, 2), normal(9, 2), steps=0)
    with pytest.raises(ValueError, match="real"):
        wasserstein_flow(normal(9, 2), normal(9, 3), steps=1)
