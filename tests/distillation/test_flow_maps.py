"""Flow maps: their identities on exact maps, their gradients by hand, and what each member is in its limits."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm

from minidistill.distillation import Needs, distill
from minidistill.distillation.batch import column, per_sample
from minidistill.distillation.objectives.flow_maps import (
    AlphaFlow,
    FlowMap,
    ImprovedMeanFlow,
    MeanFlow,
    mean_velocity,
)
from minidistill.distributions import ring
from minidistill.networks import UNet
from minidistill.processes import as_model
from minidistill.processes import flow as flow_process
from minidistill.teachers import train_denoiser
from minidistill.training import Speed, parallel
from tests.distillation.exact_jumps import STD, Bent, batch_of, denoiser, flow, quantile_jump
from tests.helpers import mixture_1d, normal

PLAIN: dict[str, Any] = {"power": 0.0, "diagonal": 0.25, "teacher": False}
TAUGHT = PLAIN | {"teacher": True}


def test_the_mean_velocity_is_the_mean_of_the_velocity_along_the_path():
    """On a mixture of two, whose flow keeps quantiles: u(z, r, t) = 1 / (t - r) times the integral of v over the path
    from t to r, by Gauss-Legendre quadrature of the velocity that processes/ makes of the exact denoiser."""
    mixture = mixture_1d()
    v = as_model(mixture, flow_process(), "velocity")
    z, r, t = normal(40, 1), torch.linspace(0.05, 0.6, 40).double(), torch.linspace(0.3, 0.95, 40).double()
    got = mean_velocity(quantile_jump, 1.0, None)(z, r, t)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    total = torch.zeros_like(z)
    for node, weight in zip(nodes, weights, strict=True):
        tau = r + (t - r) * (node + 1) / 2
        at = quantile_jump(z / (1 - t)[:, None], t / (1 - t), to=tau / (1 - tau)) * (1 - tau)[:, None]
        total += weight / 2 * v(at, tau)
    torch.testing.assert_close(got, total, rtol=1e-8, atol=1e-8)


def test_on_the_diagonal_it_is_the_velocity():
    z, t = normal(30, 3), torch.linspace(0.05, 0.95, 30).double()
    v = as_model(lambda x, sigma: denoiser(STD * x, STD * sigma) / STD, flow_process(), "velocity")
    torch.testing.assert_close(mean_velocity(flow, STD, None)(z, t, t), v(z, t))


@pytest.mark.parametrize("rule", [
    MeanFlow(**TAUGHT), ImprovedMeanFlow(**TAUGHT), AlphaFlow(**TAUGHT),
    FlowMap(**TAUGHT),
])
def test_the_exact_map_has_no_loss(rule):
    """Velocities of the teacher: nothing is left to chance. A bent map has one, on the diagonal and off it."""
    batch = batch_of(rule, progress=1.0)
    assert rule.generator_loss(batch).max() < 1e-18
    bent = rule.generator_loss(batch_of(rule, progress=1.0, student=Bent()))
    assert (bent[batch.uniform < 0.25] > 1e-6).all()
    assert (bent[batch.uniform >= 0.25] > 1e-9).double().mean() > 0.95


def test_the_students_own_velocity_makes_no_difference_where_it_is_exact():
    """Lagrangian self-distillation off the diagonal, with the data's velocity on it."""
    rule = FlowMap(**PLAIN)
    batch = batch_of(rule)
    off = (batch.uniform >= 0.25) & (batch.sigma > 0.2)  # at 1e-3 and below the velocity is taken at 1e-3
    assert rule.generator_loss(batch)[off].max() < 1e-4
    _, r, _, _ = rule.start(batch)
    assert rule.generator_loss(batch)[off & (r > 1e-3)].max() < 1e-18


def test_differences_converge_to_the_derivative_with_their_step():
    """On the mixture's map, which no rule differentiates: mean flow's residual, 0 for the derivative, halves with the
    step. Its two sides agree, which is the identity u = v - (t - r) du/dt."""
    losses = []
    for step in (0.04, 0.02, 0.01):
        rule = MeanFlow(teacher=True, difference=step, power=0.0, diagonal=0.0)
        b = batch_of(rule, 400, student=quantile_jump, teacher=mixture_1d(), std=1.0, d=1)
        keep = b.sigma < 20
        losses.append(float(rule.generator_loss(b)[keep].mean()))
    orders = [math.log2(a / b) / 2 for a, b in itertools.pairwise(losses)]
    assert all(0.8 < order < 1.2 for order in orders), orders


def test_only_the_mean_velocity_is_moved_by_mean_flow():
    """Its gradient is that of |u - c|^2 at c = v - (t - r) du/dt, here by central differences."""
    rule, student = MeanFlow(**PLAIN), Bent()
    batch = batch_of(rule, student=student)
    got = student.gradient(rule.generator_loss(batch).sum())
    u, (z, r, t, v), h = mean_velocity(student, STD, None), rule.start(batch), 1e-5
    with torch.no_grad():
        rate = (u(z + h * v, r, t + h) - u(z - h * v, r, t - h)) / (2 * h)
        wanted = v - column(t - r, z) * rate
    torch.testing.assert_close(got, student.gradient((u(z, r, t) - wanted).square().sum()), rtol=1e-6, atol=1e-6)


def test_the_adaptive_weight_scales_each_samples_gradient():
    student = Bent()
    batch = batch_of(MeanFlow(**PLAIN), student=student)
    plain = MeanFlow(**PLAIN).generator_loss(batch)
    for power in (0.5, 1.0):
        rule = MeanFlow(power=power, floor=0.02, diagonal=0.25, teacher=False)
        loss = rule.generator_loss(batch)
        torch.testing.assert_close(loss, plain / (plain + 0.02) ** power)
        weight = (plain.detach() + 0.02) ** -power
        torch.testing.assert_close(student.gradient(loss.sum()), student.gradient((weight * plain).sum()))
        plain = MeanFlow(**PLAIN).generator_loss(batch)


# ------------------------------------------------- the members

def test_improved_mean_flow_is_mean_flow_where_the_velocity_is_exact():
    """The same residual with the teacher's velocity; with the sample's own, its derivative is along the student's."""
    one, other = (rule(**TAUGHT) for rule in (MeanFlow, ImprovedMeanFlow))
    batch = batch_of(one)
    torch.testing.assert_close(one.generator_loss(batch), other.generator_loss(batch), rtol=1e-9, atol=1e-18)
    rule = ImprovedMeanFlow(**PLAIN)
    z, r, t, v = rule.start(batch)
    u, h, own = mean_velocity(flow, STD, None), 1e-5, mean_velocity(flow, STD, None)(z, t, t)
    rate = (u(z + h * own, r, t + h) - u(z - h * own, r, t - h)) / (2 * h)
    by_hand = per_sample((u(z, r, t) + column(t - r, z) * rate - v).square())
    torch.testing.assert_close(rule.generator_loss(batch), by_hand, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(by_hand, MeanFlow(**PLAIN).generator_loss(batch), rtol=1e-3)


def test_an_auxiliary_network_tells_the_velocity():
    """An exact one stands for the exact student's diagonal; of a wrong one the derivative is along its own velocity.
    Its loss is denoising, each level's weighed to about 1, which the exact denoiser's is."""
    rule, plain = ImprovedMeanFlow(auxiliary=True, **PLAIN), ImprovedMeanFlow(**PLAIN)
    batch = batch_of(plain, own=denoiser)
    torch.testing.assert_close(rule.generator_loss(batch), plain.generator_loss(batch), rtol=1e-9, atol=1e-12)
    batch.own = lambda x, sigma, label=None: 0.8 * denoiser(x, sigma)
    z, r, t, v = rule.start(batch)
    tt = column(t, z)
    u, h, own = mean_velocity(flow, STD, None), 1e-5, (z - batch.own(STD * z / (1 - tt), STD * t / (1 - t)) / STD) / tt
    rate = (u(z + h * own, r, t + h) - u(z - h * own, r, t - h)) / (2 * h)
    by_hand = per_sample((u(z, r, t) + column(t - r, z) * rate - v).square())
    torch.testing.assert_close(rule.generator_loss(batch), by_hand, rtol=1e-6, atol=1e-8)
    batch = batch_of(plain, n=20_000, own=denoiser)
    assert float(rule.critic_loss(batch).mean()) == pytest.approx(3, rel=0.03)  # dimensions


def test_the_auxiliary_network_learns_and_the_others_train_none():
    """From real samples, towards the exact denoiser."""
    kept, exact, x = {}, ring(), 2 * normal(500, 2).float()

    class Seen(ImprovedMeanFlow):
        def before_training(self, run, settings):
            super().before_training(run, settings)
            kept["own"] = run.own

    errors = []
    for steps in (1, 300):
        done = distill(exact, objective=Seen(auxiliary=True, teacher=False), steps=steps, batch_size=128,
                       progress=False)
        errors.append(float((kept["own"](x, 1.0) - exact(x, 1.0)).detach().square().mean().sqrt()))
    assert errors[1] < 0.3 * errors[0]
    assert done.fake is None
    assert "critic" in done.history[-1]
    assert "critic" not in distill(exact, objective=ImprovedMeanFlow(), steps=2, progress=False).history[-1]


def test_alpha_flow_is_the_papers_at_every_alpha():
    """The gradient of |u - (alpha v + (1 - alpha) u(z_s, r, s))|^2 / alpha, s = t - alpha (t - r)."""
    for alpha in (0.05, 0.5, 1.0):
        rule, student = AlphaFlow(fall=(0.0, 1.0), **PLAIN), Bent()
        object.__setattr__(rule, "alpha", lambda progress, alpha=alpha: alpha)
        batch = batch_of(rule, student=student)
        z, r, t, v = rule.start(batch)
        off = r < t  # on the diagonal there is no jump, and the paper has no alpha there
        u, s = mean_velocity(student, STD, None), t - alpha * (t - r)
        with torch.no_grad():
            mixed = alpha * v + (1 - alpha) * u(z - column(t - s, z) * v, r, s)
        paper = (per_sample((u(z, r, t) - mixed).square()) / alpha)[off].sum()
        torch.testing.assert_close(student.gradient(rule.generator_loss(batch)[off].sum()), student.gradient(paper))


def test_alpha_flow_ends_as_mean_flow_and_begins_as_flow_matching():
    rule, mean = AlphaFlow(**PLAIN), MeanFlow(**PLAIN)
    student = Bent()
    batch = batch_of(rule, student=student, progress=1.0)
    assert rule.alpha(1.0) == 0
    torch.testing.assert_close(rule.generator_loss(batch), mean.generator_loss(batch))
    near = AlphaFlow(least=0.0, **PLAIN)
    object.__setattr__(near, "alpha", lambda progress: 1e-6)
    torch.testing.assert_close(near.generator_loss(batch), mean.generator_loss(batch), rtol=1e-3, atol=1e-4)
    batch.progress = 0.0
    z, r, t, v = rule.start(batch)
    assert rule.alpha(0.0) == 1
    flow_matching = per_sample((mean_velocity(student, STD, None)(z, r, t) - v).square())
    torch.testing.assert_close(rule.generator_loss(batch), flow_matching)
    values = [rule.alpha(k / 100) for k in range(101)]
    assert values == sorted(values, reverse=True)
    assert rule.alpha(0.35) == pytest.approx(0.5)


def test_lagrangian_self_distillation_moves_the_derivative_too():
    """Its gradient is that of |u - (t - r) du/dr - c|^2 with the derivative's own, by central differences."""
    rule, student, h = FlowMap(**PLAIN), Bent(), 1e-5
    batch = batch_of(rule, student=student)
    z, r, t, v = rule.start(batch)
    u = mean_velocity(student, STD, None)
    rate = (u(z, r + h, t) - u(z, r - h, t)) / (2 * h)
    mean, span = u(z, r, t), column(t - r, z)
    with torch.no_grad():
        low = r.clamp(min=1e-3)
        wanted = torch.where(span > 0, u(z - span * mean, low, low), v)
    by_hand = student.gradient(per_sample((mean - span * rate - wanted).square()).sum())
    torch.testing.assert_close(student.gradient(rule.generator_loss(batch).sum()), by_hand, rtol=1e-6, atol=1e-6)
    near = student.gradient(FlowMap(difference=1e-5, **PLAIN).generator_loss(batch).sum())
    torch.testing.assert_close(near, by_hand, rtol=1e-3, atol=1e-3)


def test_with_several_processes_it_asks_for_differences(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    rule = FlowMap()
    with pytest.raises(RuntimeError, match=r"several processes .*; wanted FlowMap\(difference="):
        rule.generator_loss(batch_of(rule))
    assert FlowMap(difference=0.01).generator_loss(batch_of(rule)).isfinite().all()


# ------------------------------------------------- times

def test_the_two_times_are_two_draws_in_order():
    """Of logit-normal draws: t the larger, r the smaller, by Kolmogorov and Smirnov; r = t for the share `diagonal`."""
    rule = MeanFlow(diagonal=0.0, logit=(-0.4, 1.0))
    batch = batch_of(rule, 4000)
    _, r, t, _ = rule.start(batch)
    law = norm(-0.4, 1.0)
    assert kstest(torch.logit(t).numpy(), lambda x: law.cdf(x) ** 2).pvalue > 1e-3
    assert kstest(torch.logit(r).numpy(), lambda x: 1 - (1 - law.cdf(x)) ** 2).pvalue > 1e-3
    assert (r <= t).all()
    _, r, t, _ = MeanFlow(diagonal=0.6).start(batch)
    assert float((r == t).double().mean()) == pytest.approx(0.6, abs=0.03)
    _, r, t, _ = MeanFlow(diagonal=1.0).start(batch)
    assert torch.equal(r, t)


@pytest.mark.parametrize("rule", [
    MeanFlow(), ImprovedMeanFlow(), ImprovedMeanFlow(auxiliary=True), AlphaFlow(), FlowMap()])
def test_students_that_jump_come_out(rule):
    """From the ring's samples, and from a trained teacher's weights; jumps compose and any number of calls samples."""
    assert (Needs.of(rule).route, Needs.of(rule).samples, Needs.of(rule).fake) == ("jump", False, False)
    quick = {"objective": rule, "steps": 4, "batch_size": 16, "progress": False}
    data = ring().sample(64, torch.Generator().manual_seed(0))
    teacher = train_denoiser(data, steps=2, batch_size=16, progress=False)
    for done in (distill(ring(), **quick), distill(teacher, data=data, **quick)):
        assert done.sample(5, steps=3).isfinite().all()
        x = 2 * normal(4, 2).float()
        assert torch.equal(done.jump(x, 2.0, 2.0), x)
        assert not torch.equal(done.jump(x, 2.0, 1.0), x)


@pytest.mark.parametrize("name", ["mean_flow", "flow_map", "scm"])
def test_images_by_class_with_attention_and_in_bfloat16(name):
    """Forward derivatives are taken in the weights' own precision; the losses agree with float32's."""
    images, label = normal(32, 1, 8, 8).float().clamp(-1, 1), torch.arange(32) % 3
    network = UNet((1, 8, 8), channels=8, multipliers=(1, 2), blocks=1, attention=(4,), n_classes=3)
    teacher = train_denoiser(images, network, labels=label, steps=1, batch_size=8, progress=False)
    losses = []
    for speed in (Speed(), Speed("bfloat16")):
        done = distill(teacher, objective=name, data=images, labels=label, steps=2, batch_size=8, speed=speed,
                       progress=False)
        assert done.sample(3, steps=2).isfinite().all()
        losses.append(done.history[-1]["generator"])
    if name != "scm":  # whose first tangents, of a copy of its teacher, are rounding
        assert losses[1] == pytest.approx(losses[0], rel=0.05)
