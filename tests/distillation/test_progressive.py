"""Progressive distillation and reflow: targets by hand, stages, snapshots, straight ways."""

import itertools
import math

import pytest
import torch

from minidistill.distillation import Needs, distill
from minidistill.distillation.objectives.progressive import Progressive
from minidistill.distillation.objectives.reflow import Reflow
from minidistill.distributions import GaussianMixture, ring
from minidistill.networks import MLP
from minidistill.networks.jumps import angles
from minidistill.samplers import ddim
from minidistill.teachers import train_denoiser
from tests.distillation.exact_jumps import STD, Bent, batch_of, denoiser, flow
from tests.helpers import normal, states_equal

QUICK = {"batch_size": 16, "progress": False}


def test_two_steps_become_one():
    """First stage: a jump to where two DDIM steps of the teacher land, by `samplers.ddim` on the finer grid; DDIM with
    the target lands there too (Salimans & Ho 2022, equation 36, in our coordinates)."""
    rule = Progressive(first=4, inner=1)
    b = batch_of(rule, 60, progress=0.0, student=lambda x, sigma, label=None, to=0.0, aim=False: 0 * x)
    fine = STD * torch.tensor([*angles(8, 20.0), 0.0], dtype=torch.float64)
    aims = []
    for k, sigma in enumerate(b.sigma):
        i = int((fine - sigma).abs().argmin())
        x = (b.real + sigma * b.noise)[k : k + 1]
        end = fine[i + 2]
        there = ddim(denoiser, x, torch.cat([fine[i : i + 3], fine[-1:]] if end > 0 else [fine[i : i + 3]]),
                     trajectory=True)[2]
        aims.append((there - end / sigma * x) / (1 - end / sigma))
    weight = (1 / b.sigma**2).clamp(min=1 / STD**2)
    torch.testing.assert_close(rule.generator_loss(b), weight * torch.cat(aims).square().sum(1), rtol=1e-4, atol=1e-5)
    assert {int((fine - s).abs().argmin()) for s in b.sigma} == {0, 2, 4, 6}


def test_later_stages_halve_the_steps_of_the_student_that_was():
    """Half of the samples begin and end on the stage's grid, the others on that of any stage so far."""
    rule = Progressive(first=8)
    assert rule.needs_snapshots == 4
    assert [rule.stage(p) for p in (0, 0.24, 0.26, 0.5, 0.76, 0.99, 1.0)] == [0, 0, 1, 2, 3, 3, 3]
    grid = torch.tensor([0.0, *angles(8, 20.0)[::-1]])
    for now in range(4):
        b = batch_of(rule, 4000, progress=(now + 0.5) / 4)
        number, stage = rule.stages(b)
        torch.testing.assert_close(grid.double()[number] * STD, b.sigma, rtol=1e-4, atol=1e-6)
        assert (number % 2**stage == 0).all()
        assert (number >= 2**stage).all()
        assert set(stage.tolist()) == set(range(now + 1))
        assert float((stage == now).double().mean()) > 0.25


def test_a_later_jump_is_two_of_the_snapshots():
    """At the exact map's two halves the whole is exact; the teacher is asked for the first stage's jumps only."""
    rule = Progressive(first=8)
    b = batch_of(rule, 400, progress=0.9, student=Bent(), target=flow, teacher=lambda x, sigma, label: 0 * x)
    x = b.real + b.sigma[:, None] * b.noise
    number, stage = rule.stages(b)
    end = STD * ((number - 2**stage).double() * rule.step).tan()
    gap = Bent()(x, b.sigma, to=end, aim=True).detach() - flow(x, b.sigma, to=end, aim=True)
    weight = (1 / b.sigma**2).clamp(min=1 / STD**2)
    later = stage > 0
    got = rule.generator_loss(b).detach()
    torch.testing.assert_close(got[later], (weight * gap.square().sum(1))[later], rtol=1e-5, atol=1e-8)
    last = stage == 3
    assert torch.equal(end[last], 0 * end[last])
    assert not torch.allclose(got[~later], (weight * gap.square().sum(1))[~later])


def test_the_teachers_steps_converge_to_the_path():
    """More DDIM steps in each half: the error of the first stage's target falls like their number's inverse."""
    losses = []
    for inner in (4, 8, 16):
        b = batch_of(Progressive(first=4, inner=inner), 300, progress=0.0)
        losses.append(float(Progressive(first=4, inner=inner).generator_loss(b).mean()))
    orders = [math.log2(a / b) / 2 for a, b in itertools.pairwise(losses)]
    assert all(0.8 < order < 1.3 for order in orders), orders


class Seen(Progressive):
    """Keeps what the target's weights were in each step."""

    def terms(self, batch):
        kept.append(batch.target.__closure__[0].cell_contents.state_dict()["denoiser.network.outward.bias"].clone())
        return super().terms(batch)


kept: list[torch.Tensor] = []


def test_the_target_is_a_snapshot_of_each_stages_beginning(tmp_path):
    """Four stages in 10 steps, begun at steps 0, 3, 5 and 8; a run that is resumed has the same ones, to the bit."""
    kept.clear()
    whole = distill(ring(), objective=Seen(first=8), steps=10, **QUICK)
    changes = [k for k in range(1, 10) if not torch.equal(kept[k], kept[k - 1])]
    assert changes == [3, 5, 8]
    file = tmp_path / "run.safetensors"

    def stop(state):
        if state.step == 6:
            raise KeyboardInterrupt

    options = {"objective": Seen(first=8), "steps": 10, "checkpoint": file, **QUICK}
    with pytest.raises(KeyboardInterrupt):
        distill(ring(), callbacks=[stop], evaluate_every=1, checkpoint_every=1, **options)
    again = distill(ring(), resume=True, **options)
    assert states_equal(again.ema.state_dict(), whole.ema.state_dict())


def test_what_progressive_and_reflow_ask_for():
    assert Needs.of(Progressive(first=16)) == Needs(
        fake=False, real=True, samples=False, uniform=True, snapshots=5, sigma_init=20.0, route="jump")
    assert Needs.of(Reflow(needs_pairs=64)) == Needs(
        fake=False, samples=False, pairs=64, pair_samples=False, sigma_init=20.0, route="line")


# ------------------------------------------------- reflow

def test_reflow_fits_the_velocity_of_the_straight_line_between_partners():
    """In flow's coordinates z_t = (1 - t) y + t e, |v - (e - y)|^2 for v = (z - D) / t, all over sigma_data."""
    rule = Reflow()
    b = batch_of(rule, 100, student=lambda x, sigma, label=None: denoiser(x, sigma))
    b.pair_y, b.pair_z = STD * normal(100, 3, seed=5), normal(100, 3, seed=6)
    y, t = b.pair_y / STD, (b.sigma / (STD + b.sigma))[:, None]
    z = (1 - t) * y + t * b.pair_z
    v = (z - denoiser(STD * z / (1 - t), b.sigma) / STD) / t
    torch.testing.assert_close(rule.generator_loss(b), (v - (b.pair_z - y)).square().sum(1))


def test_a_share_of_the_batch_is_at_the_top_and_the_rest_uniform_in_time():
    b = batch_of(Reflow(top=0.25), 8000)
    top = b.sigma == 20 * STD
    assert float(top.double().mean()) == pytest.approx(0.25, abs=0.03)
    t = (b.sigma / (STD + b.sigma))[~top]
    counts = torch.histc(t.float() * 21 / 20, 10, 0, 1)
    assert float((counts / len(t) - 0.1).abs().max()) < 0.02


def test_reflow_straightens_the_way_and_keeps_the_coupling():
    """On a single Gaussian the flow's map is linear, and the straight line between partners does not depend on
    anything else: one step of the student is the teacher's whole way, and two steps or four are no better."""
    target = GaussianMixture([[1.0, -2.0]], 0.5)
    done = distill(target, objective=Reflow(needs_pairs=512), steps=300, batch_size=64, progress=False)
    z = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    exact = target.means + 0.5 * z
    errors = [float((done.sample(300, steps=k) - exact).norm(dim=1).mean()) for k in (1, 2, 4)]
    assert max(errors) < 0.15, errors


@pytest.mark.parametrize("rule", [Progressive(first=4), Reflow(needs_pairs=64)])
def test_from_a_trained_teachers_weights_and_by_class(rule):
    x, label = ring(k=3).sample_with_labels(64, torch.Generator().manual_seed(0))
    teacher = train_denoiser(x, MLP((2,), hidden=16, n_classes=3), labels=label, steps=2, batch_size=16, progress=False)
    done = distill(teacher, data=x, labels=label, objective=rule, steps=4, **QUICK)
    assert done.sample(6, steps=3).isfinite().all()
    point = 2 * torch.ones(3, 2)
    assert torch.equal(done.jump(point, 2.0, 2.0, torch.arange(3)), point)
