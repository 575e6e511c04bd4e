"""Foreseeable mistakes in the exercises of notebook 13 get the sentence that explains them."""

import pytest
import torch

from minidistill import check
from minidistill.check import ours


def _stage(progress, stages, share, first=-1):
    return 0 if progress >= share else stages + first - int(progress / share * (stages + first))


def _seen(D, x, level):
    return (x - D(x, level)) / level[:, None]


@pytest.mark.parametrize(("name", "mistake", "sentence"), [
    ("stage_at", lambda t, n, share: _stage(t, n, share, first=0), "where the fake network begins"),
    ("stage_at", lambda t, n, share: 0 if t >= share else 1 + int(t / share * (n - 1)), "the most degraded one first"),
    ("stage_at", lambda t, n, share: _stage(t, n, 1.0), "not with the run"),
    ("stage_at", lambda t, n, share: max(0, n - 1 - int(t / share * n)), "it is not one of them"),
    ("stage_at", lambda t, n, share: n - 1 - int(t / share * (n - 1)), "the teacher, number 0"),
    ("asd_stand_in", lambda D, x0, s, e, t: D(x0 + s[:, None] * e, s), "nothing pulls"),
    ("asd_stand_in", lambda D, x0, s, e, t: x0 + s[:, None] * (e - _seen(D, x0 + s[:, None] * e, t)), "noised to"),
    ("asd_stand_in", lambda D, x0, s, e, t: D(x0 + t[:, None] * e, t), "that is the teacher's clean sample"),
    ("asd_stand_in", lambda D, x0, s, e, t: _seen(D, x0 + t[:, None] * e, t), "you return noise"),
    ("asd_stand_in", lambda D, x0, s, e, t: x0, "which is SDS"),
    ("forgetting_teacher", lambda D, x, s, y, a, b: ours.forgetting_teacher(D, x, s, y, b, a), "are exchanged"),
    ("forgetting_teacher", lambda D, x, s, y, a, b: D(x, s, torch.full_like(y, b)), "as ever"),
    ("forgetting_teacher", lambda D, x, s, y, a, b: D(x, s, y), "that it is to forget"),
    ("cut", lambda pull, most: pull * (most / pull.norm()).clamp(max=1), "is `clip`"),
    ("cut", lambda pull, most: pull.clamp(-most, most), "the direction has to stay"),
    ("cut", lambda pull, most: most * torch.nn.functional.normalize(pull, dim=1), "short rows stay"),
])
def test_a_foreseeable_mistake_is_explained(name, mistake, sentence, capsys):
    assert getattr(check, name)(mistake) is False
    line = capsys.readouterr().out
    assert "Hint: " in line
    assert sentence in line.split("Hint: ")[1]


@pytest.mark.parametrize("name", ["stage_at", "asd_stand_in", "forgetting_teacher", "cut"])
def test_what_stands_in_is_correct(name, capsys):
    assert getattr(check, name)(getattr(ours, name)) is True
    assert getattr(check, name)(lambda *given: ...) is False
    assert "not attempted yet" in capsys.readouterr().out


def test_a_label_that_is_changed_in_place_is_told(capsys):
    def in_place(D, x, sigma, label, forget, safe):
        label[label == forget] = safe
        return D(x, sigma, label)

    assert check.forgetting_teacher(in_place) is False
    assert "changes its argument `label`" in capsys.readouterr().out


def test_the_stages_are_those_of_the_package():
    from minidistill.distillation.way_back import WayBack

    stages = [torch.nn.Identity() for _ in range(5)]  # s_1 to s_5
    teacher = torch.nn.Identity()
    way, numbered = WayBack(teacher, stages, 0.5), [teacher, *stages]
    for progress in torch.linspace(0, 1, 41).tolist():
        assert way.at(progress) is numbered[ours.stage_at(progress, 5, 0.5)]


def test_the_stand_in_is_the_packages():
    from minidistill import ring
    from minidistill.distillation import AsynchronousScore, Batch

    target, rng = ring(8), torch.Generator().manual_seed(0)
    x0, noise = target.sample(32, rng), torch.randn(32, 2, generator=rng)
    sigma, share = torch.linspace(0.1, 4.0, 32), torch.rand(32, generator=rng)
    batch = Batch(x0, sigma, noise, target, sigma_data=target.sigma_data, uniform=share)
    later = sigma * (sigma / (0.035 * target.sigma_data)).clamp(min=1) ** (0.1 * share)
    torch.testing.assert_close(AsynchronousScore().stand_in(batch), ours.asd_stand_in(target, x0, sigma, noise, later),
                               rtol=1e-4, atol=1e-4)
