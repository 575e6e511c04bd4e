"""What an objective may be and ask for, what it is given, what `distill` refuses; students without a fake network."""

from typing import Any

import numpy as np
import pytest
import torch

from minidistill import divergences, ring
from minidistill.distillation import OBJECTIVES, Batch, Drifting, Needs, Regression, Settings, distill
from minidistill.distillation.objectives import DistributionMatching, fake_loss
from minidistill.distillation.objectives.samples import drift, mean_near, squared_distances
from minidistill.distributions import GaussianMixture
from minidistill.metrics import kl_both_ways
from minidistill.networks import MLP, Denoiser, Generator, estimate_sigma_data, probe
from minidistill.teachers import EmpiricalTeacher, train_denoiser
from tests.helpers import normal, rng, small_denoiser, small_ring, states_equal

QUICK: dict[str, Any] = {"steps": 3, "batch_size": 8, "progress": False}


class Towards:
    """Pull the samples to the origin: a loss, and nothing else."""

    def generator_loss(self, batch):
        return batch.x0.square().sum(1)


# ------------------------------------------------- what an objective gets

class Watch(Towards):
    """Keeps what it was given."""

    def __init__(self, **needs):
        self.seen = []
        for name, value in needs.items():
            setattr(self, name, value)

    def generator_loss(self, batch):
        self.seen.append(batch)
        return super().generator_loss(batch)


def test_without_a_critic_loss_there_is_no_critic_and_no_fake_network():
    watch = Watch()
    out = distill(small_ring(), objective=watch, **QUICK)
    assert out.fake is None
    assert out.ratio is None
    assert "critic" not in out.history[-1]
    batch = watch.seen[0]
    assert batch.fake is None
    assert batch.real is None
    assert batch.target is None


def test_the_student_can_be_called_at_any_level_and_progress_runs_from_0_to_1():
    watch = Watch()
    generator = Generator(Denoiser(MLP((2,), hidden=8, depth=1), 1.0), 2.0)
    distill(small_ring(), generator, watch, **QUICK)
    assert [batch.progress for batch in watch.seen] == [0.0, 1 / 3, 2 / 3]
    x, sigma = torch.randn(8, 2), torch.rand(8) + 0.1
    torch.testing.assert_close(watch.seen[-1].student(x, sigma), generator.denoiser(x, sigma))
    assert watch.seen[-1].student(x, sigma).requires_grad
    assert isinstance(watch.seen[-1].generator, torch.Generator)


def test_the_target_is_an_average_without_gradient_that_follows_and_resumes(tmp_path):
    """Its half-life of one batch moves it half of the way in each step, once more than twenty steps were seen."""
    options = {"steps": 30, "batch_size": 8, "progress": False, "learning_rate": 1e-2, "schedule": "constant"}
    watch = Watch(needs_target=8.0)
    distill(small_ring(), objective=watch, **options)
    x, sigma = torch.randn(8, 2), torch.rand(8) + 0.1
    target, student = watch.seen[-1].target(x, sigma), watch.seen[-1].student(x, sigma)
    assert not target.requires_grad
    assert not torch.equal(target, student)

    def crash(state):
        raise RuntimeError("crash")

    file = tmp_path / "run.safetensors"
    with pytest.raises(RuntimeError, match="crash"):
        distill(small_ring(), objective=Watch(needs_target=8.0), checkpoint=file, checkpoint_every=10,
                evaluate_every=20, callbacks=[crash], **options)
    again = Watch(needs_target=8.0)
    distill(small_ring(), objective=again, checkpoint=file, resume=True, **options)
    assert torch.equal(again.seen[-1].target(x, sigma), target)


def test_real_samples_come_to_the_student_where_there_is_no_critic_or_it_asks():
    watch = Watch(needs_real=True)
    distill(small_ring(), objective=watch, **QUICK)
    assert all(batch.real.shape == (8, 2) for batch in watch.seen)
    assert not torch.equal(watch.seen[0].real, watch.seen[1].real)
    for needs, wanted in (({"needs_real": True}, False), ({"needs_student_real": True}, True)):
        watch = Watch(**needs)
        watch.critic_loss = fake_loss
        distill(small_ring(), objective=watch, **QUICK)
        assert all((batch.real is not None) == wanted for batch in watch.seen)


def test_a_law_of_noise_levels_and_a_phase_before_training():
    class Own(Watch):
        def noise_levels(self, n, settings, progress, generator):
            return torch.full((n,), settings.sigma_data * (1 + progress))

        def before_training(self, run, settings):
            self.begun = (run.generator, settings.steps)

    own = Own()
    out = distill(small_ring(), objective=own, **QUICK)
    s = small_ring().sigma_data
    assert [float(batch.sigma[0]) for batch in own.seen] == pytest.approx([s, 4 / 3 * s, 5 / 3 * s])
    assert own.begun == (out.generator, 3)


def test_a_second_teacher_is_passed_on_and_asked_for():
    watch = Watch(needs_second_teacher=True)
    distill(small_ring(), objective=watch, second_teacher=ring(5), **QUICK)
    assert watch.seen[0].second_teacher.n_components == 5
    with pytest.raises(TypeError, match="second_teacher is NoneType"):
        distill(small_ring(), objective=watch, **QUICK)


def test_without_samples_the_student_is_not_called():
    class Levels(Watch):
        needs_samples = False

        def generator_loss(self, batch):
            self.seen.append(batch)
            return (batch.student(batch.noise, batch.sigma) - 1).square().sum(1)

    watch = Levels()
    distill(small_ring(), objective=watch, **QUICK)
    assert not watch.seen[0].x0.any()


LOOK_AT_EACH_OTHER = ("drifting", "sinkhorn", "mmd", "energy_score", "embedding_loss", "moment_matching")
DRAW_FOR_A_PIECE = ("gan", "score_mismatching")  # directions of a penalty


@pytest.mark.parametrize("name", [
    "regression", "ctm", "mean_flow", "flow_map", "scm", "reflow", "class_ratio", "score_of_mixture_training",
    "wasserstein_flow", "real_uid", "sds", "asd", "score_forgetting", *LOOK_AT_EACH_OTHER, *DRAW_FOR_A_PIECE,
])
def test_pieces_and_resumed_runs_equal_the_whole(name, tmp_path):
    options: dict[str, Any] = {"objective": name, "steps": 6, "batch_size": 8, "progress": False}

    def crash(state):
        raise RuntimeError("crash")

    path = tmp_path / "run.safetensors"
    with pytest.raises(RuntimeError, match="crash"):
        distill(small_ring(), checkpoint=path, checkpoint_every=2, callbacks=[crash], evaluate_every=4, **options)
    whole = distill(small_ring(), **options)
    assert states_equal(distill(small_ring(), checkpoint=path, resume=True, **options).ema.state_dict(),
                        whole.ema.state_dict())
    if name not in (*LOOK_AT_EACH_OTHER, *DRAW_FOR_A_PIECE):
        cut = distill(small_ring(), accumulate=2, **options)
        for a, b in zip(cut.generator.parameters(), whole.generator.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# ------------------------------------------------- what is refused

class Scalar(Towards):
    def generator_loss(self, batch):
        return super().generator_loss(batch).mean()


class Detached(Towards):
    def generator_loss(self, batch):
        return super().generator_loss(batch).detach()


class Number(Towards):
    def generator_loss(self, batch):
        return 0.5


class Misspelt(Towards):
    needs_reel = True


class FlatCritic(Towards):
    def critic_loss(self, batch):
        return fake_loss(batch).sum()


@pytest.mark.parametrize(("objective", "error", "message"), [
    (Scalar(), ValueError, r"Scalar.generator_loss returned a tensor of shape \(\); wanted \(8,\)"),
    (Detached(), ValueError, "Detached.generator_loss returned a loss without a graph"),
    (Number(), TypeError, r"Number.generator_loss returned float; wanted a tensor \(8,\)"),
    (Misspelt(), TypeError, "Misspelt's attribute='needs_reel' is not known; did you mean 'needs_real'"),
    (FlatCritic(), ValueError, r"FlatCritic.critic_loss returned a tensor of shape \(\)"),
    (Towards, TypeError, "objective is Towards.*an instance, not the class"),
])
def test_bad_objectives_are_named(objective, error, message):
    with pytest.raises(error, match=message):
        distill(small_ring(), objective=objective, **QUICK)


def test_swapped_arguments_are_told_in_words():
    with pytest.raises(TypeError, match=r"generator is 'reverse_kl'; .*did you mean objective='reverse_kl'"):
        distill(small_ring(), "reverse_kl", steps=5)


def test_an_f_divergence_is_an_objective():
    named = distill(small_ring(), objective="forward_kl", **QUICK)
    given = distill(small_ring(), objective=divergences.F["forward_kl"], **QUICK)
    assert states_equal(named.ema.state_dict(), given.ema.state_dict())


def test_settings_are_frozen_and_are_the_checkpoints_config(tmp_path):
    settings = Settings(3, 8, 3, 2e-3, 5e-3, 1.0, 0.5, 0.035, 5.0, (), 1e5, 0, None, 0.2, "linear", False, 0, "learned")
    with pytest.raises(AttributeError):
        settings.steps = 4
    assert set(settings.config()) == set(settings.__dataclass_fields__) - {"accumulate"}
    file = tmp_path / "run.safetensors"
    distill(small_ring(), checkpoint=file, **QUICK)
    for change, message in (({"critic_steps": 2}, "critic_steps was 3 and is now 2"),
                            ({"fake": "empirical"}, "fake was 'learned'"), ({"schedule": "cosine"}, "schedule was")):
        with pytest.raises(ValueError, match=message):
            distill(small_ring(), checkpoint=file, resume=True, **(QUICK | change))


# ------------------------------------------------- the teacher's contract

def test_a_teacher_is_probed_once_and_its_answer_named(tmp_path):
    file = tmp_path / "run.safetensors"
    options = {**QUICK, "shape": (2,), "sigma_data": 1.0, "checkpoint": file}
    for teacher, error, message in (
        (lambda x, s, label=None: x[:, :1], ValueError, r"teacher returned shape \(2, 1\); wanted \(2, 2\), that of x"),
        (lambda x, s, label=None: s, ValueError, r"teacher returned shape \(2,\)"),
        (lambda x, s, label=None: (x, s), TypeError, "teacher returned tuple; wanted a floating point tensor"),
        (lambda x: x, TypeError, r"teacher: can't be called as D\(x, sigma, label\)"),
        (lambda x, s, label=None: x.long(), TypeError, "teacher returned a tensor of torch.int64"),
    ):
        with pytest.raises(error, match=message):
            distill(teacher, **options)
    assert not file.exists()


def test_a_probe_calls_with_one_level_a_sample():
    seen = []
    probe(lambda x, s, label: seen.append((x.shape, s.shape, label.shape)) or x, (3, 4), sigma=2.0, n_classes=5)
    assert seen == [((2, 3, 4), (2,), (2,))]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_datas_scale_is_estimated_from_the_teacher_and_said(scale):
    law = ring(8, radius=2 * scale, std=0.2 * scale)
    bare = lambda x, sigma, label=None: law(x, sigma)  # noqa: E731
    # 8,192 products of squared normals: 1.6 % of the variance, half of it in the standard deviation, five deviations.
    assert estimate_sigma_data(bare, (2,)) == pytest.approx(law.sigma_data, rel=0.04)
    with pytest.warns(UserWarning, match="sigma_data: .* estimated from it as"):
        out = distill(bare, shape=(2,), **QUICK)
    assert out.ema.denoiser.sigma_data == pytest.approx(law.sigma_data, rel=0.04)


def test_no_scale_is_made_up():
    with pytest.raises(ValueError, match=r"none could be estimated from it; wanted sigma_data"):
        distill(lambda x, sigma, label=None: 0 * x, shape=(2,), **QUICK)
    with pytest.raises(ValueError, match="sigma_data=-1"):
        distill(small_ring(), sigma_data=-1.0, **QUICK)


# ------------------------------------------------- the data's unit

@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_changes_with_the_datas_unit(name, double):
    """Data multiplied by 1,000 or 0.001 give the same student times that factor."""
    made = []
    for scale in (1.0, 1e3, 1e-3):
        law = GaussianMixture(scale * ring(3, weights=[1.0, 2.0, 3.0]).means.double(), 0.2 * scale)
        out = distill(law, objective=name, steps=4, batch_size=16, progress=False)
        made.append(out.sample(50).double() / scale)
    for other in made[1:]:
        torch.testing.assert_close(other, made[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_nor_does_a_trained_teacher(scale, double):
    data = ring(3).sample(64, rng()).double()
    one, other = (train_denoiser(scale * s * data, steps=4, batch_size=16, progress=False) for s in (1 / scale, 1.0))
    x, sigma = normal(5, 2).double(), torch.full((5,), 0.5)
    torch.testing.assert_close(other(scale * x, scale * sigma) / scale, one(x, sigma), rtol=1e-5, atol=1e-6)


# ------------------------------------------------- drifting, regression, the empirical fake

def test_the_drift_is_the_difference_of_two_empirical_denoisers():
    x, real = normal(7, 2), normal(9, 2, seed=1) + 0.3
    for width in (0.3, 1.0):
        torch.testing.assert_close(mean_near(squared_distances(x, real), real, width), EmpiricalTeacher(real)(x, width))
        others = [EmpiricalTeacher(torch.cat([x[:i], x[i + 1:]]))(x[i:i + 1], width) for i in range(7)]
        field = EmpiricalTeacher(real)(x, width) - torch.cat(others)
        torch.testing.assert_close(drift(x, real, (width,)), field / field.square().mean().sqrt())
    both = drift(x, real, (0.3,)) + drift(x, real, (1.0,))
    torch.testing.assert_close(drift(x, real, (0.3, 1.0)), both)


def test_the_drift_vanishes_between_equal_laws_and_the_loss_follows_it():
    """Of 4,000 samples of one law against others of it, the mean field is at the sampling error; displaced samples are
    pulled back."""
    law = GaussianMixture([[0.0, 0.0]], 1.0)
    x, real = law.sample(2000, rng(1)), law.sample(2000, rng(2))
    to_real, to_fake = squared_distances(x, real), squared_distances(x, x).fill_diagonal_(torch.inf)
    field = mean_near(to_real, real, 1.0) - mean_near(to_fake, x, 1.0)
    # a kernel mean over some 500 effective samples of spread 0.7
    assert float(field.square().mean().sqrt()) < 5 * 0.7 / 500**0.5
    moved = (x + torch.tensor([1.0, 0.0])).requires_grad_(True)
    loss = Drifting().generator_loss(Batch(moved, torch.ones(2000), x, law, real=real))
    assert loss.shape == (2000,)
    pull = torch.autograd.grad(loss.mean(), moved)[0].mean(0)
    assert pull[0] > 10 * pull[1].abs()


def test_each_class_drifts_by_itself():
    x, real = normal(8, 2), normal(9, 2, seed=1)
    label, real_label = torch.tensor([0, 0, 0, 1, 1, 1, 2, 3]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    whole = drift(x, real, (0.5,), label, real_label)
    assert not whole[6:].any()  # one sample of its class, and a class without a real one
    parts = torch.cat([drift(x[label == k], real[real_label == k], (0.5,)) for k in (0, 1)])
    for k in (0, 1):  # alike up to the common root mean square
        mine, alone = whole[label == k], parts[label[:6] == k]
        torch.testing.assert_close(mine / mine.norm(), alone / alone.norm())
    torch.testing.assert_close(drift(x, real, (0.5,), torch.zeros(8), torch.zeros(9)), drift(x, real, (0.5,)))


def test_drifting_is_the_same_in_more_dimensions():
    """Samples of the plane written k times beside each other are as far apart in units of their dimension."""
    law, x, real = ring(), normal(6, 2), normal(9, 2, seed=1)
    flat = Drifting().generator_loss(Batch(x, torch.ones(6), x, law, real=real))
    high = Drifting().generator_loss(Batch(x.repeat(1, 50), torch.ones(6), x, law, real=real.repeat(1, 50)))
    torch.testing.assert_close(high / 50, flat)


def test_drifting_in_features_asks_a_trained_teacher():
    """A linear teacher's feature, the coordinate itself, doubles the term; a mixture has none."""
    x, real = normal(6, 2).requires_grad_(), normal(9, 2, seed=1)

    def teacher(x, sigma, label=None):
        return x

    teacher.features = lambda x, sigma, label=None: 3.0 * x  # whatever their unit
    both = Drifting(features_at=1.0).terms(Batch(x, torch.ones(6), x, teacher, real=real / real.std()))
    torch.testing.assert_close(both["features"], both["drifting"])
    with pytest.raises(ValueError, match=r"features_at=1.0: this teacher has no `features"):
        Drifting(features_at=1.0).terms(Batch(x, torch.ones(6), x, ring(), real=real))


def test_drifting_reaches_the_ring():
    """At 300 steps: every mode, and a KL that the start, above 1, is far from (0.15 at seed 0)."""
    out = distill(ring(), objective="drifting", steps=300, batch_size=256, learning_rate=5e-3, ema_halflife=10_000,
                  progress=False)
    assert kl_both_ways(ring(), out.sample(4000), 0.2).kl < 0.3


def test_regression_learns_the_teachers_map():
    target = GaussianMixture([[1.0, -2.0]], 0.5)
    out = distill(target, objective=Regression(needs_pairs=512), steps=200, batch_size=64, progress=False)
    z = torch.randn(200, 2, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        assert (out.ema(z) - (target.means + 0.5 * z)).norm(dim=1).mean() < 0.15


@pytest.mark.parametrize("name", ["reverse_kl", "sim", "jensen_shannon"])
def test_an_empirical_fake_takes_the_networks_place(name):
    out = distill(small_ring(), objective=name, fake="empirical", **QUICK)
    assert not isinstance(out.fake, torch.nn.Module)
    assert ("critic" in out.history[-1]) == Needs.of(OBJECTIVES[name]).ratio
    x = normal(6, 2)
    with torch.no_grad():
        assert out.fake(x, torch.full((6,), 0.5)).shape == (6, 2)
    assert torch.isfinite(out.sample(5)).all()


def test_the_empirical_fake_is_the_denoiser_of_the_students_samples():
    """An Affine-like student N(m, s^2) in closed form: D(x) = m + s^2 / (s^2 + sigma^2) (x - m), within Monte Carlo."""
    from minidistill.distillation.empirical import EmpiricalFake
    from minidistill.networks import Affine

    fake = EmpiricalFake(Generator(Affine((1,), mean=2.0, std=0.5), 1.0), n=20_000)
    fake.refresh(rng())
    x = torch.linspace(1, 3, 9)[:, None]
    exact = 2 + 0.25 / (0.25 + 0.36) * (x - 2)
    with torch.no_grad():
        # the kernel mean of some 5,000 effective samples of posterior deviation 0.38
        assert (fake(x, 0.6) - exact).abs().max() < 5 * 0.38 / 5000**0.5


def test_an_empirical_fake_where_it_cannot_be():
    with pytest.raises(ValueError, match="fake='empirical': wanted a student of one step"):
        distill(small_ring(), fake="empirical", student_levels=(0.2,), **QUICK)
    with pytest.raises(ValueError, match="fake='empirical': this objective reads the fake network's features"):
        distill(small_ring(), objective="sida", fake="empirical", **QUICK)
    with pytest.raises(ValueError, match=r"fake='empirica'.*did you mean 'empirical'"):
        distill(small_ring(), fake="empirica", **QUICK)


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(123)
    wanted = [torch.randn(3) for _ in range(2)]
    torch.manual_seed(123)
    got = []
    for _ in range(2):
        got.append(torch.randn(3))
        distill(small_ring(), **QUICK)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_one_line_reprs():
    out = distill(small_ring(), **QUICK)
    for thing, words in ((out, "Distilled(1 call, shape=(2,), 3 steps,"), (small_ring(), "GaussianMixture("),
                         (small_denoiser(), "Denoiser(MLP, shape=(2,), sigma_data=")):
        assert repr(thing).startswith(words)
        assert "\n" not in repr(thing)
    assert isinstance(OBJECTIVES["forward_kl"], DistributionMatching)


def test_numbers_of_other_kinds_become_pythons_and_a_device_is_named(tmp_path):
    file = tmp_path / "run.safetensors"
    distill(small_ring(), steps=np.int64(3), batch_size=np.int32(8), learning_rate=torch.tensor(1e-3), checkpoint=file,
            progress=False)
    distill(small_ring(), steps=3, batch_size=8, learning_rate=float(torch.tensor(1e-3)), checkpoint=file, resume=True,
            progress=False)
    with pytest.raises(ValueError, match="device='gpu'"):
        distill(small_ring(), device="gpu", **QUICK)
