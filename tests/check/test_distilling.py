"""A distillation loop that is wrong somewhere is told so, and where, although it trains."""

import pytest
import torch

from minidistill import check
from minidistill import score_matching as sm
from minidistill.check import distilling


def _loop(
    *, rounds=3, level=0.5, rate=5e-3, detach=True, constant=True, zero=("student", "fake"), noised=True, fresh=True,
    same=True, fake_score=True, own=True, direction=lambda gap, sigma, size: sigma**2 * gap / size, sign=-1.0,
    data=False, detour=lambda loss: loss,
):
    """The loop of notebook 00, with some of its lines changed."""
    def loop(teacher, student, fake, steps, rng):
        n, s = 256, teacher.sigma_data
        student_optimizer = torch.optim.Adam(student.parameters(), 2e-3, betas=(0.0, 0.99))
        fake_optimizer = torch.optim.Adam(fake.parameters(), rate, betas=(0.0, 0.99))

        def draw():
            noise = torch.randn(n, 2, generator=rng) if own else torch.randn(n, 2)
            return sm.log_uniform_sigma(n, 0.035 * s, 5 * s, rng, "cpu"), noise

        once = torch.randn(n, 2, generator=rng)
        for _ in range(steps):
            z = torch.randn(n, 2, generator=rng) if fresh else once
            if not detach and "student" in zero:
                student_optimizer.zero_grad()
            x0 = student(level * s * z, level * s)
            for _ in range(rounds):
                sigma, noise = draw()
                samples = teacher.sample(n, rng) if data else x0.detach() if detach else x0
                weight = sm.edm_weight(sigma, s)
                loss = sm.denoising_loss(fake, samples, sigma, noise, weight=weight).mean()
                if "fake" in zero:
                    fake_optimizer.zero_grad()
                loss.backward(retain_graph=not detach)
                fake_optimizer.step()
            sigma, noise = draw()
            xt = x0 + sigma[:, None] * noise if noised else x0
            with torch.set_grad_enabled(not constant):
                D_p = teacher(xt, sigma)
                D_q = fake(xt if same else x0, sigma) if fake_score else xt
                gap = (D_p - D_q) / sigma[:, None] ** 2
                size = (x0 - D_p).abs().mean(1, keepdim=True).clamp(min=1e-3)
                pull = direction(gap, sigma[:, None], size)
            loss = detour((sign * pull * x0).sum(1)).mean()
            if detach and "student" in zero:
                student_optimizer.zero_grad()
            loss.backward()
            student_optimizer.step()
        return student

    return loop


@pytest.mark.parametrize(("changed", "said"), [
    ({"rate": 0.0}, "do the fake network's weights move"),
    ({"constant": False}, "is the direction a constant"),
    ({"detach": False}, "are the student's samples held fixed"),
    ({"zero": ("fake",)}, "set to zero"),
    ({"zero": ("student",)}, "set to zero"),
    ({"rounds": 1}, "the fake network's steps"),
    ({"level": 2.0}, "the level at which the student is asked"),
    ({"fresh": False}, "noise z of its own"),
    ({"noised": False}, "are samples noised"),
    ({"same": False}, "at the same points"),
    ({"sign": 1.0}, "or is a sign wrong"),
    ({"fake_score": False}, "along sigma^2 (s_p - s_q) / size"),
    ({"direction": lambda gap, sigma, size: gap / size}, "along sigma^2 (s_p - s_q) / size"),
    ({"direction": lambda gap, sigma, size: gap}, "along sigma^2 (s_p - s_q) / size"),
    ({"data": True}, "does the fake network know the student's samples"),
    ({"own": False}, "generator=rng"),
])
def test_a_loop_with_one_mistake(changed, said, capsys, monkeypatch):
    monkeypatch.setattr(distilling, "STEPS", 300 if "data" in changed else 60)
    assert not check.distillation_loop(_loop(**changed))
    out = capsys.readouterr().out
    assert said in out, out


@pytest.mark.parametrize("changed", [
    {}, {"detour": lambda loss: 256 * loss},
    {"direction": lambda gap, sigma, size: sigma**2 * gap / size.mean()},  # one size for the batch
])
def test_loops_that_do_the_same(changed, capsys):
    assert check.distillation_loop(_loop(**changed)), capsys.readouterr().out
