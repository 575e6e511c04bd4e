"""Consistency: its levels, its weights, and losses that vanish exactly where the student is the flow map."""

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare, norm

from minidistill.distillation import Batch, Needs, distill
from minidistill.distillation.objectives.consistency import (
    Consistency,
    EasyConsistency,
    Grid,
    doubling,
    log_normal_weights,
    one_step_down,
)
from minidistill.distributions import ring
from minidistill.samplers import karras_sigmas
from minidistill.teachers import train_denoiser
from tests.helpers import normal

STD = 1.7  # of the Gaussian data on which the flow map is known: x sqrt(STD^2 + to^2) / sqrt(STD^2 + sigma^2)


def flow(x, sigma, label=None):
    """The end of the path through x: the consistency function of N(0, STD^2)."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype)
    return x * STD / (STD**2 + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2).sqrt()


def denoiser(x, sigma, label=None):
    sigma = torch.as_tensor(sigma, dtype=x.dtype)
    return x * STD**2 / (STD**2 + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2)


def batch(rule, n=64, progress=0.0, student=flow, **more):
    generator = torch.Generator().manual_seed(0)
    settings = type("S", (), {"sigma_data": STD})()
    sigma = rule.noise_levels(n, settings, progress, generator).double()
    real = STD * normal(n, 3, seed=1).double()
    return Batch(torch.zeros_like(real), sigma, normal(n, 3, seed=2).double(), denoiser, real=real, sigma_data=STD,
                 student=student, progress=progress, **more)


def levels(rule):
    """Of the first grid, ascending, in data units."""
    grid = rule.grid(0.0)
    return STD * grid.level(torch.arange(grid.steps + 1, dtype=torch.float64))


def test_positions_on_the_grid_are_karras_levels():
    """And `position` takes a level back to where it stands."""
    torch.testing.assert_close(
        levels(Consistency(first=12)).flip(0), karras_sigmas(13, 0.004 * STD, 160 * STD, dtype=torch.float64)[:-1])
    grid = Grid(1280, 160.0)
    torch.testing.assert_close(grid.position(grid.level(torch.arange(1281.0))), torch.arange(1281.0), atol=0.01, rtol=0)


def test_steps_double_at_even_times_up_to_the_last():
    """Song & Dhariwal 2024, equation 8, with s0 = 10 and s1 = 1280: eight numbers, each for an eighth of the run."""
    seen = [doubling(k / 800, 10, 1280) for k in range(800)]
    assert [seen[100 * i] for i in range(8)] == [10, 20, 40, 80, 160, 320, 640, 1280]
    changes = [k for k in range(1, 800) if seen[k] != seen[k - 1]]
    assert changes == [100 * i for i in range(1, 8)]
    assert doubling(1.0, 10, 1280) == 1280
    assert doubling(0.99, 10, 70) == 40  # the next would be beyond the last


def test_levels_are_drawn_by_the_log_normal_mass_of_their_step():
    rule = Consistency(first=20, last=20)
    settings = type("S", (), {"sigma_data": STD})()
    drawn = rule.noise_levels(20_000, settings, 0.0, torch.Generator().manual_seed(0))
    grid = karras_sigmas(21, 0.004 * STD, 160 * STD)[:-1].flip(0)
    number = (drawn[:, None] - grid).abs().argmin(1)
    counts = torch.bincount(number, minlength=21)[1:].double()
    # Independently: the normal law of ln sigma in EDM's units, between the ends of each step.
    ends = norm.cdf((grid / (2 * STD)).log().double().numpy(), loc=-1.1, scale=2.0)
    mass = ends[1:] - ends[:-1]
    torch.testing.assert_close(log_normal_weights(grid / STD).double() / 2, torch.tensor(mass), rtol=1e-4, atol=1e-6)
    assert number.min() >= 1
    assert chisquare(counts.numpy(), 20_000 * mass / mass.sum()).pvalue > 1e-3


def test_the_loss_by_hand_with_pseudo_huber_and_the_steps_length():
    rule = Consistency(first=5, last=5)
    b = batch(rule, student=lambda x, sigma, label=None: 0.3 * x + torch.as_tensor(sigma).reshape(-1, 1) ** 0.5)
    grid = levels(rule)
    for k, loss in enumerate(rule.generator_loss(b)):
        i = int((grid - b.sigma[k]).abs().argmin())
        upper, lower = grid[i], grid[i - 1]
        x, below = b.real[k] + upper * b.noise[k], b.real[k] + lower * b.noise[k]
        answer = below if i == 1 else 0.3 * below + lower**0.5
        gap = (0.3 * x + upper**0.5 - answer) / STD
        c = 0.00108 * math.sqrt(3)
        wanted = ((gap.square().sum() + c**2).sqrt() - c) * STD / (upper - lower)
        torch.testing.assert_close(loss, wanted)


def test_at_the_lowest_level_the_answer_is_the_point_itself():
    """Whatever the student says there: f(x, sigma_min) = x."""
    rule = Consistency(first=4, last=4, lognormal=False, huber=None)
    b = batch(rule)
    grid = levels(rule)
    b.sigma = grid[1].expand(64)
    loss = rule.generator_loss(b)
    gap = flow(b.real + grid[1] * b.noise, grid[1]) - (b.real + grid[0] * b.noise)
    torch.testing.assert_close(loss, gap.square().sum(1) / STD**2)


def test_heun_steps_of_the_teacher_keep_to_the_path_to_third_order():
    x, upper = normal(50, 3).double(), torch.linspace(0.5, 3.0, 50).double()[:, None]
    errors = []
    for share in (0.4, 0.2, 0.1):
        lower = upper * (1 - share)
        there = one_step_down(denoiser, x, upper, lower, None)
        exact = flow(x, upper.flatten()) / flow(torch.ones_like(x), lower.flatten())
        errors.append(float((there - exact).abs().max()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(2.6 < order < 3.6 for order in orders), orders


def test_distillation_is_content_with_the_flow_map_as_its_steps_double():
    """With exact answers of the student only the teacher's step errs; its square falls as the sixth power of the steps,
    and a student that is 1 % too large at low levels alone pays far more."""
    losses = []
    for steps in (20, 40, 80):
        rule = Consistency(first=steps, last=steps, teacher_step=True, lognormal=False, huber=None)
        losses.append(float(rule.generator_loss(batch(rule, n=2000)).mean()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(losses)]
    assert all(4.5 < order < 7.5 for order in orders), orders
    bent = batch(rule, n=2000, student=lambda x, sigma, label=None: (
        flow(x, sigma) * (1 + 0.01 * torch.exp(-torch.as_tensor(sigma).double())).reshape(-1, 1)))
    assert float(rule.generator_loss(bent).mean()) > 10 * losses[-1]


def test_a_scattered_grid_meets_all_levels():
    """Four of five upper levels lie between the grid's; the exact map is left alone all the same, up to the teacher's
    step, and where a step would end below the lowest level it ends there, with the point itself for its answer."""
    rule = Consistency(first=40, last=40, teacher_step=True, lognormal=False, huber=None, scattered=True)
    b = batch(rule, n=2000)
    position = rule.grid(0.0).position(b.sigma / STD)
    off = (position - position.round()).abs() > 1e-3
    assert 0.75 < off.double().mean() < 0.85
    assert position.max() == pytest.approx(40, abs=1e-3)
    fixed = Consistency(first=40, last=40, teacher_step=True, lognormal=False, huber=None)
    b.sigma = b.sigma.clamp(min=float(levels(rule)[1]))  # the lowest step is of no length with exact answers
    assert rule.generator_loss(b).mean() < 1.5 * fixed.generator_loss(batch(fixed, n=2000)).mean()
    b.sigma = STD * rule.grid(0.0).level(torch.full((2000,), 0.3, dtype=torch.float64))
    b.student = lambda x, sigma, label=None: 0 * x
    x = b.real + b.sigma[:, None] * b.noise
    wanted = one_step_down(denoiser, x, b.sigma[:, None], torch.full((2000, 1), 0.004 * STD, dtype=torch.float64), None)
    torch.testing.assert_close(rule.generator_loss(b), wanted.square().sum(1) / STD**2)


def test_an_average_gives_the_lower_answer_where_there_is_one():
    rule = Consistency(first=4, last=4, lognormal=False, huber=None)
    plain, with_target = batch(rule), batch(rule, target=lambda x, sigma, label=None: 0 * x)
    grid = levels(rule)
    inner = plain.sigma > 1.01 * grid[1]
    a, b = rule.generator_loss(plain), rule.generator_loss(with_target)
    torch.testing.assert_close(a[~inner], b[~inner])  # next to the lowest level it is not asked
    wanted = flow(plain.real + plain.sigma[:, None] * plain.noise, plain.sigma).square().sum(1) / STD**2
    torch.testing.assert_close(b[inner], wanted[inner])


def test_easy_consistency_begins_as_denoising():
    """Stage 0 with q = 2: r = 0 for every t at which 8 sigmoid(-t) >= 1, and there the clean sample is the answer."""
    rule = EasyConsistency()
    t = torch.tensor([0.1, 1.0, 1.9, 3.0]).double()
    assert rule.below(t, 0.0)[:3].tolist() == [0, 0, 0]
    assert rule.below(t, 0.0)[3] == pytest.approx(3.0 * (1 - 0.5 * (1 + 8 / (1 + math.exp(3.0)))))
    ends = [float((1 - rule.below(t, progress) / t).max()) for progress in (0.0, 0.5, 0.99)]
    assert ends[0] == 1
    assert ends[2] < 0.02 < ends[1]
    b = batch(rule)
    low = b.sigma / (2 * STD) < 1.9
    gap = flow(b.real + b.sigma[:, None] * b.noise, b.sigma) - b.real
    torch.testing.assert_close(rule.generator_loss(b)[low], (gap.norm(dim=1) / b.sigma)[low])


@pytest.mark.parametrize("rule", [Consistency(), EasyConsistency()])
def test_they_ask_for_data_and_for_the_student_at_any_level(rule):
    needs = Needs.of(rule)
    assert (needs.real, needs.samples, needs.fake, needs.sigma_init) == (True, False, False, 160.0)


def test_a_student_is_trained_from_samples_and_from_a_teacher():
    """From the ring's own samples: a one-step student at 160 standard deviations; from a trained teacher's weights
    with a solver's steps and an average for the lower answer."""
    quick = {"batch_size": 32, "progress": False}
    whole = distill(ring(), objective=Consistency(first=4, last=8), steps=6, **quick)
    assert whole.generator.sigma_init == pytest.approx(160 * ring().sigma_data)
    assert whole.fake is None
    assert whole.sample(5).shape == (5, 2)
    data = ring().sample(64, torch.Generator().manual_seed(0))
    teacher = train_denoiser(data, steps=2, batch_size=16, progress=False)
    for rule in (EasyConsistency(), Consistency(first=4, last=4, teacher_step=True, needs_target=100.0)):
        student = distill(teacher, objective=rule, data=data, steps=4, **quick)
        assert student.history[-1]["generator"] > 0


def test_a_consistency_function_is_a_jump_to_the_end_in_any_number_of_calls():
    done = distill(ring(), objective=Consistency(first=4, last=4), steps=2, batch_size=16, progress=False)
    x = 3 * normal(5, 2).float()
    assert torch.equal(done.jump(x, 3.0), done.ema.denoiser(x, 3.0))
    with pytest.raises(ValueError, match="only knows where paths end"):
        done.jump(x, 3.0, 1.0)
    one, three = done.sample(5), done.sample(5, steps=3)
    assert three.shape == (5, 2)
    assert not torch.equal(one, three)
