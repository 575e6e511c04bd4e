"""Foreseeable mistakes in the exercises of the notebooks on fields, processes, teachers and samplers get their hint."""

from itertools import pairwise

import pytest

from minidistill import check
from minidistill.check import ours


def _heun(denoiser, x, levels, *, level=None, last=True, share=0.5):
    """Heun's method with one mistake: the level of the second slope, its share, or no exception at level 0."""
    for sigma, after in pairwise(levels):
        first = (x - denoiser(x, sigma)) / sigma
        guess = x + (after - sigma) * first
        if after > 0 or not last:
            where = after if level is None else sigma
            second = (guess - denoiser(guess, where)) / where
            guess = x + (after - sigma) * ((1 - share) * first + share * second)
        x = guess
    return x


@pytest.mark.parametrize(("name", "answer", "hint"), [
    ("class_gradient", lambda W, c, y: W[y], "the normaliser has one too"),
    ("gauge_defect", lambda J, r, s: J.sum((1, 2)) + (r * s).sum(1), "the trace of the Jacobian"),
    ("step_score", lambda a, b, f, g, h: -(a - b) / (g**2 * h), "the mean of the step"),
    ("linear_step", lambda x, f, J, g, h: (x + f * h, 0 * x + g**2 * h), "that is Euler's step"),
    ("velocity", lambda x, x0, a, s, da, ds: da * x0 + ds * (x - x0) / s, "x0 is scaled by alpha"),
    ("bridge_velocity", lambda x0, x1, z, t: x1 - x0, "gamma depends on t too"),
    ("uniform_time_density", lambda s: 1 / (1 + s) ** 2, "that is the density of the level"),
    ("heun_solver", lambda *a: _heun(*a, share=0), "that is Euler's method"),
    ("heun_solver", lambda *a: _heun(*a, level="sigma"), "read at the level where the step lands"),
    ("heun_solver", lambda *a: _heun(*a, share=1), "not the second alone"),
    ("heun_solver", lambda *a: _heun(*a, last=False), "which is 0 in the last step"),
    ("ddim_step", lambda x, D, s, t, eta, z: D + t * (x - D) / s + eta * t * (1 - (t / s) ** 2) ** 0.5 * z,
     "both add up to after^2"),
    ("gaussian_flow", lambda x, s, t, m, v, u: ours.gaussian_flow(x, s, t, m, v, u.T), "are the principal axes"),
    ("weighted_denoiser", lambda x, y, w, s: ours.weighted_denoiser(x, y, 0 * w + 0.25, s), "the weights are missing"),
    ("weighted_denoiser", lambda x, y, w, s: ours.weighted_denoiser(x, y, w.exp(), s), "their logarithms are added"),
    ("weighted_denoiser", lambda x, y, w, s: ours.weighted_denoiser(x, y, w, s / 2**0.5), "a factor 2 is missing"),
    ("aligned_share", lambda w: 1 / w.mean(), "not the slope of the mean square"),
    ("unbiased_loss", lambda D, x0, s, r, g: r.exp() * (D - x0).square().mean(1), "move along the slope as well"),
    ("unbiased_loss", lambda D, x0, s, r, g: ours.unbiased_loss(D, x0, s, 0 * r, g), "the weight r is missing"),
    ("unbiased_loss", lambda D, x0, s, r, g: ours.unbiased_loss(D, x0, s, r, g / s[:, None]), "not sigma"),
])
def test_mistakes_get_their_hint(name, answer, hint, capsys):
    assert getattr(check, name)(answer) is False
    assert hint in capsys.readouterr().out
