"""`distill` from end to end: it learns, starts where it should, repeats itself, and refuses bad input early."""

from typing import Any

import pytest
import torch

from minidistill import ring
from minidistill.distillation import OBJECTIVES, distill, draw
from minidistill.distillation.matching import fake_loss
from minidistill.distillation.prepare import prepare
from minidistill.metrics import grid_kl
from minidistill.networks import MLP, Correction, Denoiser, Generator
from minidistill.teachers import train_denoiser
from tests.helpers import small_denoiser, small_ring, states_equal

QUICK: dict[str, Any] = {"steps": 3, "batch_size": 8, "progress": False}


def small_generator(n_classes=0):
    torch.manual_seed(5)
    return Generator(Denoiser(MLP((2,), hidden=64, activation="relu", n_classes=n_classes), 1.4), 2.0)


def bare_teacher(x, sigma, label=None):
    """The exact denoiser with nothing else: no shape, no samples."""
    return ring()(x, sigma)


@pytest.fixture(scope="module")
def class_teacher():
    """A class-conditional denoiser of three clusters."""
    x, label = ring(k=3, radius=1.0, std=0.2).sample_with_labels(300, torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    teacher = train_denoiser(x, MLP((2,), hidden=32, n_classes=3), labels=label, steps=150, progress=False)
    return teacher, x, label


@pytest.mark.parametrize("objective", ["reverse_kl", "jensen_shannon", "sim"])
def test_distillation_moves_the_student_to_the_target(objective):
    """Both KLs on the grid fall to less than half of where they began."""
    generator = small_generator()
    before = grid_kl(ring(), draw(generator, 4000), 0.2)
    out = distill(ring(), generator, objective, steps=300, batch_size=128, progress=False)
    after = grid_kl(ring(), out.sample(4000), 0.2)
    assert after.kl < 0.5 * before.kl
    assert after.reverse_kl < 0.5 * before.reverse_kl
    assert after.outside < 0.01


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_runs_and_logs_finite_losses(name):
    out = distill(small_ring(), objective=name, **QUICK)
    assert out.history[-1]["step"] == 3
    assert {"critic", "generator"} <= out.history[-1].keys()
    assert torch.isfinite(out.sample(5)).all()
    assert (out.ratio is not None) == OBJECTIVES[name].needs_ratio


def test_samples_follow_the_seed_and_have_the_shape():
    out = distill(small_ring(), **QUICK)
    assert out.sample(7).shape == (7, 2)
    assert torch.equal(out.sample(7, seed=1), out.sample(7, seed=1))
    assert not torch.equal(out.sample(7, seed=1), out.sample(7, seed=2))
    assert torch.equal(out.sample(3), draw(out.ema, 3))


def test_same_seed_same_weights():
    def weights(seed):
        return distill(small_ring(), objective="jensen_shannon", seed=seed, **QUICK).ema.state_dict()

    assert states_equal(weights(4), weights(4))
    assert not states_equal(weights(4), weights(5))


def test_student_and_fake_start_from_a_trained_teachers_weights(class_teacher):
    """Both equal the teacher before training, share nothing with it, and training leaves the teacher alone."""
    teacher, x, label = class_teacher
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    run = prepare(teacher, None, needs_ratio=True, shape=(2,), sigma_data=teacher.sigma_data, sigma_init=1.0, data=x,
                  labels=label, flip=False, rng=torch.Generator().manual_seed(0))
    assert states_equal(run.generator.denoiser.state_dict(), before)
    assert states_equal(run.fake.state_dict(), before)
    assert all(parameter.requires_grad for parameter in [*run.generator.parameters(), *run.fake.parameters()])
    out = distill(teacher, objective="forward_kl", data=x, labels=label, learning_rate=1e-2, **QUICK)
    assert states_equal(teacher.state_dict(), before)
    assert isinstance(out.teacher, Denoiser)
    assert states_equal(out.teacher.state_dict(), before)
    assert not states_equal(out.generator.denoiser.state_dict(), before)
    assert not states_equal(out.fake.state_dict(), before)


def test_an_exact_teacher_gives_a_correction_and_a_given_generator_is_trained_in_place():
    generator = small_generator()
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    out = distill(small_ring(), generator, **QUICK)
    assert out.generator is generator
    assert isinstance(out.fake, Correction)
    assert not states_equal(generator.state_dict(), before)


def test_conditional_students_take_labels(class_teacher):
    teacher, x, label = class_teacher
    out = distill(teacher, objective="jensen_shannon", data=x, labels=label, **QUICK)
    assert torch.equal(out.sample(6), out.sample(6, label=torch.arange(6) % 3))
    assert not torch.equal(out.sample(6), out.sample(6, label=torch.zeros(6).long()))


def test_a_bare_callable_teaches():
    assert distill(bare_teacher, shape=(2,), **QUICK).sample(4).shape == (4, 2)
    data = ring().sample(50, torch.Generator().manual_seed(0))
    assert distill(bare_teacher, objective="forward_kl", data=data, **QUICK).ratio is not None


def test_evaluate_joins_the_history():
    seen = []

    def evaluate(generator):
        seen.append(generator)
        return {"number": 1.5}

    out = distill(small_ring(), evaluate=evaluate, evaluate_every=2, **QUICK)
    assert [(r["step"], r["number"]) for r in out.history if "number" in r] == [(2, 1.5), (3, 1.5)]
    assert all(generator is out.ema for generator in seen)


class Towards:
    """A custom objective: pull the samples to a point. Its own critic, no density ratio."""

    needs_ratio = False

    def critic_loss(self, batch):
        return fake_loss(batch)

    def generator_loss(self, batch):
        return (batch.x0 - torch.tensor([3.0, -1.0])).square().sum(1)


class WithoutNeedsRatio:
    critic_loss, generator_loss = Towards.critic_loss, Towards.generator_loss


@pytest.mark.parametrize("objective", [Towards(), WithoutNeedsRatio()], ids=["with", "without"])
def test_a_custom_objective_is_minimised(objective):
    out = distill(small_ring(), objective=objective, steps=200, batch_size=32, progress=False)
    assert (out.sample(200) - torch.tensor([3.0, -1.0])).norm(dim=1).mean() < 0.3
    assert out.ratio is None


class Half:
    def critic_loss(self, batch):
        return batch.x0.sum(1)


DATA = torch.zeros(10, 2)
NAN = torch.full((10, 2), float("nan"))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"objective": "revers_kl"}, ValueError, "objective='revers_kl'.*did you mean 'reverse_kl'"),
    ({"objective": Half()}, TypeError, r"objective is Half; wanted a name or an object with .generator_loss"),
    ({"objective": None}, TypeError, "objective is NoneType"),
    ({"teacher": "ring"}, TypeError, "teacher is str"),
    ({"teacher": bare_teacher}, ValueError, r"wanted shape=\(...\) or data"),
    ({"teacher": bare_teacher, "shape": (2,), "objective": "forward_kl"}, ValueError, "data=None.*wanted data"),
    ({"teacher": small_denoiser(), "objective": "jensen_shannon"}, ValueError, "data=None"),
    ({"data": torch.zeros(10, 3)}, ValueError, r"data has samples of shape \(3,\), but teacher \(2,\)"),
    ({"shape": (3,)}, ValueError, r"shape has samples of shape \(3,\)"),
    ({"generator": Generator(small_denoiser(shape=(3,)), 1.0)}, ValueError, "generator has samples of shape"),
    ({"data": NAN}, ValueError, "data holds a NaN"),
    ({"data": DATA.long()}, TypeError, "data is a tensor of torch.int64"),
    ({"teacher": small_denoiser(n_classes=3), "data": DATA}, ValueError, "labels: this teacher has 3 classes"),
    ({"teacher": small_denoiser(n_classes=3), "data": DATA, "labels": torch.full((10,), 3)}, ValueError,
     "labels runs from 3 to 3; wanted 0 to 2"),
    ({"steps": 0}, ValueError, "steps=0"),
    ({"steps": 2.5}, ValueError, "steps=2.5"),
    ({"batch_size": 0}, ValueError, "batch_size=0"),
    ({"critic_steps": 0}, ValueError, "critic_steps=0"),
    ({"evaluate_every": 0}, ValueError, "evaluate_every=0"),
    ({"checkpoint_every": 0}, ValueError, "checkpoint_every=0"),
    ({"sigma_min": -1.0}, ValueError, "sigma_min=-1.0"),
    ({"sigma_max": float("nan")}, ValueError, "sigma_max=nan"),
    ({"sigma_min": 2.0, "sigma_max": 1.0}, ValueError, "sigma_min=2 is not below sigma_max=1"),
    ({"sigma_min": 1.0, "sigma_max": 1.0}, ValueError, "sigma_min=1 is not below"),
    ({"sigma_init": 0.0}, ValueError, "sigma_init=0.0"),
    ({"learning_rate": 0.0}, ValueError, "learning_rate=0.0"),
    ({"critic_learning_rate": -1.0}, ValueError, "critic_learning_rate=-1.0"),
    ({"ema_halflife": 0.0}, ValueError, "ema_halflife=0.0"),
    ({"seed": 1.5}, ValueError, "seed=1.5"),
    ({"callback_every": 5}, TypeError, "callback_every: .* `evaluate_every`"),
    ({"accumulate": 3}, ValueError, "batch_size=8: wanted a multiple of 3"),
    ({"clip": 0.0}, ValueError, "clip=0.0"),
])
def test_bad_arguments_are_named_before_a_file_is_written(tmp_path, change, error, message):
    arguments = {"teacher": small_ring(), **QUICK, "checkpoint": tmp_path / "run.safetensors", **change}
    with pytest.raises(error, match=message):
        distill(**arguments)
    assert not list(tmp_path.iterdir())
