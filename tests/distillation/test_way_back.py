"""Objectives around another: targets on the way back to the teacher, and a class that is to be forgotten."""

from dataclasses import replace

import pytest
import torch

from minidistill.distillation import OBJECTIVES, Batch, Needs, ScoreForgetting, ScoreIdentity, backtracking, distill
from minidistill.distillation.way_back import WayBack
from minidistill.distributions import GaussianMixture
from minidistill.networks import MLP
from minidistill.teachers import train_denoiser
from tests.helpers import normal, rng, small_ring, states_equal

QUICK = {"steps": 8, "batch_size": 16, "progress": False}


class Targets:
    """An objective with a fake network that keeps the targets it was given."""

    def __init__(self):
        self.seen = []

    def critic_loss(self, batch):
        return OBJECTIVES["reverse_kl"].critic_loss(batch)

    def generator_loss(self, batch):
        self.seen.append(batch)
        return OBJECTIVES["reverse_kl"].generator_loss(batch)


def trained(steps=300):
    data = small_ring().sample(2000, rng())
    return train_denoiser(data, MLP((2,), hidden=32, depth=2), steps=steps, batch_size=128, progress=False), data


# ------------------------------------------------- DisBack

@pytest.mark.parametrize("kind", ["exact", "trained"])
def test_the_targets_are_the_checkpoints_of_the_way(kind):
    """Eight updates, half of them on the way: s_2, s_2, s_1, s_1, and then the teacher; every target computes what the
    fake network did when it was copied, and the fake network begins as the last one."""
    teacher = small_ring() if kind == "exact" else trained(20)[0]
    inner = Targets()
    rule = backtracking(inner, stages=3, degrading=30)
    begun = {}

    class Look(type(rule)):
        def before_training(self, run, settings):
            super().before_training(run, settings)
            begun.update(fake={k: v.clone() for k, v in run.fake.state_dict().items()}, way=run.teacher)

    out = distill(teacher, objective=Look(inner, 3, 30, 0.5), **QUICK)
    way = begun["way"]
    assert isinstance(out.teacher, WayBack)
    assert [id(batch.teacher) for batch in inner.seen] == [id(each) for each in (
        way.stages[1], way.stages[1], way.stages[0], way.stages[0], *4 * [way.whole])]
    assert states_equal(way.stages[2].state_dict(), begun["fake"])
    assert not states_equal(way.stages[0].state_dict(), way.stages[1].state_dict())
    assert not any(p.requires_grad for p in way.stages.parameters())
    x, sigma = normal(5, 2).float(), torch.full((5,), 0.4)
    given = teacher(x, sigma)
    torch.testing.assert_close(out.teacher(x, sigma), given)
    assert (way.stages[1](x, sigma) - given).abs().max() > 1e-4


def test_the_first_target_is_nearer_to_the_student_than_the_teacher_is():
    """E |D_fake - D_target|^2 on the untrained samples, D_fake as training begins, rises along the way back."""
    inner = Targets()
    out = distill(small_ring(), objective=backtracking(inner, stages=4, degrading=120), **QUICK)
    first, way = inner.seen[0], out.teacher
    with torch.no_grad():
        arrived, *targets = (target(first.xt, first.sigma) for target in (
            way.stages[3], way.stages[2], way.stages[1], way.stages[0], way.whole))
        gaps = [float((arrived - target).square().mean()) for target in targets]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 3 * gaps[0]


def test_it_resumes_to_the_bit_and_has_the_inner_ones_needs(tmp_path):
    def crash(state):
        raise RuntimeError("crash")

    rule = backtracking("dmd2", stages=2, degrading=4)
    assert Needs.of(rule) == Needs.of(OBJECTIVES["dmd2"])
    options = QUICK | {"objective": rule, "evaluate_every": 4}
    path = tmp_path / "run.safetensors"
    with pytest.raises(RuntimeError, match="crash"):
        distill(small_ring(), checkpoint=path, checkpoint_every=2, callbacks=[crash], **options)
    whole = distill(small_ring(), **options)
    resumed = distill(small_ring(), checkpoint=path, resume=True, **options)
    assert states_equal(resumed.ema.state_dict(), whole.ema.state_dict())
    with pytest.raises(ValueError, match="objective was"):
        distill(small_ring(), checkpoint=path, resume=True,
                **(options | {"objective": backtracking("dmd2", stages=2, degrading=5)}))


def test_what_the_way_back_refuses():
    for name in ("drifting", "sds", "regression"):
        with pytest.raises(TypeError, match="has no fake network"):
            backtracking(name)
    with pytest.raises(ValueError, match="objective='reverse_k'"):
        backtracking("reverse_k")
    with pytest.raises(ValueError, match="degrading=3: wanted an update for each of the 5"):
        backtracking("sid", degrading=3)
    with pytest.raises(TypeError, match="a way is recorded with a network"):
        distill(small_ring(), objective=backtracking("reverse_kl"), fake="empirical", **QUICK)
    only = backtracking("reverse_kl", stages=1, degrading=2)  # s_0 alone is left to be a target
    assert distill(small_ring(), objective=only, **QUICK).history[-1]["step"] == 8


# ------------------------------------------------- forgetting

class Classes:
    """Four Gaussians on a square, a class each, as an exact class-conditional teacher."""

    shape, n_classes, sigma_data = (2,), 4, 1.1
    law = GaussianMixture([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [-1.0, 1.0]], 0.2)

    def __call__(self, x, sigma, label=None):
        return self.law.to(x.dtype)(x, sigma, label)


def test_the_forgotten_class_is_compared_with_the_safe_one():
    x, sigma = normal(8, 2), torch.full((8,), 0.5, dtype=torch.float64)
    label = torch.arange(8) % 4
    batch = Batch(x, sigma, normal(8, 2, seed=1), Classes(), lambda x, s, label: 0.5 * x, label)
    inner = ScoreIdentity(0.5)
    got = ScoreForgetting(inner, forget=2, safe=3).terms(batch)["identity"]
    told = label.clone()
    told[label == 2] = 3
    wanted = inner.terms(replace(batch, teacher=lambda x, s, _: Classes()(x, s, told)))["identity"]
    assert torch.equal(got, wanted)
    plain = inner.terms(batch)["identity"]
    assert torch.equal(got == plain, label != 2)


def test_without_classes_nothing_is_forgotten():
    options = QUICK | {"learning_rate": 1e-3}
    a = distill(small_ring(), objective=ScoreForgetting(ScoreIdentity(0.5)), **options)
    b = distill(small_ring(), objective=ScoreIdentity(0.5), **options)
    assert states_equal(a.ema.state_dict(), b.ema.state_dict())


def test_requests_for_the_forgotten_class_get_the_safe_one():
    """And the others their own, as before."""
    out = distill(Classes(), objective=ScoreForgetting(OBJECTIVES["reverse_kl"], forget=0, safe=2), steps=300,
                  batch_size=128, ema_halflife=3000, progress=False)
    for asked, wanted in enumerate((2, 1, 2, 3)):
        samples = out.sample(400, label=torch.full((400,), asked))
        nearest = torch.cdist(samples, Classes.law.means).argmin(1)
        assert float((nearest == wanted).float().mean()) > 0.97, asked


def test_what_forgetting_refuses():
    with pytest.raises(ValueError, match="safe=3: wanted another class"):
        ScoreForgetting(forget=3, safe=3)
    with pytest.raises(ValueError, match="forget=4: wanted a class of 0 to 3"):
        distill(Classes(), objective=ScoreForgetting(forget=4), **QUICK)
