"""Exercises of the notebook 11."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidistill._autodiff import load_forward_mode
from minidistill.check import ours
from minidistill.check._core import Case, points, report

__all__ = ["consistency_loss", "gamma_step", "mean_flow_target"]


def consistency_loss(f: Callable[..., Any]) -> bool:
    """11, exercise 1: f(student, x, below, upper, lower, lowest) is the squared distance, (n,), of the student's answer
    at x from its answer at `below`, held fixed, which is `below` itself where `lower` is the lowest level."""
    student = _Student()
    x, below, lowest = points(6), points(6, seed=1), 0.1
    lower = torch.tensor([0.1, 0.4, 0.1, 1.0, 2.0, 0.4])
    given = (student, x, below, lower + 0.5, lower, lowest)

    def tried(loss_of: Callable[..., Any]) -> Callable[..., Any]:
        """The loss, or its gradient in the student's two numbers."""
        def answer(*arguments: Any) -> Any:
            *given, what = arguments
            loss = loss_of(*given)
            if what == "loss" or not isinstance(loss, Tensor):
                return loss
            return _gradient(loss, student)

        if callable(loss_of):  # its line is told where it raises
            answer.__wrapped__ = loss_of  # type: ignore[attr-defined]
        return answer

    def mistake(target: Callable[..., Tensor], held: bool = True, moved: bool = True) -> Callable[..., Any]:
        def loss(student: Any, x: Tensor, below: Tensor, upper: Tensor, lower: Tensor, lowest: float) -> Tensor:
            wanted, mine = target(x, below, upper, lower, lowest), student(x, upper)
            wanted, mine = wanted.detach() if held else wanted, mine if moved else mine.detach()
            return (mine - wanted).square().sum(1)

        return tried(loss)

    def bounded(x: Tensor, below: Tensor, upper: Tensor, lower: Tensor, lowest: float) -> Tensor:
        return torch.where((lower == lowest)[:, None], below, student(below, lower))

    right = tried(ours.consistency_loss)
    return report(1, tried(f), [
        ("the loss", (*given, "loss"), right(*given, "loss")),
        ("its gradient in the student's weights", (*given, "gradient"), right(*given, "gradient")),
    ], hints={
        "the answer below is what is to be learned: hold it fixed, under torch.no_grad() or with .detach()":
            mistake(bounded, held=False),
        "you hold the student's own answer fixed, and move the one below: it is the other way round":
            mistake(bounded, held=False, moved=False),
        "at the lowest level nobody asks the student: there the answer is the point `below` itself":
            mistake(lambda x, below, upper, lower, lowest: student(below, lower)),
        "the lower answer is asked at the point `below`, not at x": mistake(
            lambda x, below, upper, lower, lowest: torch.where((lower == lowest)[:, None], below, student(x, lower))),
        "the point below is not yet its path's end: ask the student there, at the level `lower`":
            mistake(lambda x, below, upper, lower, lowest: below),
        "where `lower` is the lowest level the answer is `below`, not x": mistake(
            lambda x, below, upper, lower, lowest: torch.where((lower == lowest)[:, None], x, student(below, lower))),
    })


class _Student:
    """f(x, sigma) of two numbers."""

    def __init__(self) -> None:
        self.weights = torch.tensor([0.8, 0.3], requires_grad=True)

    def __call__(self, x: Tensor, sigma: Any, label: Tensor | None = None) -> Tensor:
        level = torch.as_tensor(sigma).reshape(-1, 1)
        return self.weights[0] * x / (1 + level) + (self.weights[1] * x * level).sin()


def _gradient(loss: Tensor, student: _Student) -> Tensor:
    """Zeros where nothing of the student is in the loss."""
    if not loss.requires_grad:
        return torch.zeros(2)
    return torch.autograd.grad(loss.sum(), student.weights)[0]


def gamma_step(f: Callable[..., Any]) -> bool:
    """11, exercise 2: f(jump, x, sigma, after, gamma, z) jumps below the level `after` and adds noise, up to there."""
    x, z = points(6), points(6, seed=1)
    return report(2, f, [
        (f"gamma = {gamma:g}", (_gaussian_jump, x, sigma, after, gamma, z),
         ours.gamma_step(_gaussian_jump, x, sigma, after, gamma, z))
        for sigma, after, gamma in ((2.0, 0.8, 0.0), (2.0, 0.8, 1.0), (3.0, 1.5, 0.6))
    ], hints={
        "variances add up, not standard deviations: the jump goes to sqrt(1 - gamma^2) of `after`":
            lambda J, x, s, t, g, z: J(x, s, (1 - g) * t) + g * t * z,
        "the jump has to go lower, for the noise comes on top: to sqrt(1 - gamma^2) of `after`":
            lambda J, x, s, t, g, z: J(x, s, t) + g * t * z,
        "the variance of the jump's level is (1 - gamma^2) after^2: a square root is missing":
            lambda J, x, s, t, g, z: J(x, s, (1 - g**2) * t) + g * t * z,
        "the noise has the standard deviation gamma times `after`, not `sigma`":
            lambda J, x, s, t, g, z: J(x, s, (1 - g**2) ** 0.5 * t) + g * s * z,
        "the noise is missing": lambda J, x, s, t, g, z: J(x, s, (1 - g**2) ** 0.5 * t),
        "always to 0 and back is gamma = 1": lambda J, x, s, t, g, z: J(x, s, 0.0) + t * z,
    })


def _gaussian_jump(x: Tensor, sigma: float, to: float) -> Tensor:
    """The flow of N(0, I)."""
    return x * ((1 + to**2) / (1 + sigma**2)) ** 0.5


def mean_flow_target(f: Callable[..., Any]) -> bool:
    """11, exercise 3: f(u, z, r, t, v) is v - (t - r) du/dt, (n, d), with the derivative along dz/dt = v, r held."""
    load_forward_mode()  # torch warns at its first use, and that is not the learner's doing
    z, v = points(6), points(6, seed=1)
    r, t = torch.linspace(0.1, 0.5, 6), torch.linspace(0.3, 0.9, 6)
    cases: list[Case] = []
    for title, lower in (("r below t", r), ("r = t, where the target is v", t)):
        rate = v * _slope_in_z(z, lower, t) + _slope_in_t(z, lower, t)
        cases.append((title, (_mean_velocity, z, lower, t, v), v - (t - lower)[:, None] * rate))

    def mistake(sign: float = -1.0, span: bool = True, tangents: tuple[float, float, float] = (1.0, 0.0, 1.0)) -> Any:
        along, in_r, in_t = tangents

        def target(u: Any, z: Tensor, r: Tensor, t: Tensor, v: Tensor) -> Tensor:
            rate = along * v * _slope_in_z(z, r, t) + in_r * _slope_in_r(z, r, t) + in_t * _slope_in_t(z, r, t)
            return v + sign * ((t - r)[:, None] if span else 1.0) * rate

        return target

    return report(3, f, cases, hints={
        "du/dt comes off: the sign is wrong": mistake(sign=1.0),
        "the derivative counts (t - r) times": mistake(span=False),
        "the sign is wrong, and the derivative counts (t - r) times": mistake(sign=1.0, span=False),
        "r is held: its tangent is 0": mistake(tangents=(1.0, 1.0, 1.0)),
        "r is held and t moves; you have them exchanged": mistake(tangents=(1.0, 1.0, 0.0)),
        "the point moves along with t: the tangent of z is v": mistake(tangents=(0.0, 0.0, 1.0)),
        "t moves too: its tangent is 1": mistake(tangents=(1.0, 0.0, 0.0)),
        "the target is not the derivative alone: v less (t - r) of it":
            lambda u, z, r, t, v: v * _slope_in_z(z, r, t) + _slope_in_t(z, r, t),
    })


def _mean_velocity(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """A smooth u(z, r, t), each coordinate alone, whose derivatives are known."""
    return (z + r[:, None]).sin() * t[:, None].square()


def _slope_in_z(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    return (z + r[:, None]).cos() * t[:, None].square()


_slope_in_r = _slope_in_z


def _slope_in_t(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    return (z + r[:, None]).sin() * 2 * t[:, None]
