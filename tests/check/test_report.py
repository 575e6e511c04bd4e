"""An instructor's own exercise: verdicts, hints for foreseeable mistakes, and the line in which an answer raised."""

import pytest
import torch

from minidistill import check

SIGMA = torch.tensor([0.5, 2.0, 3.0])
X = torch.tensor([[1.0, -2.0], [0.5, 4.0], [3.0, 1.0]])
CASES = [("ones", (X, torch.ones(3)), X), ("levels", (X, SIGMA), X / SIGMA[:, None])]


def _verdict(answer, capsys, **options):
    correct = check.report(7, answer, CASES, **options)
    line = capsys.readouterr().out
    assert line.startswith("exercise 7: ")
    assert line.count("\n") == 1
    return correct, line.removeprefix("exercise 7: ").strip()


def test_correct_and_not_attempted(capsys):
    assert _verdict(lambda x, sigma: x / sigma[:, None], capsys) == (True, "correct")
    assert _verdict(lambda x, sigma: ..., capsys) == (False, "not attempted yet")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda x, sigma: -x / sigma[:, None], "Hint: the sign is wrong"),
        (lambda x, sigma: 3 * x / sigma[:, None], "Hint: right up to a factor 3"),
        (lambda x, sigma: x / sigma[:, None] ** 2, "Hint: right up to a factor 1 / sigma"),
        (lambda x, sigma: x, "Hint: right up to a factor sigma"),
        (lambda x, sigma: -x * sigma[:, None], "Hint: right up to a factor -sigma**2"),
        (lambda x, sigma: (x / sigma[:, None]).mean(), "wanted one for each"),
        (lambda x, sigma: None, "your function returns None; is a `return` missing?"),
        (lambda x, sigma: x + sigma[:, None], "Hint: you add where the score divides"),
    ],
)
def test_foreseeable_mistakes_get_a_hint(answer, hint, capsys):
    hints = {"you add where the score divides": lambda x, sigma: x + sigma[:, None]}
    correct, verdict = _verdict(answer, capsys, hints=hints)
    assert not correct
    assert hint in verdict


def test_a_column_too_many(capsys):
    check.report(1, lambda x: x.sum(1, keepdim=True), [("sum", (X,), X.sum(1))])
    assert "keepdim" in capsys.readouterr().out


def test_no_hint_where_none_fits(capsys):
    assert "Hint" not in _verdict(lambda x, sigma: x.cos(), capsys)[1]


def test_a_hint_never_raises(capsys):
    def broken(x, sigma):
        raise RuntimeError("no hint")

    assert "expected" in _verdict(lambda x, sigma: x.cos(), capsys, hints={"never": broken})[1]


def test_an_exception_shows_the_learners_line(capsys):
    def answer(x, sigma):
        scaled = x / sigma  # shapes (3, 2) and (3,)
        return scaled

    correct, verdict = _verdict(answer, capsys)
    assert not correct
    assert "raised RuntimeError" in verdict
    assert "`scaled = x / sigma" in verdict


def test_arguments_may_be_made_afresh(capsys):
    def doubled(values):
        values[0] *= 2
        return values[0]

    assert check.report(1, doubled, [("one", lambda: ([1.0],), 2.0), ("again", lambda: ([1.0],), 2.0)])


def test_tolerance(capsys):
    assert not check.report(1, lambda: 1.05, [("near", (), 1.0)])
    assert check.report(1, lambda: 1.05, [("near", (), 1.0)], atol=0.1)


def _unsafe(x, means, stds, weights):
    """Right near the data, 0 / 0 far from them."""
    offset = means - x[:, None]
    joint = weights / stds ** x.shape[1] * (-(offset**2).sum(2) / (2 * stds**2)).exp()
    return ((joint / joint.sum(1, keepdim=True) / stds**2)[:, :, None] * offset).sum(1)


@pytest.mark.parametrize(
    ("name", "mistake", "hint"),
    [
        ("one_call", lambda D, z, sigma: D(z, sigma), "starts at x = sigma z"),
        ("score_gap", lambda p, q, sigma: (q - p) / sigma[:, None] ** 2, "the sign is wrong"),
        ("score_gap", lambda p, q, sigma: (p - q) / sigma[:, None], "by sigma^2, not by sigma"),
        ("score_gap", lambda p, q, sigma: (p - q) / sigma**2, "it is `sigma[:, None]`"),
        ("one_call", lambda D, z, s: s * z - s * (s * z - D(s * z, s)), "it is divided by sigma"),
        ("one_call", lambda D, z, s: 2 * s * z - D(s * z, s), "the step is 0 - sigma long"),
        ("add_noise", lambda x0, sigma, noise: x0 + sigma * noise, "it is `sigma[:, None]`"),
        ("euler_step", lambda D, x, s, t: D(x, s), "all the way to level 0"),
        ("euler_step", lambda D, x, s, t: x + (t - s)[:, None] * (x - D(x, s)) / s, "not subscriptable"),
        ("tweedie", lambda score, x, sigma: x + sigma[:, None] ** 2 * score(x), "`sigma` is a single number here"),
        ("langevin_share", lambda start, weight: weight, "cross the gap"),
        ("langevin_share", lambda start, weight: 1, "to one side"),
        ("langevin_share", lambda start, weight: start * weight, "whatever the weights"),
        ("add_noise", lambda x0, sigma, noise: x0.add_(sigma[:, None] * noise), "changes its argument `x0`"),
        ("mixture_score", lambda x, m, s, w: _unsafe(x, m, s, w), "points far out"),
        ("denoising_loss", lambda D, x0, s, e: check.ours.denoising_loss(D, x0, s, e).detach(), "with a gradient"),
        ("denoising_loss", lambda D, x0, s, e: check.ours.denoising_loss(D, x0, s, e) / s**4, "no factor 1 / sigma^4"),
        ("even_weight", lambda s, d: s**2 * d**2 / (s**2 + d**2), "that is the variance"),
        ("even_weight", lambda s, d: 1 / s**2, "the data's own variance counts too"),
        ("training_loop", lambda loss, optimizer, n: loss().item(), "the list of all losses"),
        ("tweedie", lambda score, x, sigma: x + sigma * score(x), "the variance sigma^2"),
        ("euler_step", lambda D, x, s, t: x + (s - t) * (x - D(x, s)) / s, "which is negative"),
        ("denoising_loss", lambda D, x0, s, e: (D(x0, s) - x0).square().mean(1), "on the noised"),
        ("denoising_loss", lambda D, x0, s, e: (D(x0 + s[:, None] * e, s) - x0).square().sum(1), "not summed"),
        ("training_loop", lambda loss, optimizer, n: [loss().item() for _ in range(n)], "optimizer.step()"),
        ("distillation_loop", lambda p, student, fake, n, rng: student, "do the fake network's weights move"),
    ],
)
def test_hints_of_the_first_notebooks(name, mistake, hint, capsys):
    assert not getattr(check, name)(mistake)
    assert hint in capsys.readouterr().out


def test_what_stands_in_is_correct(capsys):
    for name in check.ours.__all__:
        assert getattr(check, name)(getattr(check.ours, name)), name
