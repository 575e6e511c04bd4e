"""Objectives with one thing changed."""

import math

import torch

from minidistill.distillation import OBJECTIVES, Batch
from minidistill.distillation.settings import Settings
from minidistill.studies import sweep
from minidistill.studies.forgetting import FORGET, SAFE, ByClass, measure
from minidistill.studies.variants import LargeLevelsFirst, SmoothFake
from tests.helpers import mixture_2d, normal


class Asked:
    """Samples of a class: of the safe one's law for the forgotten class, a quarter of them excepted."""

    def __init__(self):
        self.teacher = ByClass()

    def sample(self, n, seed, label):
        label, rng = int(label[0]), torch.Generator().manual_seed(seed)
        if label != FORGET:
            return self.teacher.laws[label].sample(n, rng)
        return torch.cat([self.teacher.laws[k].sample(m, rng) for k, m in ((FORGET, n // 4), (SAFE, n - n // 4))])


def test_what_forgetting_is_measured_by():
    made = measure(Asked(), ByClass(), 0, 4000, 400)
    assert made["on_old_modes"] == 0.25
    assert made["on_safe_modes"] == 0.75
    assert all(0.5 < floor < 2 for floor in made["kept_over_floor"])
    assert made["samples"].shape == (400, 2)


def test_the_teacher_by_class_is_the_ring_by_parts():
    """Each class's answer is its own two modes', and Bayes' rule makes the whole ring's of them."""
    teacher, x, sigma = ByClass(), normal(6, 2).float(), torch.full((6,), 0.7)
    each = torch.stack([teacher(x, sigma, torch.full((6,), k)) for k in range(4)])
    shares = torch.stack([law.noised(0.7).log_prob(x) for law in teacher.laws]).softmax(0)
    torch.testing.assert_close((shares[:, :, None] * each).sum(0), sweep.TARGETS["ring"](x, sigma))


def test_large_levels_come_first_and_all_are_met_in_the_end():
    settings = Settings(10, 64, 1, 1e-3, 1e-3, 2.0, 3.0, 0.02, 10.0, (), 100.0, 0, None, 0.5, "linear", False, 0,
                        "learned")
    rule = LargeLevelsFirst(OBJECTIVES["sim_l2"], share=0.5)
    least = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        drawn = rule.noise_levels(20_000, settings, progress, torch.Generator().manual_seed(0))
        assert drawn.max() <= 10
        least.append(float(drawn.min()))
    for got, wanted in zip(least, (2.0, math.sqrt(2.0 * 0.02), 0.02, 0.02), strict=True):
        assert wanted <= got < 1.01 * wanted


def test_a_smooth_fake_pays_for_its_slope():
    """Of D_q = c x, c^2 for each sample, times the weight."""
    batch = Batch(normal(9, 2), torch.full((9,), 0.5).double(), normal(9, 2, seed=1), mixture_2d(),
                  lambda x, sigma, label: 3 * x, generator=torch.Generator().manual_seed(0))
    plain = OBJECTIVES["sim_l2"].critic_loss(batch)
    got = SmoothFake(OBJECTIVES["sim_l2"], weight=0.2).critic_loss(batch)
    torch.testing.assert_close(got - plain, torch.full((9,), 0.2 * 9).double())
