"""SDS and ASD: what stands for the student's denoiser, and where that leads."""

import pytest
import torch

from minidistill import divergences as dv
from minidistill.distillation import (
    OBJECTIVES,
    AsynchronousScore,
    Batch,
    DistributionMatching,
    Needs,
    ScoreDistillation,
    distill,
)
from minidistill.distributions import GaussianMixture
from tests.helpers import assert_close, line, mixture_1d, mixture_2d, normal, normal_pairs, rng

VSD = DistributionMatching(dv.F["reverse_kl"], normalise=False)
SDS, ASD = ScoreDistillation(normalise=False), AsynchronousScore(normalise=False)


def pulls(rule, law, x0, noise, sigma, fake=None, uniform=None):
    """Minus the gradient of each loss in its sample, (n, d)."""
    x0 = x0.clone().requires_grad_()
    loss = rule.generator_loss(Batch(x0, sigma, noise, law, fake, uniform=uniform))
    return -torch.autograd.grad(loss.sum(), x0)[0]


def test_neither_trains_anything_but_the_student():
    for name in ("sds", "asd"):
        needs = Needs.of(OBJECTIVES[name])
        assert not any((needs.fake, needs.ratio, needs.data))
        out = distill(GaussianMixture([[1.0, 0.0]], 0.5), objective=name, steps=2, batch_size=8, progress=False)
        assert out.fake is None


def test_sds_is_distribution_matching_against_a_point():
    law, x0, noise = mixture_2d(), normal(9, 2), normal(9, 2, seed=1)
    sigma = torch.linspace(0.2, 2, 9, dtype=x0.dtype)
    wanted = pulls(VSD, law, x0, noise, sigma, fake=lambda x, s, label: x0)
    assert_close(pulls(SDS, law, x0, noise, sigma), wanted)
    assert_close(wanted, law(x0 + sigma[:, None] * noise, sigma) - x0)


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_sdss_mean_pull_climbs_the_smoothed_log_density(sigma):
    """sigma^2 d/dx of E_e log p_sigma(x + sigma e), by quadrature: every sample by itself, whatever the others do."""
    law = mixture_1d()
    nodes, cell = line(-8, 8, 801)
    weight = torch.exp(-nodes.square() / 2) * cell / (2 * torch.pi) ** 0.5
    for at in (-1.5, 0.1, 0.9):
        x = torch.full((801, 1), at, dtype=torch.float64)
        got = (weight * pulls(SDS, law, x, nodes[:, None], torch.full_like(nodes, sigma)).flatten()).sum()
        where = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        climbed = (weight * law.noised(sigma).log_prob(where + sigma * nodes[:, None])).sum()
        assert_close(got, sigma**2 * torch.autograd.grad(climbed, where)[0])


def test_asds_stand_in_is_the_noise_seen_at_a_higher_level():
    """The paper's gradient, noise found at x_t less noise found at x_t+ with the same e, times sigma; ln sigma+ by eta
    and a drawn share."""
    law, x0, noise = mixture_2d(), normal(9, 2), normal(9, 2, seed=1)
    sigma = torch.linspace(0.2, 2, 9, dtype=x0.dtype)
    u = torch.linspace(0, 1, 9, dtype=x0.dtype)
    later = sigma * (sigma / 0.035) ** (0.1 * u)

    def found(level):
        x = x0 + level[:, None] * noise
        return (x - law(x, level)) / level[:, None]

    got = pulls(ASD, law, x0, noise, sigma, uniform=u)
    assert_close(got, sigma[:, None] * (found(later) - found(sigma)))
    assert not got[0].any()  # drawn 0: the same level
    low = pulls(ASD, law, x0, noise, torch.full_like(sigma, 0.01), uniform=u)
    assert low.abs().max() < 1e-9  # below the lowest level nothing is higher


def test_the_teacher_finds_the_more_of_the_noise_the_more_there_is():
    """E |e_phi(x_t) - e|^2 falls with the level, for samples of its own law: so the noise found at a higher level
    stands the nearer to what there is."""
    law, (z, e, weight) = GaussianMixture([[0.3]], 0.8), normal_pairs()
    law = law.to(torch.float64)
    misses = []
    for sigma in (0.1, 0.3, 1.0, 3.0):
        x = (0.8 * z + 0.3 + sigma * e)[:, None]
        misses.append(float((weight * ((x - law(x, sigma)).flatten() / sigma - e).square()).sum()))
        assert misses[-1] == pytest.approx(0.64 / (0.64 + sigma**2))
    assert misses == sorted(misses, reverse=True)


def test_at_the_teachers_law_vsd_rests_and_asds_pull_varies_less_than_sdss():
    law = mixture_2d()
    x0, noise = law.sample(4000, rng()), normal(4000, 2, seed=1)
    sigma = 0.1 * 30 ** torch.rand(4000, generator=rng(2)).double()
    u = torch.rand(4000, generator=rng(3)).double()
    sizes = {name: float(pulls(rule, law, x0, noise, sigma, law, u).square().mean())
             for name, rule in (("vsd", VSD), ("sds", SDS), ("asd", ASD))}
    assert sizes["vsd"] == 0
    assert 0 < sizes["asd"] < 0.1 * sizes["sds"]


def test_sds_collapses_onto_the_mode():
    """Of a Gaussian law every sample is drawn to its middle; reverse KL keeps its spread."""
    law = GaussianMixture([[1.0, -1.0]], 0.5)
    spreads = {}
    for name in ("sds", "reverse_kl"):
        out = distill(law, objective=name, steps=150, batch_size=64, ema_halflife=500, progress=False)
        spreads[name] = float(out.sample(1000).std(0).mean())
    assert spreads["sds"] < 0.15
    assert spreads["reverse_kl"] > 0.35
