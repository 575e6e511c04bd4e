"""sCM: TrigFlow is EDM's preconditioning, the tangent is df/dt, and none is left at the consistency function."""

import math

import pytest
import torch

from minidistill.distillation import distill
from minidistill.distillation.batch import per_sample
from minidistill.distillation.objectives.scm import ContinuousConsistency, tangent, trig_network
from minidistill.distributions import ring
from minidistill.networks import MLP, Denoiser
from minidistill.teachers import train_denoiser
from tests.distillation.exact_jumps import STD, Bent, batch_of, denoiser, flow, quantile_jump
from tests.helpers import mixture_1d, normal


def points(n=50, d=2, std=STD):
    """x_t, t and z, x0 with x_t = cos t x0 + sin t z."""
    t = torch.linspace(0.02, 1.56, n).double()
    x0, z = std * normal(n, d), std * normal(n, d, seed=1)
    return t.cos()[:, None] * x0 + t.sin()[:, None] * z, t, x0, z


def test_edms_network_is_trigflows():
    """F(x_t / sigma_data, t) of EDM's preconditioning, with the sign turned: f = cos t x_t - sin t sigma_data F."""
    torch.manual_seed(0)
    network = MLP((2,), hidden=16, depth=2).double()
    x, t, _, _ = points()
    got = trig_network(Denoiser(network, STD), STD, None)(x, t)
    torch.testing.assert_close(got, -STD * network(x / STD, (STD * t.tan()).log() / 4))


@pytest.mark.parametrize("difference", [None, 1e-5])
def test_the_tangent_is_the_derivative_along_the_path(difference):
    """cos t df/dt of a consistency function that is none, by central differences along x0 cos t + z sin t."""
    x, t, x0, z = points()

    def f(t):
        return Bent()(x=(t.cos()[:, None] * x0 + t.sin()[:, None] * z) / t.cos()[:, None], sigma=STD * t.tan())

    velocity = t.cos()[:, None] * z - t.sin()[:, None] * x0
    h = 1e-5 * t.cos()
    with torch.no_grad():
        wanted = t.cos()[:, None] * (f(t + h) - f(t - h)) / (2 * h)[:, None]
        network = trig_network(Bent(), STD, None)
        got = tangent(network, x, t, velocity, difference=difference)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert got.abs().max() > 0.1


def test_at_the_consistency_function_there_is_no_tangent():
    """Along the teacher's own velocity: of a Gaussian in closed form; of a mixture of two, whose end keeps quantiles,
    by differences."""
    x, t, _, _ = points()
    velocity = trig_network(denoiser, STD, None)(x, t)
    assert tangent(trig_network(flow, STD, None), x, t, velocity).abs().max() < 1e-6
    x, t, _, _ = points(d=1, std=1.0)
    inside = (t > 0.1) & (t < 1.5)
    x, t = x[inside], t[inside]
    velocity = trig_network(mixture_1d(), 1.0, None)(x, t)
    network = trig_network(quantile_jump, 1.0, None)
    assert tangent(network, x, t, velocity, difference=1e-4).abs().max() < 1e-5


def test_the_warm_up_leaves_the_second_part_out():
    """At its beginning what is left is -cos^2 (F - dx/dt): velocity matching."""
    x, t, x0, z = points()
    velocity, network = t.cos()[:, None] * z - t.sin()[:, None] * x0, trig_network(Bent(), STD, None)
    with torch.no_grad():
        first, half, whole = (tangent(network, x, t, velocity, rise) for rise in (0.0, 0.5, 1.0))
        torch.testing.assert_close(first, -t.cos().square()[:, None] * (network(x, t) - velocity))
        torch.testing.assert_close(half, (first + whole) / 2)
    rule = ContinuousConsistency(rise=0.5, normalise=None, teacher=False)
    b = batch_of(rule, progress=0.25, student=Bent())
    full = ContinuousConsistency(rise=0.0, normalise=None, teacher=False).generator_loss(b)
    assert not torch.allclose(rule.generator_loss(b), full)
    b.progress = 0.5
    torch.testing.assert_close(rule.generator_loss(b), full)


def test_the_network_is_moved_against_the_normalised_tangent():
    """The gradient of |F - F- - g|^2 is -2 g dF, g = tangent / (its root mean square + 0.1), in standard deviations."""
    rule, student = ContinuousConsistency(rise=0.0, teacher=False), Bent()
    b = batch_of(rule, 40, student=student)
    t = (b.sigma / STD).atan()
    c, s = t.cos()[:, None], t.sin()[:, None]
    x, velocity = c * b.real + s * STD * b.noise, c * STD * b.noise - s * b.real
    network = trig_network(student, STD, None)
    with torch.no_grad():
        g = tangent(network, x, t, velocity) / STD
        g = g / (g.square().mean(1, keepdim=True).sqrt() + 0.1)
    wanted = student.gradient(-2 * (g * network(x, t) / STD).sum())
    torch.testing.assert_close(student.gradient(rule.generator_loss(b).sum()), wanted)
    torch.testing.assert_close(rule.generator_loss(b), per_sample(g.square()))


def test_levels_are_log_normal():
    rule = ContinuousConsistency(log_mean=-1.0, log_std=1.4)
    logs = (batch_of(rule, 20_000).sigma / STD).log()
    assert float(logs.mean()) == pytest.approx(-1.0, abs=5 * 1.4 / math.sqrt(20_000))
    assert float(logs.std()) == pytest.approx(1.4, rel=0.03)


@pytest.mark.parametrize("teachers", [False, True])
def test_students_come_out_of_it(teachers):
    rule = ContinuousConsistency(teacher=teachers)
    quick = {"objective": rule, "steps": 4, "batch_size": 16, "progress": False}
    data = ring().sample(64, torch.Generator().manual_seed(0))
    teacher = train_denoiser(data, steps=2, batch_size=16, progress=False)
    for done in (distill(ring(), **quick), distill(teacher, data=data, **quick)):
        assert done.sample(5, steps=2).isfinite().all()
        assert torch.equal(done.jump(2 * torch.ones(3, 2), 2.0), done.ema.denoiser(2 * torch.ones(3, 2), 2.0))
