"""Each exercise's check accepts the solution, refuses wrong answers, and never raises."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minidistill import check
from minidistill import score_matching as sm

_spec = importlib.util.spec_from_file_location("solutions", Path(__file__).parents[2] / "tutorials" / "solutions.py")
assert _spec is not None
assert _spec.loader is not None
solutions = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(solutions)


def _forgot_normaliser(x, means, stds, weights):
    offset = means - x[:, None]
    responsibility = (weights.log() - (offset**2).sum(2) / (2 * stds**2)).softmax(1)
    return (responsibility[:, :, None] * offset / stds[:, None] ** 2).sum(1)


def _ascending(teacher, student, fake, steps, rng):
    """The loss with its sign turned: the student runs away."""
    optimizer = torch.optim.Adam(student.parameters(), 2e-3)
    for _ in range(steps):
        x0 = solutions.one_call(student, torch.randn(64, 2, generator=rng), 0.1)
        optimizer.zero_grad()
        ((teacher.mean - x0.detach()) * x0).mean().backward()
        optimizer.step()
    torch.nn.init.ones_(next(fake.parameters()))
    return student


def _without_fake(teacher, student, fake, steps, rng):
    """Follows the teacher's score alone; its mean is right, but no fake network is trained."""
    student.mean.data.copy_(teacher.mean)
    return student


def _without_zero_grad(loss, optimizer, steps):
    losses = []
    for _ in range(steps):
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def _endless(student, x, below, upper, lower, lowest):
    """Asks the student at the lowest level too."""
    return (student(x, upper) - student(below, lower).detach()).square().sum(1)


def _two_way(student, x, below, upper, lower, lowest):
    """The right value, with a gradient through both answers."""
    answer = torch.where((lower == lowest)[:, None], below, student(below, lower))
    return (student(x, upper) - answer).square().sum(1)


def _objective(loss):
    """An objective whose generator_loss is a function of it and the batch."""
    return type("Objective", (solutions.OwnObjective,), {"generator_loss": loss})


def _with_graph(self, batch):
    fake_x0, teacher_x0 = batch.fake(batch.xt, batch.sigma), batch.teacher(batch.xt, batch.sigma)
    h = self.weight(batch.ratio(batch.xt, batch.sigma).clamp(-5, 5).exp())[:, None]
    return (h * solutions.dmd_gradient(batch.x0, teacher_x0, fake_x0) * batch.x0).sum(1)


WRONG: dict[str, list[Callable[..., Any]]] = {
    "one_call": [lambda d, z, s: d(z, s), lambda d, z, s: s * z - s * (s * z - d(s * z, s))],
    "score_gap": [lambda p, q, s: (q - p) / s[:, None] ** 2, lambda p, q, s: (p - q) / s[:, None]],
    "distillation_loop": [
        lambda teacher, student, fake, steps, rng: student, _ascending, _without_fake,
    ],
    "add_noise": [
        lambda x0, s, e: x0 + s[:, None] ** 0.5 * e, lambda x0, s, e: s[:, None] * e, lambda x0, s, e: x0 + e,
    ],
    "mixture_score": [_forgot_normaliser, lambda *a: -solutions.mixture_score(*a)],
    "tweedie": [lambda f, x, s: x + s * f(x), lambda f, x, s: s**2 * f(x)],
    "euler_step": [
        lambda D, x, s, t: x + (s - t) * (x - D(x, s)) / s, lambda D, x, s, t: x + (t - s) * (x - D(x, s)),
        lambda D, x, s, t: D(x, s),
    ],
    "langevin_share": [lambda start, weight: weight, lambda start, weight: (start + weight) / 2],
    "denoising_loss": [
        lambda D, x0, s, e: (D(x0, s) - x0).square().mean(1),
        lambda D, x0, s, e: (D(x0 + s[:, None] * e, s) - x0).square().sum(1),
    ],
    "even_weight": [lambda s, d: s**2 * d**2 / (s**2 + d**2), lambda s, d: 1 / s**2, lambda s, d: 1 / (s**2 + d**2)],
    "training_loop": [_without_zero_grad, lambda loss, optimizer, steps: [loss().item() for _ in range(steps)]],
    "stein_trace": [
        lambda f, x, e, r: (e * f(x + r * e)).sum(1) / r, lambda f, x, e, r: (e * (f(x + r * e) - f(x))).sum(1) / r**2,
        lambda f, x, e, r: (e * (f(x + r * e) - f(x))).mean(1) / r,
    ],
    "best_share": [lambda t, d, c: d / (t + d), lambda t, d, c: (t - c) / (t + d - 2 * c)],
    "class_gradient": [
        lambda W, c, y: W[y], lambda W, c, y: c @ W - W[y], lambda W, c, y: (1 - c.gather(1, y[:, None])) * W[y],
    ],
    "gauge_defect": [
        lambda J, r, s: J.diagonal(dim1=1, dim2=2).sum(1), lambda J, r, s: (r * s).sum(1),
        lambda J, r, s: (J - J.mT).square().sum((1, 2)),
    ],
    "step_score": [
        lambda a, b, f, g, h: (a - b - f * h) / (g**2 * h), lambda a, b, f, g, h: -(a - b) / (g**2 * h),
        lambda a, b, f, g, h: -(a - b - f * h) / h,
    ],
    "linear_step": [
        lambda x, f, J, g, h: (x + f * h, 0 * x + g**2 * h),
        lambda x, f, J, g, h: (solutions.linear_step(x, f, J, g, h)[0], solutions.linear_step(x, f, J, g, h)[1] ** 0.5),
        lambda x, f, J, g, h: solutions.linear_step(x, f, J, g, h)[::-1],
    ],
    "velocity": [
        lambda x, x0, a, s, da, ds: da * x0 + ds * x, lambda x, x0, a, s, da, ds: da * x0 + ds * (x - x0) / s,
        lambda x, x0, a, s, da, ds: -solutions.velocity(x, x0, a, s, da, ds),
    ],
    "uniform_time_density": [lambda s: 1 / (1 + s) ** 2, lambda s: s / (1 + s)],
    "bridge_velocity": [lambda x0, x1, z, t: x1 - x0, lambda x0, x1, z, t: x1 - x0 + (1 - 2 * t) * z],
    "weighted_denoiser": [
        lambda x, y, w, s: solutions.weighted_denoiser(x, y, 0 * w + 1, s),
        lambda x, y, w, s: solutions.weighted_denoiser(x, y, w, s**0.5),
        lambda x, y, w, s: (w - (x[:, None] - y).square().sum(2) / (2 * s[:, None] ** 2)).softmax(1) @ y,
    ],
    "aligned_share": [lambda w: 1 / w.mean(), lambda w: (1 / w).mean(), lambda w: (w**2).mean() / w.mean()],
    "unbiased_loss": [
        lambda D, x0, s, r, g: r.exp() * (D - x0).square().mean(1),
        lambda D, x0, s, r, g: solutions.unbiased_loss(D, x0, s, 0 * r, g),
        lambda D, x0, s, r, g: solutions.unbiased_loss(D, x0, s, r, -g),
    ],
    "heun_solver": [
        lambda D, x, levels: solutions.heun_solver(D, x, levels[[0, -1]]), lambda D, x, levels: D(x, levels[0]),
    ],
    "ddim_step": [
        lambda x, D, s, t, eta, z: D + t * (x - D) / s, lambda x, D, s, t, eta, z: D + t * (x - D) / s + eta * t * z,
        lambda x, D, s, t, eta, z: D + t * (1 - eta**2) ** 0.5 * (x - D) / s + eta * t * z,
    ],
    "gaussian_flow": [
        lambda x, s, t, m, v, u: solutions.gaussian_flow(x, s, t, 0 * m, v, u),
        lambda x, s, t, m, v, u: solutions.gaussian_flow(x, s, t, m, v, u.T),
        lambda x, s, t, m, v, u: m + ((x - m) @ u * (v + t**2) / (v + s**2)) @ u.T,
        lambda x, s, t, m, v, u: m + (x - m) * t / s,
    ],
    "flipped_weight": [
        lambda h, r: h(1 / r), lambda h, r: r**2 * h(1 / r), lambda h, r: h(r) / r,
    ],
    "chi_squared_conjugate": [
        lambda u: u + u**2 / 4, lambda u: (u + u**2 / 4).clamp(min=0), lambda u: u + u**2 / 2,
    ],
    "kl_integrand": [
        lambda p, q, s: (p - q).square().sum(1), lambda p, q, s: solutions.kl_integrand(p, q, s) / s,
        lambda p, q, s: (p - q).square().mean(1) / s**2,
    ],
    "energy_loss": [
        lambda a, b, y, alpha: (a - y).norm(dim=1) ** alpha - (a - b).norm(dim=1) ** alpha / 2,
        lambda a, b, y, alpha: solutions.energy_loss(a, b, y, 1.0), lambda *a: -solutions.energy_loss(*a),
    ],
    "divergence_weight": [
        lambda f, r: solutions.divergence_weight(f, r) / r**2, lambda f, r: solutions.divergence_weight(f, 1 / r),
        lambda f, r: -solutions.divergence_weight(f, r),
    ],
    "reverse_kl_gradient": [
        lambda f, m, s, z: -solutions.reverse_kl_gradient(f, m, s, z),
        lambda f, m, s, z: solutions.reverse_kl_gradient(f, m, s, z)[[0, 0]],
        lambda f, m, s, z: solutions.reverse_kl_gradient(f, m, s, z) * s,
    ],
    "best_cover": [
        lambda m, s, w: solutions.best_cover(m, 0 * s, w),
        lambda m, s, w: solutions.best_cover(m, s, 0 * w + 1 / len(w)),
        lambda m, s, w: solutions.best_cover(m, s, w) ** 2,
    ],
    "dmd_gradient": [
        lambda x, p, q: q - p, lambda x, p, q: -solutions.dmd_gradient(x, p, q),
        lambda x, p, q: (q - p) / (x - p).abs().sum(1, keepdim=True), lambda x, p, q: (q - p) / (x - p).abs().mean(),
    ],
    "OwnObjective": [
        _objective(lambda self, batch: -solutions.OwnObjective(self.weight).generator_loss(batch)),
        _objective(lambda self, batch: solutions.OwnObjective(torch.ones_like).generator_loss(batch)),
        _objective(_with_graph),
    ],
    "mixture_denoiser": [
        lambda p, q, l, a: a * p + (1 - a) * q, lambda p, q, l, a: solutions.mixture_denoiser(p, q, -l, a),
        lambda p, q, l, a: solutions.mixture_denoiser(q, p, l, a),
        lambda p, q, l, a: solutions.mixture_denoiser(p, q, l, 0.5),
    ],
    "pseudo_huber_slope": [
        lambda y, c: y / (y**2 + c**2).sqrt(), lambda y, c: y / (y.norm(dim=1, keepdim=True) + c),
        lambda y, c: 2 * solutions.pseudo_huber_slope(y, c),
    ],
    "implicit_loss": [
        lambda x0, p, q, d, slope, a: solutions.implicit_loss(x0, q, p, d, slope, a),
        lambda x0, p, q, d, slope, a: solutions.implicit_loss(x0, p, q, d, slope, 1.0),
        lambda x0, p, q, d, slope, a: -solutions.implicit_loss(x0, p, q, d, slope, a),
    ],
    "gaussian_fisher": [
        lambda mp, sp, mq, sq, s: solutions.gaussian_fisher(mq, sq, mp, sp, s),
        lambda mp, sp, mq, sq, s: solutions.gaussian_fisher(mp, sp, mq, sq, 0.0),
        lambda mp, sp, mq, sq, s: solutions.gaussian_fisher(0.0, sp, 0.0, sq, s),
    ],
    "consistency_loss": [
        _endless, _two_way, lambda f, x, b, u, l, s: 2 * solutions.consistency_loss(f, x, b, u, l, s),
        lambda f, x, b, u, l, s: solutions.consistency_loss(f, x, b, u, l, s).detach(),
    ],
    "stage_at": [
        lambda progress, stages, share: 0, lambda progress, stages, share: stages - 1,
        lambda progress, stages, share: solutions.stage_at(progress, stages + 1, share),
    ],
    "asd_stand_in": [
        lambda D, x0, s, e, t: x0, lambda D, x0, s, e, t: D(x0 + s[:, None] * e, s),
        lambda D, x0, s, e, t: 2 * solutions.asd_stand_in(D, x0, s, e, t),
    ],
    "forgetting_teacher": [
        lambda D, x, s, y, forget, safe: D(x, s, y),
        lambda D, x, s, y, forget, safe: solutions.forgetting_teacher(D, x, s, y, safe, forget),
    ],
    "cut": [
        lambda pull, most: pull, lambda pull, most: pull.clamp(-most, most),
        lambda pull, most: -solutions.cut(pull, most),
    ],
    "gamma_step": [
        lambda J, x, s, t, g, z: J(x, s, t) + g * t * z, lambda J, x, s, t, g, z: J(x, s, (1 - g) * t) + g * t * z,
        lambda J, x, s, t, g, z: J(x, s, (1 - g**2) ** 0.5 * t),
    ],
    "mean_flow_target": [
        lambda u, z, r, t, v: 2 * v - solutions.mean_flow_target(u, z, r, t, v), lambda u, z, r, t, v: v,
        lambda u, z, r, t, v: v - torch.func.jvp(u, (z, r, t), (v, 0 * r, 0 * t + 1))[1],
        lambda u, z, r, t, v: solutions.mean_flow_target(u, z, r, t, 0 * v) + v,
    ],
    "drift": [
        lambda x, real, w: -solutions.drift(x, real, w), lambda x, real, w: solutions.drift(x, real, 2 * w),
        lambda x, real, w: real[:6] - x,
    ],
    "energy_pull": [
        lambda x, real: solutions.energy_pull(x, real) * 2, lambda x, real: real.mean(0) - x,
        lambda x, real: solutions.energy_pull(x, real)[:, :1],
    ],
    "ratio_pull": [
        lambda f, x, h: -solutions.ratio_pull(f, x, h), lambda f, x, h: solutions.ratio_pull(f, x, lambda r: r),
        lambda f, x, h: solutions.ratio_pull(f, 2 * x, h),
    ],
    "normalised_ratio": [lambda r, k: r / r.mean(), lambda r, k: solutions.normalised_ratio(r, k).log()],
    "sim_gradient": [
        lambda y, r, p, q: 2 * y, lambda y, r, p, q: 2 * y - 2 * y @ q,
        lambda y, r, p, q: solutions.sim_gradient(y, r, p.T, q.T), lambda *a: -solutions.sim_gradient(*a),
    ],
    "c_out": [lambda skip, s, d: (1 - skip) * d + skip * s, lambda skip, s, d: d],
    "ema_decay": [lambda halflife, size: 1 - size / halflife, lambda halflife, size: 0.5 ** (halflife / size)],
    "mirror": [lambda x, coins: x.flip(-1), lambda x, coins: solutions.mirror(x.mT, coins).mT],
    "noise_through": [lambda s, d: s, lambda s, d: d**2 / (s**2 + d**2)],
    "sid_loss": [lambda p, q, x, a: -solutions.sid_loss(p, q, x, a), lambda p, q, x, a: solutions.sid_loss(q, p, x, a)],
}
CASES = [(name, wrong) for name, answers in WRONG.items() for wrong in answers]


def _says(capsys):
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("name", WRONG)
def test_solution_passes(name, capsys):
    assert getattr(check, name)(getattr(solutions, name)) is True
    assert _says(capsys).endswith(": correct")


@pytest.mark.parametrize(("name", "wrong"), CASES)
def test_wrong_answer_fails_with_expected_and_got(name, wrong, capsys):
    assert getattr(check, name)(wrong) is False
    line = _says(capsys)
    assert "expected" in line
    assert "got" in line


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize(
    ("stub", "text"),
    [(lambda *a: ..., "not attempted yet"), (lambda *a: None, "returns None"), (lambda: 0, "raised TypeError"),
     (lambda *a: "text", "expected numbers"), (None, "raised TypeError"), (lambda *a: [[1.0]] * 7, "expected shape"),
     (lambda *a: float("nan"), "expected")],
)
def test_check_never_raises(name, stub, text, capsys):
    assert getattr(check, name)(stub) is False
    assert text in _says(capsys)


def test_every_solution_has_a_check_and_wrong_answers():
    defined = {name for name, value in vars(solutions).items() if callable(value)}
    assert defined == set(WRONG)
    assert all(len(answers) >= 2 for answers in WRONG.values())


def test_a_direction_with_a_gradient_is_no_constant(capsys):
    """It looks like a solution, trains, and follows another gradient."""
    def leaking(teacher, student, fake, steps, rng):
        scale = teacher.sigma_data
        ours = torch.optim.Adam(student.parameters(), 2e-3, betas=(0.0, 0.99))
        theirs = torch.optim.Adam(fake.parameters(), 5e-3, betas=(0.0, 0.99))
        for _ in range(steps):
            x0 = solutions.one_call(student, torch.randn(256, 2, generator=rng), 0.5 * scale)
            for sigma in (sm.log_uniform_sigma(256, 0.035 * scale, 5 * scale, rng, "cpu") for _ in range(3)):
                noise = torch.randn(256, 2, generator=rng)
                loss = sm.denoising_loss(fake, x0.detach(), sigma, noise, weight=sm.edm_weight(sigma, scale)).mean()
                theirs.zero_grad()
                loss.backward()
                theirs.step()
            xt = x0 + sigma[:, None] * torch.randn(256, 2, generator=rng)
            D_p = teacher(xt, sigma)
            direction = (D_p - fake(xt, sigma)) / (x0 - D_p).abs().mean(1, keepdim=True).clamp(min=1e-3)
            loss = -(direction * x0).sum(1).mean()
            ours.zero_grad()
            loss.backward()
            ours.step()
        return student

    assert not check.distillation_loop(leaking)
    assert "is the direction a constant" in capsys.readouterr().out


def test_dimensions_and_types_are_looked_at(capsys):
    plane = lambda x, m, s, w: check.ours.mixture_score(x, m, s, w * s ** (x.shape[1] - 2))  # noqa: E731
    assert not check.mixture_score(plane)
    assert "s^d, where d is the dimension of x" in capsys.readouterr().out

    def tensors(loss, optimizer, steps):
        return [torch.tensor(value) for value in solutions.training_loop(loss, optimizer, steps)]

    assert not check.training_loop(tensors)
    assert "loss.item()" in capsys.readouterr().out


def test_the_even_weight_is_edms_and_makes_every_level_count_one():
    sigma = torch.tensor([0.05, 0.5, 3.0], dtype=torch.float64)
    x = torch.linspace(-40, 40, 200_001, dtype=torch.float64)
    for data in (0.5, 2.0):
        weight = solutions.even_weight(sigma, data)
        torch.testing.assert_close(weight, sm.edm_weight(sigma, data))
        for level, w in zip(sigma, weight, strict=True):  # the posterior at the noised point 0.3, by quadrature
            p = (-(x**2) / (2 * data**2) - (0.3 - x) ** 2 / (2 * level**2)).softmax(0)
            variance = (p * x**2).sum() - (p * x).sum() ** 2
            torch.testing.assert_close(w * variance, torch.ones_like(w), rtol=1e-6, atol=0)
