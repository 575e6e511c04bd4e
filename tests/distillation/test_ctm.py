"""CTM: no loss at the exact flow map but the solver's error, what each term is by hand, and who is held fixed."""

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare

from minidistill.distillation import Needs, distill
from minidistill.distillation.batch import column, per_sample
from minidistill.distillation.objectives.ctm import ConsistencyTrajectory
from minidistill.distributions import ring
from minidistill.networks import MLP
from minidistill.teachers import train_denoiser
from tests.distillation.exact_jumps import STD, Bent, batch_of, denoiser, flow, quantile_jump
from tests.helpers import mixture_1d, normal


def test_the_exact_map_is_left_alone_as_the_solvers_steps_shrink():
    """On a mixture of two, whose flow keeps quantiles: Heun's error falls as the square of the levels' number, its
    square as the fourth power, and a student that is a little wrong pays far more."""
    losses = []
    for levels in (20, 40, 80):
        rule = ConsistencyTrajectory(levels=levels, longest=levels, denoising=0.0)
        b = batch_of(rule, 300, student=quantile_jump, teacher=mixture_1d(), std=1.0, d=1)
        losses.append(float(rule.generator_loss(b).mean()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(losses)]
    assert all(3 < order < 6 for order in orders), orders
    rule = ConsistencyTrajectory(levels=80, longest=80, denoising=0.0)
    b = batch_of(rule, 300, student=Bent(a=0.02), teacher=denoiser)
    assert float(rule.generator_loss(b).detach().mean()) > 10 * losses[-1]


@pytest.mark.parametrize("scattered", [False, True])
def test_the_solver_walks_each_sample_as_far_as_was_drawn(scattered):
    """u from t by one to 5 steps and s from the lowest level to u, all alike; the point is where the path is at u."""
    rule = ConsistencyTrajectory(levels=160, longest=5, scattered=scattered)
    b = batch_of(rule, 4000)
    x = b.real + column(b.sigma, b.real) * b.noise
    point, s, u = rule.solve(b, x)
    torch.testing.assert_close(point, flow(x, b.sigma, to=u), rtol=1e-3, atol=1e-3)
    top, bottom, low = (rule.grid.position(level / STD) for level in (b.sigma, u, s))
    steps = (top - bottom)[top >= 5]
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert chisquare(torch.bincount(steps.round().long(), minlength=6)[1:].numpy()).pvalue > 1e-3
    assert (low <= bottom + 1e-3).all()
    far = bottom >= 20
    tenth = (10 * (low[far] + 0.5) / (bottom[far] + 1)).long().clamp(max=9)
    shares = torch.bincount(tenth, minlength=10) / far.sum()
    assert (shares - 0.1).abs().max() < 0.05
    assert top.min() > 0
    off = (top - top.round()).abs() > 1e-3
    assert 0.75 < off.double().mean() < 0.85 if scattered else not off.any()


@pytest.mark.parametrize("scattered", [False, True])
def test_a_share_of_the_jumps_goes_all_the_way(scattered):
    """Six tenths more than would by chance; the others are as before."""
    rule = ConsistencyTrajectory(levels=160, longest=5, scattered=scattered, whole=0.6)
    b = batch_of(rule, 4000)
    _, s, u = rule.solve(b, b.real + column(b.sigma, b.real) * b.noise)
    bottom, low = (rule.grid.position(level / STD) for level in (u, s))
    far = bottom >= 20
    assert abs(float((low[far] < 0.01).double().mean()) - 0.6) < 0.04
    going = far & (low > 0.01)
    shares = torch.bincount((10 * (low[going] + 0.5) / (bottom[going] + 1)).long().clamp(max=9), minlength=10)
    assert (shares / going.sum() - 0.1).abs().max() < 0.05


def test_the_loss_by_hand_and_who_has_a_gradient():
    """The jump to s is the student's own; where both landings end is its average's answer, through which the gradient
    passes without moving it."""
    student, average = Bent(), Bent(0.1, 0.2)
    rule = ConsistencyTrajectory(landing=0.3, denoising=0.5, teacher=False)
    b = batch_of(rule, 200, student=student, target=average)
    x = b.real + column(b.sigma, b.real) * b.noise
    point, s, u = rule.solve(b, x)
    inner = s > 1.001 * 0.004 * STD
    with torch.no_grad():
        landed = average(point, u, None, to=s)
        wanted = torch.where(inner[:, None], average(landed, s), landed)
    mine = student(x, b.sigma, None, to=s)
    ends = torch.where(inner[:, None], average(mine, s), mine)
    consistency = per_sample((ends - wanted).square()) / STD**2
    clean = student(x, b.sigma, None, to=b.sigma, aim=True)
    denoising = per_sample((clean - b.real).square()) * (b.sigma**2 + STD**2) / (b.sigma * STD) ** 2
    terms = rule.terms(b)
    torch.testing.assert_close(terms["consistency"], consistency)
    torch.testing.assert_close(terms["denoising"], 0.5 * denoising)
    torch.testing.assert_close(terms["landing"], 0.3 * per_sample((mine - landed).square()) / STD**2)
    torch.testing.assert_close(student.gradient(terms["consistency"].sum()), student.gradient(consistency.sum()))


def test_the_denoising_term_has_the_denoiser_for_its_minimiser():
    """On the diagonal: at the teacher's answer no loss with `teacher`, and no gradient in the mean without."""
    b = batch_of(ConsistencyTrajectory(), 40_000)
    b.sigma = b.sigma.sort().values[20_000].expand(40_000)  # one level: at low ones the noise of x0 counts a lot
    assert ConsistencyTrajectory(teacher=True).terms(b)["denoising"].max() < 1e-20
    bent = Bent(a=0.0)
    b.student = bent
    noisy, exact = (student_gradient(ConsistencyTrajectory(teacher=t), b, bent) for t in (False, True))
    assert exact.abs().max() < 1e-12
    assert noisy.abs().max() < 0.05  # one that is a tenth too large has a gradient of 0.4


def student_gradient(rule, b, student):
    return student.gradient(rule.terms(b)["denoising"].mean())


def test_with_the_adversarial_term_there_is_a_critic_and_without_none():
    assert Needs.of(ConsistencyTrajectory()) == Needs(
        fake=False, real=True, student_real=True, uniform=True, samples=False, target=2000.0, sigma_init=20.0,
        route="jump")
    needs = Needs.of(ConsistencyTrajectory(adversarial_weight=1.0))
    assert needs.ratio
    assert needs.samples
    assert not needs.fake
    quick = {"steps": 3, "batch_size": 16, "progress": False}
    plain = distill(ring(), objective=ConsistencyTrajectory(levels=8), **quick)
    assert "critic" not in plain.history[-1]
    helped = distill(ring(), objective=ConsistencyTrajectory(levels=8, adversarial_weight=1.0), **quick)
    assert helped.ratio is not None
    assert helped.fake is None
    assert helped.history[-1]["critic"] > 0


def test_the_score_is_read_off_the_diagonal():
    """Of a trained teacher's copy before any step: the student's denoiser is the teacher's."""
    data = ring().sample(64, torch.Generator().manual_seed(0))
    teacher = train_denoiser(data, steps=2, batch_size=16, progress=False)
    done = distill(teacher, data=data, objective=ConsistencyTrajectory(levels=8), steps=1, batch_size=16,
                   learning_rate=1e-12, progress=False)
    x, sigma = normal(5, 2).float(), torch.full((5,), 0.6)
    torch.testing.assert_close(done.ema.denoiser(x, sigma), teacher(x, sigma))
    assert done.ema.denoiser(x, sigma).shape == (5, 2)
    x0 = done.jump(x, sigma, 0.999 * sigma)
    slope = (x - x0) / (0.001 * 0.6)
    torch.testing.assert_close(slope, (x - teacher(x, sigma)) / 0.6, rtol=1e-2, atol=1e-2)


def test_conditional_students_are_told_their_classes():
    x, label = ring(k=3).sample_with_labels(64, torch.Generator().manual_seed(0))
    teacher = train_denoiser(x, MLP((2,), hidden=16, n_classes=3), labels=label, steps=2, batch_size=16, progress=False)
    done = distill(teacher, data=x, labels=label, objective=ConsistencyTrajectory(levels=8, adversarial_weight=1.0),
                   steps=2, batch_size=16, progress=False)
    assert done.sample(6, steps=2, gamma=0.5).isfinite().all()
    with pytest.raises(ValueError, match="label: this model has 3 classes"):
        done.jump(normal(2, 2).float(), 1.0, 0.5)
