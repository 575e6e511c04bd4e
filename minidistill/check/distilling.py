"""The loop of notebook 00, watched while it distills one Gaussian: a loop that forgets half of it trains as well."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from minidistill import networks
from minidistill._random import seeded
from minidistill.check._core import Function, report
from minidistill.distributions import GaussianMixture

__all__ = ["distillation_loop"]

STEPS = 300


def distillation_loop(f: Function) -> bool:
    """00, exercise 3: f(teacher, student, fake, steps, rng) trains student and fake network in place and returns the
    student. Tried on one Gaussian beside the origin, with a student that has a mean and a standard deviation."""
    seen: dict[str, Any] = {}

    @functools.wraps(f)
    def after(what: str) -> Any:
        if not seen:
            with seeded(0, torch.device("cpu")):
                watch = _Watch()
                before = torch.get_rng_state()
                out = f(watch.teacher, watch.student, watch.fake, STEPS, torch.Generator().manual_seed(0))
                watch.own = torch.equal(before, torch.get_rng_state())
            if out is not watch.student:
                return out
            seen.update(watch.summary())
        return seen[what]

    def yes(question: str) -> str:
        return f"{question} (1: yes, 0: no)"

    return report(3, after, [
        (yes("do the fake network's weights move"), ("fake",), 1.0),
        (yes("do the student's weights move"), ("student",), 1.0),
        (yes("is the direction a constant, as `torch.no_grad()` makes it"), ("constant",), 1.0),
        (yes("are the student's samples held fixed for the fake network, as `x0.detach()` does"), ("held",), 1.0),
        (yes("are the gradients of the step before set to zero"), ("zeroed",), 1.0),
        ("the fake network's steps for each of the student's", ("rounds",), 3.0),
        ("the level at which the student is asked, in standard deviations of the data", ("level",), 0.5),
        (yes("does each step draw noise z of its own"), ("fresh",), 1.0),
        (yes("are samples noised before they are denoised: xt = x0 + sigma e"), ("noised",), 1.0),
        (yes("are teacher and fake network asked at the same points"), ("same",), 1.0),
        (yes("does the student come nearer to the teacher, or is a sign wrong"), ("nearer",), 1.0),
        (yes("do samples move along sigma^2 (s_p - s_q) / size"), ("along",), 1.0),
        (yes("is all noise drawn with generator=rng"), ("own",), 1.0),
        (yes("does the fake network know the student's samples at the end"), ("knows",), 1.0),
        ("a student's mean, 0 at first, for a teacher at (0.4, -0.2), to 0.1", ("mean",), [0.4, -0.2]),
    ], atol=0.1, rtol=0)


class _Watch:
    """A teacher, a student and a fake network that note what they are asked, and which gradients come back."""

    def __init__(self) -> None:
        self.teacher = _Teacher([[0.4, -0.2]], 0.2)
        self.teacher.told = self._teacher_called
        self.student = networks.Affine((2,), sigma_data=0.2)
        self.fake = networks.Denoiser(networks.MLP((2,), hidden=16, depth=1), 0.2)
        self.first = {name: value.clone() for name, value in self.fake.state_dict().items()}
        self.student.register_forward_hook(self._student_called)
        self.fake.register_forward_hook(self._fake_called)
        self.counts = dict.fromkeys(("trained", "leaks", "stale", "pulled", "apart", "unnoised"), 0)
        self.levels: list[float] = []
        self.draws: set[float] = set()
        self.along: list[float] = []
        self.asked: dict[str, tuple[Tensor, ...]] = {}
        self.own = True

    def _teacher_called(self, x: Tensor, sigma: Any, denoised: Tensor) -> None:
        self.asked["teacher"] = x.detach(), torch.as_tensor(sigma).expand(len(x)), denoised.detach()

    def _student_called(self, module: nn.Module, given: tuple[Any, ...], x0: Tensor) -> None:
        self.draws.add(float(given[0].flatten()[0]))
        self.levels.append(float(torch.as_tensor(given[1]).float().mean()))
        if x0.requires_grad:
            x0.register_hook(functools.partial(self._pulled, x0.detach()))

    def _fake_called(self, module: nn.Module, given: tuple[Any, ...], denoised: Tensor) -> None:
        if denoised.requires_grad:
            self.counts["trained"] += 1
            self.counts["leaks"] += given[0].requires_grad
            denoised.register_hook(lambda _: self._stale(self.fake))
        else:
            self.asked["fake"] = given[0].detach(), denoised

    def _stale(self, module: nn.Module) -> None:
        """Whether gradients are still there when a backward pass begins."""
        self.counts["stale"] += any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())

    def _pulled(self, x0: Tensor, gradient: Tensor) -> None:
        """A gradient has come back to the student's samples x0: compare it with what the last questions say. (Another
        size, one for the whole batch say, is another weight of the same directions: a cosine of 0.65.)"""
        if self.counts["leaks"] or len(self.asked) < 2:
            return
        self._stale(self.student)
        (x, sigma, teacher_x0), (fake_at, fake_x0) = self.asked["teacher"], self.asked["fake"]
        self.counts["pulled"] += 1
        self.counts["apart"] += not torch.equal(x, fake_at)
        noise = (x - x0) / sigma.unsqueeze(1)
        self.counts["unnoised"] += not 0.8 < float(noise.std()) < 1.2
        size = (x0 - teacher_x0).abs().mean(1, keepdim=True).clamp(min=1e-3)
        wanted = (fake_x0 - teacher_x0) / size
        self.along.append(float(cosine_similarity(gradient.flatten(), wanted.flatten(), dim=0)))

    def summary(self) -> dict[str, Any]:
        counts, mean = self.counts, self.student.mean.detach()
        moved = any((value != self.first[name]).any() for name, value in self.fake.state_dict().items())
        answers = {
            "fake": moved, "student": mean.norm() > 0, "constant": not self.teacher.gradients,
            "held": not counts["leaks"], "zeroed": not counts["stale"], "fresh": len(self.draws) >= STEPS,
            "noised": counts["unnoised"] < STEPS / 10, "same": counts["apart"] < STEPS / 10,
            "nearer": (mean - self.teacher.mean).norm() < self.teacher.mean.norm(),
            "along": sum(self.along) > 0.5 * len(self.along), "knows": self._error_of_fake() < 0.5, "own": self.own,
        }
        numbers = {
            "rounds": counts["trained"] / STEPS, "mean": mean,
            "level": sum(self.levels) / max(len(self.levels), 1) / self.student.sigma_data,
        }
        return {name: float(answer) for name, answer in answers.items()} | numbers

    def _error_of_fake(self) -> float:
        """The fake's error at the noised samples of the student, over the length of the exact step, in mean square."""
        with torch.no_grad():
            std = 0.5 * 0.2 * float(self.student.log_std.exp().mean())
            law = GaussianMixture(self.student.mean.detach()[None], std)
            x = law.noised(0.2).sample(1000, torch.Generator().manual_seed(0))
            exact = law(x, 0.2)
            return float((self.fake(x, torch.full((1000,), 0.2)) - exact).norm() / (exact - x).norm())


class _Teacher(GaussianMixture):
    """A mixture that tells what it is asked, and knows whether a gradient ever came back through its answers."""

    gradients = False
    told: Callable[[Tensor, Any, Tensor], None] | None = None

    def __call__(self, x: Tensor, sigma: Any, label: Tensor | None = None) -> Tensor:
        denoised = super().__call__(x, sigma, label)
        if self.told is not None:
            self.told(x, sigma, denoised)
        if denoised.requires_grad:
            denoised.register_hook(lambda _: setattr(self, "gradients", True))
        return denoised
