"""Samples of teacher and student, and their comparison, with models whose quality is known."""

import json
import math

import pytest
import torch
from torch import nn

from minidistill import data, metrics, samplers
from minidistill.distillation import draw
from minidistill.distributions import ring
from minidistill.metrics import classifier, evaluation, features
from minidistill.metrics.evaluation import compare, measure, sample_student, sample_teacher, table
from minidistill.metrics.features import Extractor
from minidistill.networks import Generator
from tests.helpers import small_denoiser

N, K = 120, 2


def labelled_digits():
    return data.digits()


class Ideal(nn.Module):
    """E[x0 | x, label] when the data are 200 digits: what a perfect teacher of them computes. Counts its calls."""

    def __init__(self):
        super().__init__()
        images, labels = labelled_digits()
        self.images, self.labels = images[:200], labels[:200]
        self.shape, self.n_classes, self.calls = (1, 8, 8), 10, 0

    def forward(self, x, sigma, label):
        self.calls += 1
        apart = torch.cdist(x.flatten(1), self.images.flatten(1)).square()
        logit = -apart / (2 * sigma[:, None] ** 2)
        logit = logit.masked_fill(label.unsqueeze(1) != self.labels, -math.inf)
        return (logit.softmax(1) @ self.images.flatten(1)).reshape(x.shape)


class Replay(nn.Module):
    """A student that returns digits of the class asked for, from places `start` on in the data set."""

    def __init__(self, start, noise=0.0, shift=0):
        super().__init__()
        self.start, self.noise, self.shift = start, noise, shift
        self.shape, self.n_classes = (1, 8, 8), 10

    def forward(self, z, label):
        images, labels = labelled_digits()
        images, labels = images[self.start :], labels[self.start :]
        pick = [(labels == (one + self.shift) % 10).nonzero().flatten() for one in label]
        index = torch.stack([where[int(1e3 * abs(float(noise.sum()))) % len(where)]
                             for where, noise in zip(pick, z, strict=True)])
        return images[index] + self.noise * z


@pytest.fixture(scope="module")
def judge():
    return features.extractor("digits_classifier")


@pytest.fixture(scope="module")
def comparison(judge):
    images, _ = labelled_digits()
    teacher = Ideal()
    students = {"good": Replay(200), "noise": Replay(200, noise=3.0), "wrong class": Replay(200, shift=1)}
    out = compare(teacher, students, images, n=N, k=K, seed=1, features=judge, batch_size=50,
                  progress=False)
    return out, teacher


def test_comparison_ranks_models_of_known_quality(comparison):
    out, teacher = comparison
    by = {row["model"]: row for row in out.rows}
    assert [row["model"] for row in out.rows] == ["teacher", "good", "noise", "wrong class"]
    assert [row["calls"] for row in out.rows] == [35, 1, 1, 1]
    assert teacher.calls == 35 * 3  # 120 samples in batches of 50
    assert by["teacher"]["recognised"] > 0.95
    assert by["good"]["recognised"] > 0.95
    assert by["wrong class"]["recognised"] < 0.1
    assert by["noise"]["recognised"] < 0.5
    for good in ("teacher", "good", "wrong class"):  # all are real digits
        assert by[good]["precision"] > 0.95
    assert by["noise"]["precision"] < 0.5
    assert by["noise"]["frechet_ratio"] > 5 > by["good"]["frechet_ratio"]
    assert by["teacher"]["frechet_ratio"] == 1


def test_a_row_says_what_was_measured_and_how(comparison, judge):
    """Each number again, from the samples that came back."""
    out, _ = comparison
    images, _ = labelled_digits()
    real = judge(images)
    for row in out.rows:
        x = judge(out.samples[row["model"]])
        assert row["frechet"] == pytest.approx(metrics.frechet_distance(x, real), rel=1e-9)
        assert row["frechet_ratio"] == pytest.approx(row["frechet"] / out.rows[0]["frechet"], rel=1e-9)
        assert (row["precision"], row["recall"]) == metrics.precision_recall(x, real, K)
        assert row["recognised"] == judge.recognised(out.samples[row["model"]], out.labels)
        assert (row["n"], row["seed"], row["k"], row["n_reference"]) == (N, 1, K, 1797)
        assert row["features"] == "digits_classifier"
    assert out.labels.tolist() == [i % 10 for i in range(N)]
    assert all(samples.shape == (N, 1, 8, 8) for samples in out.samples.values())
    assert json.loads(json.dumps(out.rows)) == out.rows


def test_the_table_shows_the_numbers(comparison):
    out, _ = comparison
    lines = str(out).splitlines()
    assert lines == table(out.rows).splitlines()
    assert lines[0].split() == ["calls", "Frechet", "to", "teacher", "precision", "recall", "recognised"]
    good = out.rows[1]
    wanted = ["good", "1", f"{good['frechet']:.4g}", f"{good['frechet_ratio']:.2f}", "x", f"{good['precision']:.3f}",
              f"{good['recall']:.3f}", f"{good['recognised']:.1%}"]
    assert lines[2].split() == wanted
    assert lines[-1] == "n = 120 against 1,797 real, features: digits_classifier, seed 1"
    assert len({len(line) for line in lines[:-1]}) == 1  # columns in line
    bare = measure("alone", out.samples["good"], torch.randn(9, 32), Extractor(
        "mean", 32, lambda x: x.flatten(1)[:, :32], (1, 8, 8)), progress=False)
    assert bare["recognised"] is None
    assert table([bare]).splitlines()[1].split()[:2] == ["alone", "-"]
    assert table([]) == "no rows"


def test_teacher_samples_are_heuns_from_the_seeds_noise():
    teacher = Ideal()
    images, _ = sample_teacher(teacher, 30, levels=6, seed=4, progress=False)
    z = torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    wanted = samplers.heun(Ideal(), 80 * z, samplers.karras_sigmas(6), label=torch.arange(30) % 10)
    torch.testing.assert_close(images, wanted, rtol=1e-4, atol=1e-4)
    assert teacher.calls == 11
    again, _ = sample_teacher(teacher, 30, levels=6, seed=5, progress=False)
    assert (again - images).abs().max() > 0.1


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_samples_do_not_depend_on_the_batch_size(batch_size):
    denoiser = small_denoiser(shape=(1, 3, 3), n_classes=4)
    options = {"seed": 2, "progress": False, "label": torch.tensor([3, 1, 0, 2] * 5)}
    for sample, model in ((sample_teacher, denoiser), (sample_student, Generator(denoiser, 2.0))):
        images, labels = sample(model, 20, **options)
        again, same = sample(model, 20, batch_size=batch_size, **options)
        assert torch.equal(labels, same)
        torch.testing.assert_close(images, again, rtol=1e-4, atol=1e-4)


def test_student_samples_are_draws():
    model = Generator(small_denoiser(shape=(1, 3, 3), n_classes=4), 2.0)
    images, labels = sample_student(model, 10, seed=3, progress=False)
    torch.testing.assert_close(images, draw(model, 10, seed=3), rtol=1e-5, atol=1e-5)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert not images.requires_grad


def test_a_mixture_is_a_teacher_too():
    """Samples of an exact teacher without classes, from float to float: all near its modes."""
    images, labels = sample_teacher(ring(std=0.1), 200, progress=False)
    assert labels is None
    assert metrics.mode_coverage(ring(std=0.1), images).high_quality > 0.95


def test_colour_images_compare_offline_as_bytes_and_as_floats(capfd):
    """3x32x32 with the stored classifier; bytes and the floats they stand for give the same row."""
    images = torch.randint(256, (24, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    denoiser = small_denoiser(shape=(3, 32, 32))
    student = Generator(denoiser, 2.0)
    options = {"n": 12, "features": features.extractor("cifar10_classifier"), "levels": 2}
    out = compare(denoiser, student, images, progress=False, **options)
    assert capfd.readouterr() == ("", "")
    floats = compare(denoiser, {"student": student}, data.to_float(images), **options)
    assert "sampling: teacher" in capfd.readouterr().err
    assert out.rows == floats.rows
    assert [row["model"] for row in out.rows] == ["teacher", "student"]
    assert out.labels is None
    assert out.rows[0]["recognised"] is None
    assert out.rows[0]["calls"] == 3


def test_at_most_so_many_enter_precision_and_recall(monkeypatch):
    """A set sorted by class is drawn from at random, by the seed."""
    monkeypatch.setattr(evaluation, "MANIFOLD_N", 40)
    seen = []

    def spy(x, y, k):
        seen.append((x, y))
        return metrics.PrecisionRecall(1.0, 1.0)

    monkeypatch.setattr(evaluation, "precision_recall", spy)
    extract = Extractor("pixels", 4, lambda x: x.flatten(1), (1, 2, 2))
    images = torch.linspace(-1, 1, 400).reshape(100, 1, 2, 2)
    row = measure("m", images, images.flatten(1), extract, seed=1, progress=False)
    measure("m", images, images.flatten(1), extract, seed=1, progress=False)
    x, y = seen[0]
    assert x.shape == y.shape == (40, 4)
    assert len(x.unique(dim=0)) == 40
    assert (x.mean() - images.mean()).abs() < 0.3  # not the first 40, whose mean is -0.6
    assert torch.equal(x, seen[1][0])
    assert (row["n"], row["n_reference"]) == (100, 100)
    assert row["frechet"] == pytest.approx(0, abs=1e-9)


def test_a_model_that_diverged_is_named(judge):
    images, _ = labelled_digits()
    with pytest.raises(ValueError, match="lost's samples holds a NaN"):
        measure("lost", images[:9] * math.nan, judge(images[:9]), judge, progress=False)


class Untouched:
    """A teacher that must not be called."""

    shape, n_classes = (1, 8, 8), 10

    def __call__(self, *_):
        raise AssertionError("work was done before the arguments were checked")


def no_features(_):
    raise AssertionError("work was done before the arguments were checked")


REAL = torch.zeros(9, 1, 8, 8)


@pytest.mark.parametrize(("change", "message"), [
    ({"n": 1}, "n=1: wanted a whole number >= 4"),
    ({"n": 3}, "n=3"),
    ({"k": 0}, "k=0"),
    ({"levels": 0}, "levels=0"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"seed": -1}, "seed=-1"),
    ({"sigma_max": 0.0}, "sigma_max=0.0"),
    ({"reference": REAL[:3]}, "reference has 3 samples; wanted at least 4"),
    ({"reference": torch.zeros(9, 3, 8, 8)}, r"reference has shape \(9, 3, 8, 8\); wanted \(n, 1, 8, 8\)"),
    ({"reference": torch.zeros(9, 3, 8, 8, dtype=torch.uint8)}, "reference has shape"),
    ({"reference": REAL / 0}, "reference holds a NaN"),
    ({"students": Generator(small_denoiser(shape=(1, 8, 8)), 1.0)}, r"student makes samples \(1, 8, 8\) of 0 classes"),
    ({"students": {"s": Generator(small_denoiser(shape=(1, 4, 4)), 1.0)}}, r"s makes samples \(1, 4, 4\)"),
    ({"students": {"teacher": Replay(0)}}, "the name 'teacher' is taken"),
    ({"features": Extractor("other", 4, no_features, (3, 8, 8))}, r"teacher has images of shape \(1, 8, 8\); other"),
])
def test_bad_arguments_are_named_before_any_work(change, message):
    given = {"students": {}, "reference": REAL, "n": 20, "features": Extractor("f", 4, no_features, (1, 8, 8))} | change
    with pytest.raises(ValueError, match=message):
        compare(Untouched(), given.pop("students"), given.pop("reference"), progress=False, **given)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: sample_teacher(Untouched(), 0), ValueError, "n=0"),
    (lambda: sample_teacher(Untouched(), 2, label=torch.tensor([0, 10])), ValueError, "label runs from 0 to 10"),
    (lambda: sample_teacher(Untouched(), 2, label=torch.tensor([0])), ValueError, r"wanted an integer tensor of shape"),
    (lambda: sample_teacher(ring(), 2, label=torch.tensor([0, 1])), ValueError, "this model has no classes"),
    (lambda: sample_teacher(lambda x, sigma: x, 2), TypeError, "function has no `shape`"),
    (lambda: sample_student(Replay(0), 2, batch_size=0), ValueError, "batch_size=0"),
])
def test_bad_sampling_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_quality_of_the_stored_classifiers_own_classes_is_seen():
    """`recognised` goes through the extractor's preparation: bytes and floats agree with the classifier itself."""
    images = torch.randint(256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    guess = classifier.load_cifar10()(data.to_float(images)).argmax(1)
    extract = features.extractor("cifar10_classifier")
    row = measure("m", images, extract(images), extract, label=guess, progress=False)
    assert row["recognised"] == 1
    assert row["precision"] == row["recall"] == 1
    assert row["frechet"] == pytest.approx(0, abs=1e-6)
