"""`distill` from end to end: it learns, starts where it should, repeats itself, and refuses bad input early."""

from typing import Any

import pytest
import torch

from minidistill import ring, training
from minidistill.distillation import OBJECTIVES, DistributionMatching, Needs, Settings, diagnose, distill, draw
from minidistill.distillation.objectives.matching import fake_loss
from minidistill.distillation.plateau import stale
from minidistill.distillation.prepare import prepare
from minidistill.distributions import GaussianMixture
from minidistill.metrics import kl_both_ways
from minidistill.networks import MLP, Correction, Denoiser, Generator
from minidistill.networks.draws import entrance
from minidistill.teachers import train_denoiser
from tests.helpers import small_denoiser, small_ring, states_equal

QUICK: dict[str, Any] = {"steps": 3, "batch_size": 8, "progress": False}


def settings(**changes):
    """A run's numbers, none of which matter to `prepare` but the scale."""
    numbers = {"steps": 1, "batch_size": 1, "critic_steps": 1, "learning_rate": 1.0, "critic_learning_rate": 1.0,
               "sigma_data": 1.0, "sigma_init": 1.0, "sigma_min": 0.1, "sigma_max": 1.0, "student_levels": (),
               "ema_halflife": 1.0, "warmup": 0, "clip": None, "hold": 1.0, "schedule": "linear", "flip": False,
               "seed": 0, "fake": "learned"}
    return Settings(**(numbers | changes))


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
    before = kl_both_ways(ring(), draw(generator, 4000), 0.2)
    out = distill(ring(), generator, objective, steps=300, batch_size=128, progress=False)
    after = kl_both_ways(ring(), out.sample(4000), 0.2)
    assert after.kl < 0.5 * before.kl
    assert after.reverse_kl < 0.5 * before.reverse_kl
    assert after.outside < 0.01


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_runs_and_logs_finite_losses(name):
    out = distill(small_ring(), objective=name, **QUICK)
    assert out.history[-1]["step"] == 3
    needs = Needs.of(OBJECTIVES[name])
    assert (out.fake is not None) == needs.fake
    own = name in ("score_mismatching", "score_of_mixture_training")  # make a network before training
    assert ("critic" in out.history[-1]) == (needs.fake or needs.ratio or own)
    assert "generator" in out.history[-1]
    assert torch.isfinite(out.sample(5)).all()
    assert (out.ratio is not None) == Needs.of(OBJECTIVES[name]).ratio


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
    run = prepare(teacher, None, Needs(ratio=True), settings(), shape=(2,), data=x, labels=label,
                  rng=torch.Generator().manual_seed(0))
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
    assert distill(bare_teacher, shape=(2,), sigma_data=1.4, **QUICK).sample(4).shape == (4, 2)
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


# ------------------------------------------------- critic steps, accumulation, schedules

class Counted:
    """A custom objective that counts its calls and keeps what it was given."""

    needs_uniform = True
    critic_steps = 4

    def __init__(self):
        self.critic, self.generator = [], []

    def critic_loss(self, batch):
        self.critic.append(batch)
        return fake_loss(batch)

    def generator_loss(self, batch):
        self.generator.append(batch)
        return (batch.x0 * batch.noise).sum(1)


@pytest.mark.parametrize(("given", "wanted"), [(None, 4), (2, 2)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_k_critic_updates_for_each_of_the_generator(given, wanted, accumulate, monkeypatch):
    """Counted where the optimizers step: accumulated pieces make one update, and all critic steps of one generator
    step see the same samples at fresh noise levels."""
    stepped, objective, descend = [], Counted(), training.descend

    def count(optimizer, clip=None):
        stepped.append(id(optimizer))
        return descend(optimizer, clip)

    monkeypatch.setattr(training, "descend", count)
    distill(small_ring(), objective=objective, critic_steps=given, accumulate=accumulate, **QUICK)
    critic, generator = stepped[0], stepped[wanted]
    assert stepped == ([critic] * wanted + [generator]) * 3
    assert len(objective.critic) == 3 * wanted * accumulate
    assert len(objective.generator) == 3 * accumulate
    first = objective.critic[: wanted * accumulate : accumulate]
    assert all(torch.equal(batch.x0, first[0].x0) for batch in first)
    assert len({float(batch.sigma[0]) for batch in first}) == wanted
    assert all(batch.uniform.shape == (8 // accumulate,) for batch in objective.critic)


def test_an_objective_that_does_not_say_gets_three_critic_steps(monkeypatch):
    seen = []
    monkeypatch.setattr(DistributionMatching, "critic_loss", lambda self, batch: seen.append(1) or fake_loss(batch))
    distill(small_ring(), objective="reverse_kl", **QUICK)
    assert len(seen) == 9
    assert Needs.of(OBJECTIVES["dmd2"]).critic_steps == 5
    assert Needs.of(OBJECTIVES["sid"]) == Needs(critic_steps=5, learning_rate=5e-4)
    assert Needs.of(OBJECTIVES["fisher"]) == Needs()  # alpha = 1/2
    # An objective's `clip` bounds a ratio; a gradient's bound has a name of its own.
    assert Needs.of(OBJECTIVES["reverse_kl"]) == Needs()
    assert Needs.of(OBJECTIVES["sim_l2"]) == Needs(warmup=100, gradient_clip=1.0)
    assert Needs.of(OBJECTIVES["sida"]).gradient_clip == 1.0


class Own(Counted):
    warmup, gradient_clip = 3, 0.25


@pytest.mark.parametrize(("given", "rates", "clip"), [
    ({"steps": 9}, [1 / 3, 2 / 3, *[1] * 7], 0.25),
    ({"steps": 6}, [1 / 2, *[1] * 5], 0.25),  # at most a third of the run
    ({"warmup": 2, "clip": 0.5}, [1 / 2, 1, 1], 0.5), ({"warmup": 0}, [1, 1, 1], 0.25),
])
def test_a_warm_up_is_the_students_alone_and_both_gradients_are_clipped(given, rates, clip, monkeypatch):
    seen, clips = [], set()
    descend = training.descend
    monkeypatch.setattr(training, "set_learning_rate", lambda optimizer, rate: seen.append(rate))
    monkeypatch.setattr(training, "descend", lambda optimizer, clip=None: clips.add(clip) or descend(optimizer, clip))
    distill(small_ring(), objective=Own(), schedule="constant", learning_rate=0.01, critic_learning_rate=0.02,
            **(QUICK | given))
    assert seen[::2] == pytest.approx([0.01 * factor for factor in rates])
    assert seen[1::2] == pytest.approx([0.02] * len(rates))
    assert clips == {clip}


@pytest.mark.parametrize("levels", [(), (0.3,)])
@pytest.mark.parametrize("name", ["jensen_shannon", "dmd", "dmd2", "sida", "score_of_mixture", "sid"])
def test_accumulated_pieces_equal_the_large_batch(name, levels, class_teacher):
    """Generator and fake network end the same up to rounding, in one step and two, with all that a batch can hold cut
    into pieces. Only weights normalised by a batch mean (Jensen-Shannon) see the pieces. From a trained teacher: an
    exact one's fake network starts with gradients that are mere rounding, which Adam blows up."""
    teacher, x, label = class_teacher
    torch.set_default_dtype(torch.float64)
    try:
        outs = [
            distill(teacher.double(), objective=name, data=x.double(), labels=label, steps=3, batch_size=24, clip=1.0,
                    accumulate=k, student_levels=levels, progress=False)
            for k in (1, 3)
        ]
    finally:
        torch.set_default_dtype(torch.float32)
        teacher.float()
    if name == "jensen_shannon":
        assert not states_equal(*(out.generator.state_dict() for out in outs))
        return
    for a, b in zip(outs[0].generator.parameters(), outs[1].generator.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(outs[0].fake.parameters(), outs[1].fake.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("schedule", "wanted"), [
    ("linear", [1, 1, 1, 2 / 3, 1 / 3]), ("cosine", [1, 1, 1, 0.75, 0.25]), ("constant", [1, 1, 1, 1, 1]),
])
def test_learning_rates_follow_the_schedule(schedule, wanted, monkeypatch):
    """Held for 40 % of 5 steps, then (1 - t / 5) / 0.6, or sin^2 of a quarter turn of it."""
    rates = []
    monkeypatch.setattr(training, "set_learning_rate", lambda optimizer, rate: rates.append(rate))
    distill(small_ring(), schedule=schedule, hold=0.4, learning_rate=0.01, critic_learning_rate=0.02, steps=5,
            batch_size=8, progress=False)
    assert rates[::2] == pytest.approx([0.01 * factor for factor in wanted])
    assert rates[1::2] == pytest.approx([0.02 * factor for factor in wanted])


# ------------------------------------------------- students of several steps

class Table(torch.nn.Module):
    """A linear denoiser c x with a coefficient for each level."""

    def __init__(self, **coefficients):
        super().__init__()
        self.shape, self.n_classes, self.sigma_data = (1,), 0, 1.0
        self.c = torch.nn.ParameterDict({key: torch.nn.Parameter(torch.tensor(v)) for key, v in coefficients.items()})

    def forward(self, x, sigma, label=None):
        return self.c[f"s{sigma:g}".replace(".", "_")] * x


def two_steps(spread=1.0, std=0.5, level=0.5):
    """N(0, std^2) in two steps: z -> spread z, noised by `level`, then shrunk to the right width."""
    generator = Generator(Table(s2=spread / 2, s0_5=std / (spread**2 + level**2) ** 0.5), 2.0)
    generator.levels = (level,)
    return generator


def test_two_steps_that_are_exactly_right():
    """The samples are c (z + 0.5 e), to the bit, of standard deviation 0.5; one step alone is twice too wide."""
    generator = two_steps()
    rng = torch.Generator().manual_seed(3)
    z, e = torch.randn(5, 1, generator=rng), torch.randn(5, 1, generator=rng)
    torch.testing.assert_close(draw(generator, 5, seed=3), 0.5 / 1.25**0.5 * (z + 0.5 * e))
    torch.testing.assert_close(draw(generator, 5, seed=3, steps=1), z)
    # 20,000 samples: a standard deviation is known to 0.5 %.
    assert float(draw(generator, 20_000).std()) == pytest.approx(0.5, rel=0.02)
    assert float(draw(generator, 20_000, steps=1).std()) == pytest.approx(1.0, rel=0.02)
    chain = Generator(Table(s2=0.5, s0_5=0.7, s0_25=0.6), 2.0)
    chain.levels = (0.5, 0.25)
    rng = torch.Generator().manual_seed(3)
    z, e, f = (torch.randn(5, 1, generator=rng) for _ in range(3))
    torch.testing.assert_close(draw(chain, 5, seed=3), 0.6 * (0.7 * (z + 0.5 * e) + 0.25 * f))
    torch.testing.assert_close(draw(chain, 5, seed=3, steps=2), 0.7 * (z + 0.5 * e))
    with pytest.raises(ValueError, match="steps=3: this student has 2"):
        draw(generator, 5, steps=3)


def test_training_runs_the_steps_before_without_gradient():
    generator = two_steps()
    z, e = torch.randn(2, 4, 1, generator=torch.Generator().manual_seed(0))
    first, second = entrance(generator, z, None, []), entrance(generator, z, None, [e])
    assert first.sigma is None
    assert torch.equal(first.x, z)
    assert second.sigma == 0.5
    torch.testing.assert_close(second.x, z + 0.5 * e)
    second.into(generator, None).sum().backward()
    assert generator.denoiser.c["s2"].grad is None
    assert generator.denoiser.c["s0_5"].grad is not None


def test_distillation_trains_every_step_of_a_two_step_student():
    """From wrong coefficients both steps, and so both marginals, come to the target's standard deviation. The last
    batches' noise leaves a few per cent, and 15 % is far from the 90 % to 250 % that they start at."""
    target = GaussianMixture([[0.0]], 0.5)
    generator = two_steps(spread=1.6, std=0.9)
    before = [float(draw(generator, 4000, steps=k).std()) for k in (1, 2)]
    assert min(before) > 0.85
    out = distill(target, generator, "diff_instruct", student_levels=(0.5,), steps=400, batch_size=128,
                  learning_rate=2e-2, sigma_max=1.0, progress=False)
    for k in (1, 2):
        assert float(out.sample(4000, steps=k).std()) == pytest.approx(0.5, rel=0.15)
    assert float(out.sample(4000).std()) == float(out.sample(4000, steps=2).std())


@pytest.mark.parametrize("levels", [(0.3,), (0.3, 0.2, 0.1)])
def test_students_of_several_steps_have_shapes_and_repeat_themselves(levels, class_teacher):
    teacher, x, label = class_teacher
    runs = [distill(teacher, objective="dmd2", data=x, labels=label, student_levels=levels, **QUICK) for _ in (0, 1)]
    assert states_equal(*(out.ema.state_dict() for out in runs))
    assert runs[0].ema.levels == runs[0].generator.levels == levels
    samples = [runs[0].sample(6, steps=k) for k in range(1, len(levels) + 2)]
    assert all(s.shape == (6, 2) for s in samples)
    assert len({float(s.sum()) for s in samples}) == len(samples)
    assert torch.equal(samples[-1], runs[1].sample(6))
    assert torch.equal(samples[-1], draw(runs[0].ema, 6))


def test_a_look_at_a_student_of_several_steps_shows_its_last_samples():
    """Standard deviation 0.5, where its first step's are 1 (2,000 samples: known to 2 %)."""
    seen = diagnose(two_steps(), GaussianMixture([[0.0]], 0.5), GaussianMixture([[0.0]], 0.5), sigma_data=0.5, n=2000)
    assert float(seen.x0.std()) == pytest.approx(0.5, rel=0.06)
    assert seen.score_gap == 0


@pytest.mark.parametrize("name", ["dmd", "score_of_mixture"])
def test_a_resumed_run_is_the_run_that_never_stopped(name, tmp_path):
    """With pairs, drawn alphas and two steps: broken off at step 4, gone on from the checkpoint of step 2."""
    options = {"objective": name, "steps": 6, "batch_size": 8, "student_levels": (0.2,), "progress": False}

    def crash(state):
        raise RuntimeError("crash")

    path = tmp_path / "run.safetensors"
    with pytest.raises(RuntimeError, match="crash"):
        distill(small_ring(), checkpoint=path, checkpoint_every=2, callbacks=[crash], evaluate_every=4, **options)
    assert training.progress_of(path)["step"] == 2
    resumed = distill(small_ring(), checkpoint=path, resume=True, **options)
    assert states_equal(resumed.ema.state_dict(), distill(small_ring(), **options).ema.state_dict())
    with pytest.raises(ValueError, match=r"student_levels was .*0.2.* and is now"):
        distill(small_ring(), checkpoint=path, resume=True, **{**options, "student_levels": ()})


def test_one_step_students_know_nothing_of_levels():
    out = distill(small_ring(), **QUICK)
    assert out.ema.levels == ()
    assert torch.equal(out.sample(5), out.sample(5, steps=1))


# ------------------------------------------------- pairs and plateaus

def test_dmds_pairs_do_not_depend_on_the_run_and_its_term_is_trained(monkeypatch):
    """With only the regression term the student learns the teacher's map from noise to samples."""
    objective = OBJECTIVES["dmd"]
    monkeypatch.setattr(type(objective), "terms", lambda self, batch: {
        "regression": (batch.pair_x0 - batch.pair_y).square().sum(1)})
    target = GaussianMixture([[1.0, -2.0]], 0.5)
    out = distill(target, small_generator(), "dmd", steps=150, batch_size=64, progress=False)
    z = torch.randn(200, 2, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        off = (out.ema(z) - (target.means + 0.5 * z)).norm(dim=1).mean()
    assert off < 0.15


@pytest.mark.parametrize(("values", "patience", "wanted"), [
    ([3.0, 2.0, 1.0], 1, False), ([3.0, 2.0, 2.0], 1, True), ([3.0, 2.0, 2.5, 1.9, 2.5], 2, False),
    ([3.0, 2.0, 2.5, 2.1], 2, True), ([1.0], 1, False), ([float("nan"), float("nan")], 2, True), ([], 1, False),
])
def test_stale(values, patience, wanted):
    assert stale(values, patience) is wanted


def numbers(*values):
    left = iter(values)
    return lambda generator: {"other": 0.0, "number": next(left)}


def test_a_plateau_ends_the_run_and_is_recorded(tmp_path):
    """Best at step 4, two evaluations without a better one: over at step 8, saved and in the history."""
    path = tmp_path / "run.safetensors"
    options = {"steps": 20, "batch_size": 8, "evaluate_every": 2, "patience": 2, "monitor": "number",
               "checkpoint": path, "progress": False}
    out = distill(small_ring(), evaluate=numbers(5.0, 3.0, 4.0, 3.0, 1.0), **options)
    last = out.history[-1]
    assert {**last, "critic": 0, "generator": 0} == {
        "step": 8, "images": 64, "critic": 0, "generator": 0, "other": 0.0, "number": 3.0, "plateau": 1.0}
    assert training.progress_of(path)["step"] == 8
    assert training.progress_of(path)["history"] == out.history
    # Resumed, it stays ended: nothing is evaluated (or trained) any more.
    again = distill(small_ring(), evaluate=numbers(), resume=True, **options)
    assert again.history == out.history
    for a, b in zip(again.ema.parameters(), out.ema.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_remembers_its_best(tmp_path):
    """Best at step 4, resumed at 6: one more evaluation without a better one ends it."""
    options = {"batch_size": 8, "evaluate_every": 2, "patience": 2, "monitor": "number", "steps": 20,
               "checkpoint": tmp_path / "run.safetensors", "checkpoint_every": 2, "progress": False}

    def stop_at_the_fourth(generator):
        if not left:
            raise KeyboardInterrupt
        return {"number": left.pop(0)}

    left = [5.0, 3.0, 4.0]
    with pytest.raises(KeyboardInterrupt):
        distill(small_ring(), evaluate=stop_at_the_fourth, **options)
    again = distill(small_ring(), evaluate=numbers(3.5), resume=True, **options)
    assert again.history[-1]["plateau"] == 1.0
    assert again.history[-1]["step"] == 8


def test_no_plateau_no_early_end():
    out = distill(small_ring(), evaluate=numbers(5.0, 6.0, 4.0, 5.0, 3.0, 2.0), evaluate_every=2, patience=2,
                  monitor="number", steps=12, batch_size=8, progress=False)
    assert out.history[-1]["step"] == 12
    assert not any("plateau" in record for record in out.history)


def test_the_first_number_is_watched_by_default_and_a_wrong_name_is_named():
    out = distill(small_ring(), evaluate=lambda g: {"kl": 1.0, "x": 2.0}, evaluate_every=1, patience=2, steps=9,
                  batch_size=8, progress=False)
    assert out.history[-1]["step"] == 3
    with pytest.raises(ValueError, match="monitor='kll': wanted one of evaluate's numbers: kl"):
        distill(small_ring(), evaluate=lambda g: {"kl": 1.0}, patience=2, monitor="kll", **QUICK)


class Half:
    def critic_loss(self, batch):
        return batch.x0.sum(1)


class Featureless(torch.nn.Module):
    """A trained teacher from elsewhere: it denoises, and that is all."""

    shape, n_classes, sigma_data = (2,), 0, 1.0

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, sigma, label=None):
        return self.scale * x


DATA = torch.zeros(10, 2)
NAN = torch.full((10, 2), float("nan"))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"objective": "revers_kl"}, ValueError, "objective='revers_kl'.*did you mean 'reverse_kl'"),
    ({"objective": Half()}, TypeError, r"objective is Half; wanted a name or an object with .generator_loss"),
    ({"objective": None}, TypeError, "objective is NoneType"),
    ({"teacher": "ring"}, TypeError, "teacher is str"),
    ({"teacher": bare_teacher}, ValueError, r"wanted shape=\(...\) or data"),
    ({"teacher": bare_teacher, "shape": (2,), "sigma_data": 1.4, "objective": "forward_kl"}, ValueError,
     "data=None.*wanted data"),
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
    ({"warmup": -1}, ValueError, "warmup=-1"),
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
    ({"schedule": "cosin"}, ValueError, "schedule='cosin'.*did you mean 'cosine'"),
    ({"student_levels": (0.3, 0.3)}, ValueError, r"student_levels=\(0.3, 0.3\): wanted levels that descend"),
    ({"student_levels": (9.0,)}, ValueError, "descend from below sigma_init"),
    ({"student_levels": (-0.1,)}, ValueError, "student_levels=-0.1"),
    ({"patience": 2}, ValueError, "patience=2: wanted evaluate"),
    ({"patience": 0, "evaluate": len}, ValueError, "patience=0"),
    ({"monitor": "kl"}, ValueError, "monitor='kl': wanted patience too"),
    ({"objective": "sida", "teacher": small_denoiser()}, ValueError, "data=None"),
    ({"objective": "sida", "teacher": Featureless(), "data": torch.zeros(10, 2)}, TypeError, "Featureless.*features"),
    ({"accumulate": 3}, ValueError, "batch_size=8: wanted a multiple of 3"),
    ({"clip": 0.0}, ValueError, "clip=0.0"),
])
def test_bad_arguments_are_named_before_a_file_is_written(tmp_path, change, error, message):
    arguments = {"teacher": small_ring(), **QUICK, "checkpoint": tmp_path / "run.safetensors", **change}
    with pytest.raises(error, match=message):
        distill(**arguments)
    assert not list(tmp_path.iterdir())
