"""Inductive moment matching: its kernel, its levels, its loss by hand, and what is left of it without groups."""

import math

import pytest
import torch

from minidistill import transport
from minidistill.distillation import Batch, MomentMatching, Settings
from minidistill.distillation.objectives.moments import laplace_mmd
from minidistill.distributions import GaussianMixture, ring
from tests.helpers import assert_close, normal, rng

SETTINGS = Settings(3, 8, 3, 2e-3, 5e-3, 2.0, 40.0, 0.07, 10.0, (), 1e5, 0, None, 0.2, "linear", False, 0, "learned")


def test_the_kernel_is_laplaces_and_every_pair_counts():
    laplace = transport.Kernel(lambda s: torch.exp(-s.sqrt()), lambda s: s, lambda s: s)
    x, y = normal(3, 7, 4), normal(3, 7, 4, seed=1) + 0.5
    wanted = [transport.mmd(a, b, laplace, 4.0, estimator="biased") for a, b in zip(x, y, strict=True)]
    assert_close(laplace_mmd(x, y), torch.stack(wanted), 1e-8)
    assert laplace_mmd(x, x).abs().max() < 1e-12
    label = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 3)
    parts = [(laplace_mmd(x[:, i], y[:, i]), n) for i, n in ((slice(3), 3), (slice(3, 7), 4))]
    assert_close(laplace_mmd(x, y, label), sum(n**2 / 49 * part for part, n in parts))


def batch_of(rule, n, student, uniform=None, progress=0.0, label=None):
    sigma = rule.noise_levels(n, SETTINGS, progress, rng(3)).double()
    uniform = torch.rand(n, generator=rng(4)).double() if uniform is None else uniform
    return Batch(torch.zeros(n, 3), sigma, normal(n, 3), ring(), real=normal(n, 3, seed=1), sigma_data=2.0,
                 uniform=uniform, student=student, real_label=label)


def straight(x, sigma, label=None, to=None):
    """The jump whose aim is a third of where it stands."""
    share = (to / sigma)[:, None]
    return share * x + (1 - share) * x / 3


def test_groups_share_levels_in_order():
    rule = MomentMatching(group=4, steps=10)
    batch = batch_of(rule, 400, straight)
    groups = batch.sigma.view(-1, 4)
    assert (groups == groups[:, :1]).all()
    assert float(batch.sigma.max()) == pytest.approx(2.0 * 20)
    t, r, s = rule.levels(batch, 4)
    assert ((s <= r) & (r < t)).all()
    inner = r > s
    gap = (t / 2).atan() - (r / 2).atan()
    assert_close(gap[inner], torch.full_like(gap[inner], math.pi / 20))
    assert inner.any()
    assert (~inner).any()


def test_the_loss_is_the_papers():
    """Group by group, from jumps written out; where r = s the aim is the real sample at that level."""
    rule = MomentMatching(group=4, steps=10)
    batch = batch_of(rule, 24, straight)
    (t, r, s), got = rule.levels(batch, 4), rule.terms(batch)["moments"]
    assert got.shape == (24,)
    for g in range(6):
        mine = slice(4 * g, 4 * g + 4)
        upper, lower = (batch.real[mine] + level[g] * batch.noise[mine] for level in (t, r))
        made, wanted = (x * (s[g] / a[g] + (1 - s[g] / a[g]) / 3) for x, a in ((upper, t), (lower, r)))
        assert r[g] > s[g] or torch.allclose(wanted, lower)
        reach = (t[g] - s[g]) / (1 + (t[g] / 2) ** 2).sqrt()
        angle = (t[g] / 2).atan()
        weight = torch.sigmoid(5 + 2 * angle.tan().log()) / angle.sin()
        wanted = weight * laplace_mmd(made[None] / reach, wanted[None] / reach)
        assert_close(got[mine], wanted.expand(4))


def test_alone_a_sample_is_matched_to_its_own_as_in_consistency():
    rule = MomentMatching(group=1, steps=10)
    batch = batch_of(rule, 7, straight)
    t, r, s = rule.levels(batch, 1)
    made, wanted = (straight(batch.real + a[:, None] * batch.noise, a, to=s) for a in (t, r))
    gap = (made - wanted).norm(dim=1) * (1 + (t / 2).square()).sqrt() / (t - s)
    assert_close(rule.terms(batch)["moments"] / rule.weight(t / 2), 2 - 2 * (-gap / 3).exp())


def test_the_flow_map_of_a_gaussian_matches_moments():
    """With exact jumps to 0 both laws are the data's, and the loss against them (one step, so that r = s) is what 1,024
    samples of one law show: below that of the denoiser in their place, which lands where nobody is spread."""
    law = GaussianMixture([[0.0, 0.0, 0.0]], 2.0)

    def exact(x, sigma, label=None, to=None):
        return x * ((4 + to**2) / (4 + sigma**2)).sqrt()[:, None]

    def denoiser(x, sigma, label=None, to=None):
        share = (to / sigma)[:, None]
        return share * x + (1 - share) * law(x.float(), sigma.float()).double()

    rule = MomentMatching(group=1024, steps=1)
    values = []
    for student in (exact, denoiser):
        batch = batch_of(rule, 4096, student, uniform=torch.zeros(4096).double())
        batch.real, batch.sigma = 2 * batch.real, torch.full_like(batch.sigma, 10.0)
        values.append(float(rule.terms(batch)["moments"].mean()))
    assert values[0] < 0.1 * values[1]
