"""Foreseeable mistakes in the exercises of notebooks 07 to 11 get the sentence that explains them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from minidistill import check
from minidistill.check import ours


def _objective(loss):
    return type("Objective", (ours.OwnObjective,), {"generator_loss": loss})


def _pull(self, batch):
    h = self.weight(batch.ratio(batch.xt, batch.sigma).clamp(-5, 5).exp())[:, None]
    fake_x0, teacher_x0 = batch.fake(batch.xt, batch.sigma), batch.teacher(batch.xt, batch.sigma)
    return h * (fake_x0 - teacher_x0) / (batch.x0 - teacher_x0).abs().mean(1, keepdim=True)


def _without_scale(self, batch):
    with torch.no_grad():
        h = self.weight(batch.ratio(batch.xt, batch.sigma).clamp(-5, 5).exp())[:, None]
        pull = h * (batch.fake(batch.xt, batch.sigma) - batch.teacher(batch.xt, batch.sigma))
    return (pull * batch.x0).sum(1)


def _consistency(held=True, bounded=True):
    def loss(student, x, below, upper, lower, lowest):
        answer = student(below, lower)
        answer = torch.where((lower == lowest)[:, None], below, answer) if bounded else answer
        return (student(x, upper) - (answer.detach() if held else answer)).square().sum(1)

    return loss


def _rate(u, z, r, t, v, in_r=0.0):
    return torch.func.jvp(u, (z, r, t), (v, torch.full_like(r, in_r), torch.ones_like(t)))[1]


def _near(x, y, width):
    return (-torch.cdist(x, y).square() / (2 * width**2)).softmax(1) @ y


def _units(x):
    way = x - x[:, None]
    return way / way.norm(dim=2, keepdim=True).clamp(min=1e-12)


MISTAKES: list[tuple[str, Callable[..., Any], str]] = [
    ("flipped_weight", lambda h, r: h(1 / r), "a factor r is missing"),
    ("chi_squared_conjugate", lambda u: u + u**2 / 4, "clamp it at 0"),
    ("kl_integrand", lambda p, q, s: (p - q).square().sum(1) * s**2, "sigma^4"),
    ("energy_loss", lambda a, b, y, alpha: ours.energy_loss(a, b, y, alpha) - (a - b).norm(dim=1) ** alpha / 2, "1/2"),
    ("divergence_weight", lambda f, r: ours.divergence_weight(f, r) / r**2, "r^2 is missing"),
    ("reverse_kl_gradient", lambda s, m, sd, z: -ours.reverse_kl_gradient(s, m, sd, z), "the other sign"),
    ("best_cover", lambda m, s, w: ours.best_cover(m, 0 * s, w), "own variances"),
    ("dmd_gradient", lambda x0, p, q: q - p, "the scale is missing"),
    ("OwnObjective", _objective(lambda self, batch: (_pull(self, batch) * batch.x0).sum(1)), "torch.no_grad()"),
    ("OwnObjective", _objective(_without_scale), "DMD's scale is missing"),
    ("OwnObjective", _objective(lambda self, batch: -ours.OwnObjective.generator_loss(self, batch)), "sign is wrong"),
    ("OwnObjective", _objective(lambda self, batch: ours.OwnObjective.generator_loss(self, batch).mean()),
     "you return one number"),
    ("mixture_denoiser", lambda p, q, l, a: ours.mixture_denoiser(q, p, l, a), "exchanged"),
    ("pseudo_huber_slope", lambda y, c: y / (y**2 + c**2).sqrt(), "the whole row"),
    ("implicit_loss", lambda x0, p, q, d, slope, a: ours.implicit_loss(x0, p, q, d, slope, a) - (1 - a) * d(q - p),
     "2 (1 - alpha)"),
    ("gaussian_fisher", lambda mp, sp, mq, sq, s: ours.gaussian_fisher(mp, sp, mq, sq, 0.0), "noise widens both"),
    ("consistency_loss", _consistency(held=False), "hold it fixed"),
    ("consistency_loss", _consistency(bounded=False), "the point `below` itself"),
    ("consistency_loss", lambda f, x, below, u, l, s: (f(x, u) - below).square().sum(1), "not yet its path's end"),
    ("gamma_step", lambda J, x, s, t, g, z: J(x, s, (1 - g) * t) + g * t * z, "variances add up"),
    ("gamma_step", lambda J, x, s, t, g, z: J(x, s, (1 - g**2) ** 0.5 * t), "the noise is missing"),
    ("mean_flow_target", lambda u, z, r, t, v: 2 * v - ours.mean_flow_target(u, z, r, t, v), "the sign is wrong"),
    ("mean_flow_target", lambda u, z, r, t, v: v - _rate(u, z, r, t, v), "counts (t - r) times"),
    ("mean_flow_target", lambda u, z, r, t, v: v - (t - r)[:, None] * _rate(u, z, r, t, v, in_r=1.0), "r is held"),
    ("mean_flow_target", lambda u, z, r, t, v: v - (t - r)[:, None] * _rate(u, z, r, t, 0 * v), "tangent of z is v"),
    ("drift", lambda x, real, w: _near(x, real, w) - _near(x, x, w), "no neighbour of its own"),
    ("drift", lambda x, real, w: _near(x, real, w), "pushes the samples apart"),
    ("drift", lambda x, real, w: ours.drift(x, real, w / 2**0.5), "the 2 is missing"),
    ("energy_pull", lambda x, real: ours.energy_pull(x, real) + _units(x).sum(1) * (1 / (len(x) - 1) - 1 / len(x)),
     "only n - 1 others"),
    ("energy_pull", lambda x, real: real.mean(0) - x - (x.sum(0) - len(x) * x) / (len(x) - 1), "unit vectors"),
    ("ratio_pull", lambda f, x, h: ours.ratio_pull(f, x, torch.ones_like), "the weight is missing"),
    ("ratio_pull", lambda f, x, h: ours.ratio_pull(f, x, lambda r: h(r.log())), "you give it log r"),
    ("ratio_pull", lambda f, x, h: ours.ratio_pull(f, x, lambda r: r * h(r)), "of log r it is wanted"),
]


@pytest.mark.parametrize(("name", "mistake", "sentence"), MISTAKES)
def test_a_foreseeable_mistake_is_explained(name, mistake, sentence, capsys):
    assert getattr(check, name)(mistake) is False
    line = capsys.readouterr().out
    assert "Hint: " in line
    assert sentence in line.split("Hint: ")[1]


def test_an_objectives_own_line_is_told(capsys):
    assert check.OwnObjective(_objective(lambda self, batch: batch.nothing)) is False
    assert "`" in capsys.readouterr().out.split("raised AttributeError")[1]
    assert check.OwnObjective(_objective(lambda self, batch: ...)) is False
    assert "not attempted yet" in capsys.readouterr().out
