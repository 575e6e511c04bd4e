"""Distillation of images: the ratio from features, its normalisation, the diagnosis and its panel, bytes as
data."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch

from minidistill import data, plotting, ring
from minidistill.distillation import OBJECTIVES, Needs, diagnose, distill
from minidistill.distillation.objectives.matching import level_mean
from minidistill.networks import MLP, Denoiser, FeatureDiscriminator, Generator, unet
from minidistill.networks.unet import UNet
from minidistill.teachers import train_denoiser
from minidistill.training import Speed

QUICK = {"steps": 3, "batch_size": 16, "progress": False}


@pytest.fixture(scope="module")
def digits_teacher():
    images, labels = data.digits()
    torch.manual_seed(0)
    network = UNet((1, 8, 8), 16, (1, 2), 1, n_classes=10)
    return train_denoiser(images, network, labels=labels, steps=30, batch_size=32, progress=False), images, labels


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_runs_on_images_in_bfloat16_without_nans(name, digits_teacher):
    teacher, images, labels = digits_teacher
    rule = OBJECTIVES[name]
    if Needs.of(rule).pairs:  # thousands, which take most of a minute
        rule = replace(rule, needs_pairs=64)
    out = distill(teacher, objective=rule, data=images, labels=labels, learning_rate=1e-4, critic_learning_rate=1e-4,
                  speed=Speed("bfloat16"), **QUICK)
    assert isinstance(out.ratio, FeatureDiscriminator) == Needs.of(OBJECTIVES[name]).ratio
    assert torch.isfinite(out.sample(12)).all()
    assert "skipped" not in out.history[-1]


@pytest.mark.parametrize(("n", "groups"), [(64, 4), (100, 10), (20, 10), (3, 10)])
def test_level_mean_averages_samples_of_like_noise_level(n, groups):
    """Groups are of consecutive levels, of sizes that differ by at most one, and at least 8 samples strong."""
    rng = torch.Generator().manual_seed(0)
    sigma, values = torch.rand(n, generator=rng).exp(), torch.rand(n, generator=rng)
    got = level_mean(values, sigma, groups)
    ranked = got[sigma.argsort()]
    group = torch.arange(n) * min(groups, max(1, n // 8)) // n
    for k in range(int(group.max()) + 1):
        members = values[sigma.argsort()][group == k]
        torch.testing.assert_close(ranked[group == k], members.mean().expand(len(members)))
        assert len(members) >= min(n, 8)
    assert float(got.mean()) == pytest.approx(float(values.mean()), rel=1e-5)


def test_a_ratio_that_is_off_by_a_factor_of_the_level_is_put_right():
    """The exact ratio has mean 1 under the student at every level; normalised, a biased one gives the same weights."""
    rng = torch.Generator().manual_seed(0)
    sigma = torch.linspace(0.1, 2.0, 80)
    log_r = 0.3 * torch.randn(80, generator=rng)
    bias = torch.arange(80) // 8 * 0.2  # one constant a group
    plain, biased = (x - level_mean(x.exp(), sigma, 10).log() for x in (log_r, log_r + bias))
    torch.testing.assert_close(plain, biased)


def test_the_ratio_of_an_image_run_learns_to_tell_student_from_data(digits_teacher):
    """A student of one untrained step is easy to know: its mean log p/q becomes clearly negative."""
    teacher, images, labels = digits_teacher
    out = distill(teacher, objective="jensen_shannon", data=images, labels=labels, steps=40, batch_size=64,
                  learning_rate=1e-8, critic_learning_rate=3e-3, progress=False, inspect=lambda seen: None,
                  evaluate_every=40)
    assert out.history[-1]["log_ratio"] < -0.3


def test_diagnosis_is_the_definition_and_changes_nothing(digits_teacher):
    teacher, *_ = digits_teacher
    generator = Generator(teacher, 0.7)
    before = torch.get_rng_state()
    seen = diagnose(generator, teacher, lambda x, sigma, label: teacher(x, sigma, label) + 0.1, sigma_data=0.5, n=40)
    assert torch.equal(torch.get_rng_state(), before)
    assert seen.score_gap == pytest.approx(0.2, rel=1e-4)
    assert seen.log_ratio is None
    assert (seen.sigma.diff() > 0).all()
    torch.testing.assert_close(seen.teacher_x0, teacher(seen.xt, seen.sigma, torch.arange(40) % 10))
    assert diagnose(generator, teacher, teacher, sigma_data=0.5, n=4).score_gap == 0


def test_the_score_gap_falls_as_the_fake_network_learns_the_student():
    """On the ring, from a fake network that is the teacher: the gap shows up first, then the student closes it."""
    gaps = []
    distill(ring(), steps=200, batch_size=128, progress=False, evaluate_every=10,
            inspect=lambda seen: gaps.append(seen.score_gap))
    assert len(gaps) == 20
    assert max(gaps[:5]) > 2 * gaps[-1]


def test_panel_shows_four_rows_and_the_noise_levels(digits_teacher):
    teacher, *_ = digits_teacher
    seen = diagnose(Generator(teacher, 0.7), teacher, teacher, sigma_data=0.5, n=32)
    figure, given = plt.subplots()
    ax = plotting.panel(seen, given, columns=6)
    assert ax is given
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        "student", "noised", "teacher's\ndenoised", "fake's\ndenoised"]
    assert len(ax.get_xticklabels()) == 6
    assert float(ax.get_xticklabels()[0].get_text()) == pytest.approx(float(seen.sigma[0]), rel=0.05)
    plt.close(figure)


def test_bytes_train_as_the_floats_they_stand_for():
    images, labels = data.digits_as_rgb(8)
    as_bytes, as_floats = (train_denoiser(x, MLP((3, 8, 8), hidden=8, depth=1, n_classes=10), labels=labels, steps=2,
                                          batch_size=8, progress=False) for x in (images, data.to_float(images)))
    assert as_bytes.sigma_data == pytest.approx(as_floats.sigma_data, rel=1e-5)
    assert as_bytes.sigma_data == pytest.approx(float(data.to_float(images).std()), rel=1e-4)


def test_flips_need_images():
    with pytest.raises(ValueError, match="flip=True"):
        train_denoiser(torch.randn(10, 2), steps=1, flip=True, progress=False)
    with pytest.raises(ValueError, match="flip=True"):
        distill(ring(), steps=1, flip=True, progress=False)


def test_tiny_student_starts_as_its_teacher_and_keeps_its_config():
    torch.manual_seed(0)
    teacher = Denoiser(unet.preset("tiny", (3, 32, 32), n_classes=10), 0.5)
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    out = distill(teacher, objective="jensen_shannon", data=images, labels=torch.arange(20) % 10, steps=1, batch_size=4,
                  learning_rate=1e-12, sigma_init=2.5, flip=True, progress=False)
    z, label = torch.randn(2, 3, 32, 32), torch.tensor([3, 4])
    torch.testing.assert_close(out.generator(z, label), teacher(2.5 * z, 2.5, label), rtol=1e-3, atol=1e-4)
    assert math.isfinite(out.history[-1]["critic"])
