"""Objectives of samples alone: each loss's gradient is that of the distance it names, by autograd; drifting's field by
hand, and as distribution matching; classes move by themselves."""

import copy

import pytest
import torch

from minidistill import divergences, transport
from minidistill.distillation import (
    OBJECTIVES,
    Batch,
    Drifting,
    EmbeddingLoss,
    EnergyScore,
    MeanDiscrepancy,
    Needs,
    SinkhornDivergence,
    distill,
)
from minidistill.distillation.objectives import DistributionMatching
from minidistill.distillation.objectives.distances import energy_pull, kernel_pull, sinkhorn_pull
from minidistill.distillation.objectives.embedding import random_network
from minidistill.distillation.objectives.samples import drift
from minidistill.distributions import ring
from minidistill.teachers import EmpiricalTeacher
from tests.helpers import assert_close, normal, rng, small_ring


def gradients(rule, distance, x, real, sigma_data=1.0, **labels):
    """Of the loss's mean and of the distance, both in the samples x."""
    x = x.requires_grad_()
    batch = Batch(x, torch.ones(len(x)), x, ring(), real=real, sigma_data=sigma_data, **labels)
    loss = rule.generator_loss(batch)
    assert loss.shape == (len(x),)
    wanted = distance(x / sigma_data, real / sigma_data)
    return torch.autograd.grad(loss.mean(), x)[0], torch.autograd.grad(wanted, x)[0]


def mmd(widths, alpha):
    return lambda x, y: transport.mmd(x.flatten(1), y.flatten(1), transport.rational_quadratic(alpha), widths)


def energy(alpha):
    def value(x, y):
        if alpha < 2:
            return transport.energy_distance(x, y, alpha, estimator="unbiased")
        own, both = ((x[:, None] - other).square().sum(2) for other in (x, y))
        return 2 * both.mean() - own.sum() / (len(x) * (len(x) - 1))

    return value


def exactly(rule, epsilon):
    """The same objective with plans that have converged to the last digits."""
    class Exact(type(rule)):
        def velocity(self, x, real, label, real_label):
            return sinkhorn_pull(x, real, epsilon, label, real_label, 1e-10, 5000)

    return Exact()


def sinkhorn(epsilon):
    return lambda x, y: transport.sinkhorn(x, y, epsilon, tolerance=1e-10, max_iterations=5000)


FALLS = {
    "mmd": (MeanDiscrepancy((0.3, 1.0), 0.5), mmd((0.3, 1.0), 0.5)),
    "mmd, other tails": (MeanDiscrepancy((0.7,), 2.0), mmd((0.7,), 2.0)),
    "energy": (EnergyScore(), energy(1.0)), "energy 0.5": (EnergyScore(0.5), energy(0.5)),
    "energy 1.7": (EnergyScore(1.7), energy(1.7)), "energy 2": (EnergyScore(2.0), energy(2.0)),
    "sinkhorn": (exactly(SinkhornDivergence(), 0.3), sinkhorn(0.3)),
}


@pytest.mark.parametrize("name", FALLS)
def test_the_gradient_is_the_distances(name):
    """In the plane, where widths are as they are said, and for data of another unit."""
    rule, distance = FALLS[name]
    for sigma_data in (1.0, 3.0):
        got, wanted = gradients(rule, distance, normal(12, 2), normal(15, 2, seed=1) + 0.5, sigma_data)
        assert_close(got, wanted, 1e-9)


@pytest.mark.parametrize("name", FALLS)
def test_with_classes_it_is_each_classs_distance_by_its_share(name):
    rule, distance = FALLS[name]
    x, real = normal(9, 2), normal(8, 2, seed=1)
    label, real_label = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 1, 1, 0, 3])

    def by_class(x, real):
        return sum(int((label == k).sum()) / 9 * distance(x[label == k], real[real_label == k]) for k in (0, 1))

    got, wanted = gradients(rule, by_class, x, real, label=label, real_label=real_label)
    assert_close(got, wanted, 1e-9)
    assert not got[7:].any()  # nobody real is of their class


@pytest.mark.parametrize("rule", [MeanDiscrepancy(), SinkhornDivergence(), EnergyScore(), Drifting(kernel="laplace")])
def test_in_more_dimensions_it_is_the_same_motion(rule):
    """Samples of the plane written k times beside each other are sqrt(k) times as far apart."""
    x, real = normal(6, 2), normal(9, 2, seed=1)
    flat, high = (
        rule.velocity(x.repeat(1, k), real.repeat(1, k), None, None) for k in (1, 50))
    ratio = high[:, :2] / flat
    assert_close(ratio, ratio.mean().expand_as(ratio), 1e-6)


def test_energy_at_two_only_sees_the_mean():
    """Every sample is moved alike, by the difference of the means, whatever the laws (but for leaving itself out)."""
    x, real = 0.1 * normal(500, 2), 5 * normal(400, 2, seed=1).abs()
    others = (x.sum(0) - x) / 499
    assert_close(energy_pull(x, real, 2.0), 2 * (real.mean(0) - others))
    proper = energy_pull(x, real, 1.0)
    assert (proper - proper.mean(0)).norm() > 0.1 * proper.norm()


def test_a_plan_reaches_every_real_sample_and_rows_of_weights_need_not():
    """Two of the student's samples beside one of two real ones: by nearness both stay there, by a plan one is sent to
    the other."""
    real = torch.tensor([[0.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([[0.0, 0.1], [0.0, -0.1]], dtype=torch.float64)
    plan = sinkhorn_pull(x, real, 0.01, tolerance=1e-9, max_iterations=5000)
    assert float(plan[:, 0].mean()) == pytest.approx(2.0)
    for near in (kernel_pull(x, real, (0.3,), 20.0), drift(x, real, (0.3,))):
        assert near[:, 0].abs().max() < 1e-6


def test_what_is_refused():
    for alpha in (0.0, 2.1, -1.0):
        with pytest.raises(ValueError, match="alpha="):
            EnergyScore(alpha)
    with pytest.raises(ValueError, match=r"kernel='laplac'.*did you mean 'laplace'"):
        drift(normal(3, 2), normal(3, 2), (1.0,), kernel="laplac")


# ------------------------------------------------- drifting

def test_gaussian_drifting_is_distribution_matching_with_two_empirical_denoisers():
    """Its pull at points without noise, at the kernel's width as the level; each sample leaves itself out of the
    student's law."""
    x, real = normal(11, 2), normal(13, 2, seed=1) + 0.3

    def others(at, sigma, label=None):
        return torch.cat([EmpiricalTeacher(torch.cat([x[:i], x[i + 1:]]))(at[i:i + 1], sigma[i]) for i in range(11)])

    for width in (0.2, 1.0):
        batch = Batch(x, torch.full((11,), width, dtype=x.dtype), torch.zeros_like(x), EmpiricalTeacher(real), others)
        pull, _ = DistributionMatching(divergences.F["reverse_kl"], normalise=False).pull(batch)
        assert_close(drift(x, real, (width,)), pull / pull.square().mean().sqrt(), 1e-10)


def test_laplaces_weights_are_normalised_on_both_sides():
    """k = exp(-|x - y| / width) over its row's sum and over its column's, the geometric mean of both; then real ones
    count by the sum of the others' and the others by that of the real ones."""
    x, real, width = normal(5, 2), normal(4, 2, seed=1), 0.6
    points = torch.cat([real, x])
    k = torch.stack([torch.stack([(-(a - b).norm() / width).exp() for b in points]) for a in x])
    k[:, 4:].fill_diagonal_(0)
    weights = (k / k.sum(1, keepdim=True) * k / k.sum(0)).sqrt()
    a, b = weights[:, :4], weights[:, 4:]
    field = torch.stack([
        sum(a[i, j] * b[i].sum() * (real[j] - x[i]) for j in range(4))
        - sum(b[i, j] * a[i].sum() * (x[j] - x[i]) for j in range(5)) for i in range(5)])
    assert_close(drift(x, real, (width,), kernel="laplace"), field / field.square().mean().sqrt())


def test_laplaces_classes_drift_by_themselves():
    x, real = normal(8, 2), normal(9, 2, seed=1)
    label, real_label = torch.tensor([0, 0, 0, 1, 1, 1, 2, 3]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    whole = drift(x, real, (0.5,), label, real_label, "laplace")
    assert torch.isfinite(whole).all()
    assert not whole[6:].any()
    for k in (0, 1):
        mine, alone = whole[label == k], drift(x[label == k], real[real_label == k], (0.5,), kernel="laplace")
        assert_close(mine / mine.norm(), alone / alone.norm())


# ------------------------------------------------- in features of random networks

@pytest.mark.parametrize("shape", [(2,), (1, 8, 8)])
def test_the_embedding_losss_gradient_is_that_of_mmd_in_the_features(shape):
    rule = EmbeddingLoss(width=8, widths=(0.3, 1.0), alpha=0.5, networks=2)
    x, real = normal(9, *shape).requires_grad_(), normal(10, *shape, seed=1)
    batch = Batch(x, torch.ones(9, dtype=x.dtype), x, ring(), real=2 * real, sigma_data=2.0, generator=rng(5))
    batch.x0 = 2 * x
    got = torch.autograd.grad(rule.generator_loss(batch).mean(), x)[0]
    draws, total = rng(5), 0
    for _ in range(2):
        seen, of_real = random_network(torch.cat([x, real]), 2, 8, draws).split([9, 10])
        scale, plane = of_real.detach().std(), (seen.shape[1] / 2) ** 0.5
        total = total + mmd([0.3 * plane, plane], 0.5)(seen / scale, of_real.detach() / scale) / 2
    assert_close(got, torch.autograd.grad(total, x)[0], 1e-9)


def test_random_networks_are_drawn_anew_and_keep_the_spread():
    x = normal(400, 1, 8, 8)
    draws = rng()
    a, b, again = (random_network(x, 2, 16, each) for each in (draws, draws, rng()))
    assert torch.equal(a, again)
    assert not torch.allclose(a, b)
    assert a.shape == (400, 16 * 2 * 2)
    assert 0.5 < float(a.std()) < 4


def test_an_objective_around_another_asks_for_what_both_need():
    alone, joined = EmbeddingLoss(), EmbeddingLoss(OBJECTIVES["dmd2"], weight=0.5)
    assert Needs.of(alone) == Needs(fake=False, student_real=True)
    assert Needs.of(joined) == Needs(ratio=True, student_real=True, critic_steps=5)
    assert copy.deepcopy(joined) == joined
    with pytest.raises(AttributeError, match="no attribute 'noise_levels'"):
        _ = joined.noise_levels
    out = distill(small_ring(), objective=joined, steps=2, batch_size=8, progress=False)
    assert out.fake is not None
    assert out.ratio is not None


def test_the_embedding_loss_joins_as_one_more_term():
    x, real = normal(6, 2), normal(6, 2, seed=1)
    batch = Batch(x, torch.ones(6, dtype=x.dtype), x, ring(), lambda x, s, l: 0.5 * x, real=real)
    rule = OBJECTIVES["reverse_kl"]
    terms = EmbeddingLoss(rule, weight=3.0).terms(batch)
    assert terms.keys() == {"matching", "embedding"}
    assert torch.equal(terms["matching"], rule.terms(batch)["matching"])

    class OneLoss:
        def generator_loss(self, batch):
            return batch.x0.square().sum(1)

    batch.generator = rng()
    whole = EmbeddingLoss(OneLoss(), weight=3.0).generator_loss(batch)
    batch.generator = rng()
    torch.testing.assert_close(whole, x.square().sum(1) + 3 * EmbeddingLoss().generator_loss(batch))
