"""Checksums of teachers, data and labels: equal for equal things, and different for whatever changes a result."""

import copy

import pytest
import torch
from torch import nn

from minidistill.distributions import GaussianMixture, grid, ring
from minidistill.networks import Denoiser, Generator
from minidistill.teachers import EmpiricalTeacher, GaussianTeacher, classifier_free
from minidistill.training import Speed, checkpoints, fingerprint
from tests.helpers import small_denoiser

DATA = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))


def changed(seed=1):
    other = DATA.clone()
    other[3, 1] += 1e-3 * seed
    return other


def labelled(scale):
    return classifier_free(ring(8), scale)


def method(scale):
    return ring(8, std=scale).denoise


def closure(scale):
    return lambda x, sigma, label=None: scale * x


DIFFERENT = {
    "tensor": (lambda: DATA.clone(), changed, lambda: DATA.double(), lambda: DATA.reshape(2, 20), lambda: DATA[:10]),
    "bytes": (lambda: torch.arange(6).byte(), lambda: torch.arange(6), lambda: torch.arange(6).bool()),
    "mixture": (lambda: ring(8), lambda: ring(8, std=0.3), lambda: ring(7), lambda: grid(3),
                lambda: ring(8, weights=range(1, 9)), lambda: ring(8).noised(0.1)),
    "covariances": (lambda: GaussianMixture([[0.0, 0.0]], torch.tensor([[[2.0, 0.5], [0.5, 1.0]]])),
                    lambda: GaussianMixture([[0.0, 0.0]], torch.tensor([[[2.0, 0.4], [0.4, 1.0]]]))),
    "denoiser": (small_denoiser, lambda: small_denoiser(1), lambda: Denoiser(small_denoiser().network, 0.8),
                 lambda: small_denoiser().network, lambda: Generator(small_denoiser(), 1.0),
                 lambda: Generator(small_denoiser(), 1.5)),
    "closed form": (lambda: EmpiricalTeacher(DATA), lambda: EmpiricalTeacher(changed()),
                    lambda: EmpiricalTeacher(DATA, top_k=3), lambda: GaussianTeacher(DATA)),
    "guided": (lambda: labelled(2.0), lambda: labelled(3.0)),
    "function": (lambda: closure(2.0), lambda: closure(3.0)),
    "method": (lambda: method(0.2), lambda: method(0.3)),
    "list": (lambda: [1, "a"], lambda: ["a", 1], lambda: (1, "a"), lambda: {"0": 1, "1": "a"}),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_equal_things_have_equal_fingerprints_and_others_have_not(name):
    prints = [fingerprint(make()) for make in DIFFERENT[name]]
    assert prints[0] == fingerprint(DIFFERENT[name][0]())
    assert len(set(prints)) == len(prints)
    assert all(len(each) == 8 for each in prints)


def test_what_does_not_change_a_result_does_not_change_it():
    """Memory order, precision and training mode, a copy, a way through a file."""
    model = small_denoiser(shape=(1, 4, 4))
    wanted = fingerprint(model)
    Speed("bfloat16", channels_last=True).apply(model)
    assert fingerprint(model.eval().requires_grad_(False)) == wanted
    assert fingerprint(copy.deepcopy(model)) == wanted
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert fingerprint(images.to(memory_format=torch.channels_last)) == fingerprint(images)
    assert fingerprint(None) is None


def test_a_saved_teacher_is_known_again(tmp_path):
    model = small_denoiser()
    loaded = checkpoints.load_model(checkpoints.save_model(tmp_path / "m", model))[0]
    assert fingerprint(loaded) == fingerprint(model)


def test_things_that_hold_themselves_and_modules_that_hide_others():
    """A wrapper's teacher stands in a list, so that its weights stay out of its own."""
    class Hiding(nn.Module):
        def __init__(self, teacher):
            super().__init__()
            self._teacher = [teacher]

    assert fingerprint(Hiding(small_denoiser(0))) != fingerprint(Hiding(small_denoiser(1)))
    loop: list = []
    loop.append(loop)
    assert fingerprint(loop) == fingerprint(loop)
