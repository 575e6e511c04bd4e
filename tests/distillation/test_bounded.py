"""A bound on each sample's pull."""

import pytest
import torch

from minidistill.distillation import OBJECTIVES, Batch, BoundedPull, Needs, ScoreIdentity, distill
from tests.helpers import mixture_2d, normal, small_ring, states_equal


def pulls(rule, x0):
    x0 = x0.clone().requires_grad_()
    batch = Batch(x0, torch.full((len(x0),), 0.5).double(), normal(len(x0), 2), mixture_2d(),
                  lambda x, sigma, label: 0.9 * x, sigma_data=2.0)
    return -torch.autograd.grad(rule.generator_loss(batch).mean(), x0)[0] * len(x0) * 2.0


def test_hard_pulls_are_cut_to_the_bound_and_others_left():
    """In units of 1 / sigma_data, of each sample by itself, directions kept."""
    x0 = normal(12, 2, seed=1) * torch.logspace(-1, 3, 12).double()[:, None]
    usual = pulls(ScoreIdentity(1.0), x0)
    sizes = usual.norm(dim=1)
    most = float(sizes.median())
    got = pulls(BoundedPull(ScoreIdentity(1.0), most), x0)
    torch.testing.assert_close(got.norm(dim=1), sizes.clamp(max=most))
    torch.testing.assert_close(got / got.norm(dim=1, keepdim=True), usual / sizes[:, None])
    assert (sizes > 2 * most).any()


def test_the_loss_is_the_inner_ones_and_so_are_the_needs():
    rule = BoundedPull(OBJECTIVES["sida"])
    assert Needs.of(rule) == Needs.of(OBJECTIVES["sida"])
    options = {"steps": 4, "batch_size": 16, "progress": False}
    wide, plain = (distill(small_ring(), objective=one, **options)
                   for one in (BoundedPull(OBJECTIVES["sim"], 1e9), "sim"))
    assert states_equal(wide.ema.state_dict(), plain.ema.state_dict())
    with pytest.raises(ValueError, match="most=0"):
        BoundedPull(OBJECTIVES["sim"], 0)
