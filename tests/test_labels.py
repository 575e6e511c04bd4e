"""Classes: whole numbers of any type mean the same everywhere, and what is no class meets one clear error."""

import pytest
import torch

from minidistill import score_matching, teachers
from minidistill.metrics import classifier, evaluation, expected_calibration_error, features
from minidistill.networks import MLP, Denoiser, Discriminator, Generator
from minidistill.samplers import karras_sigmas, sample
from minidistill.samplers.likelihood import log_likelihood
from minidistill.teachers.guidance import calibrated, classifier_free
from tests.helpers import mixture_2d, normal, rng

N = 12
CLASSES = torch.arange(N) % 3
X = normal(N, 2, dtype=torch.float32)
IMAGES = torch.randint(256, (N, 3, 32, 32), generator=rng(), dtype=torch.uint8)


def network(**options):
    torch.manual_seed(0)
    return MLP((2,), hidden=8, depth=1, n_classes=3, **options)


def denoiser():
    return Denoiser(network(), 0.7)


class Logits(torch.nn.Module):
    def forward(self, x, sigma):
        return torch.cat([x, x[:, :1]], 1)


def recognised(label):
    extract = features.Extractor("x", 2, torch.nn.Flatten(), (3, 32, 32), judge=lambda x: x.flatten(1)[:, :3])
    return torch.tensor(extract.recognised(IMAGES, label))


#: Everything that takes classes of N samples, of three classes where it knows: a tensor that depends on them.
PLACES = {
    "mixture": lambda y: mixture_2d().denoise(X.double(), 1.0, y),
    "denoiser": lambda y: denoiser()(X, 1.0, y),
    "denoiser's features": lambda y: denoiser().features(X, 1.0, y),
    "generator": lambda y: Generator(denoiser(), 1.0)(X, y),
    "discriminator": lambda y: Discriminator(network(out_features=1), 0.7)(X, 1.0, y),
    "sampler": lambda y: sample(denoiser(), X, karras_sigmas(2), label=y),
    "likelihood": lambda y: log_likelihood(denoiser(), X, label=y, sigmas=torch.tensor([0.1, 1.0])),
    "gaussian teacher": lambda y: teachers.GaussianTeacher(X, CLASSES)(X, 1.0, y),
    "empirical teacher": lambda y: teachers.EmpiricalTeacher(X, labels=CLASSES)(X, 1.0, y),
    "guidance": lambda y: classifier_free(mixture_2d(), 2.0)(X.double(), 1.0, y),
    "calibrated": lambda y: calibrated(mixture_2d(), X.double(), torch.tensor([1.0]), CLASSES, generator=rng())(
        X.double(), 1.0, y),
    "posterior": lambda y: score_matching.posterior_denoiser(lambda x, s, y=None: x, Logits())(X, 1.0, y),
    "sample_teacher": lambda y: evaluation.sample_teacher(denoiser(), N, levels=2, label=y, progress=False)[0],
    "sample_student": lambda y: evaluation.sample_student(Generator(denoiser(), 1.0), N, label=y, progress=False)[0],
}
#: Those that learn the number of classes from the data's.
ENTRANCES = {
    "train_denoiser": lambda y: next(
        teachers.train_denoiser(X, labels=y, steps=1, batch_size=4, progress=False).parameters()),
    "distil_energy": lambda y: next(
        teachers.distil_energy(denoiser(), X, labels=y, steps=1, batch_size=4, progress=False).parameters()),
    "calibrated": lambda y: calibrated(mixture_2d(), X.double(), torch.tensor([1.0]), y, generator=rng()).eta,
    "gaussian teacher": lambda y: teachers.GaussianTeacher(X, y)(X, 1.0, CLASSES),
    "empirical teacher": lambda y: teachers.EmpiricalTeacher(X, labels=y)(X, 1.0, CLASSES),
    "classifier": lambda y: classifier.train_classifier(X, y, steps=1, progress=False).head.weight,
    "image classifier": lambda y: classifier.train_cifar10_classifier(
        IMAGES, y, steps=1, batch_size=4, progress=False).head.weight,
    "calibration error": lambda y: torch.tensor(expected_calibration_error(X.exp().softmax(1).repeat(1, 2) / 2, y)),
    "recognised": recognised,
}
BOTH = [*(pytest.param(call, id=name) for name, call in PLACES.items()),
        *(pytest.param(call, id=f"{name}, data") for name, call in ENTRANCES.items())]


@pytest.mark.parametrize("call", BOTH)
def test_whole_numbers_of_any_type_are_classes(call):
    wanted = call(CLASSES).detach()
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16):
        assert torch.equal(call(CLASSES.to(dtype)).detach(), wanted)


@pytest.mark.parametrize("call", BOTH)
def test_what_is_no_class_meets_one_error(call):
    for wrong, error, words in (
        (1, TypeError, rf"labels? is int; wanted an integer tensor of shape \({N},\)"),
        (CLASSES.tolist(), TypeError, r"labels? is list; wanted an integer tensor"),
        (CLASSES > 0, ValueError, r"labels? is torch\.bool of shape \(12,\); wanted an integer tensor of shape"),
        (CLASSES.float(), ValueError, r"labels? is torch\.float32 of shape"),
        (CLASSES[1:], ValueError, r"labels? is torch\.int64 of shape \(11,\); wanted an integer tensor of shape"),
        (CLASSES - 1, ValueError, r"labels? runs from -1 to 1; wanted 0 "),
    ):
        with pytest.raises(error, match=words):
            call(wrong)


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in PLACES.items()])
def test_a_class_too_many_meets_the_same_error(call):
    with pytest.raises(ValueError, match=r"label runs from 0 to 3; wanted 0 to 2"):
        call(torch.arange(N) % 4)

