"""All objectives on digits: every trial runs, the halves of SIM's gradient, and what is stored."""

from pathlib import Path

import numpy as np
import pytest
import torch

from minidistill import data
from minidistill.cli import main
from minidistill.distillation import OBJECTIVES, Batch, Needs
from minidistill.networks import Generator
from minidistill.studies import digits, rows

TRIALS = [(study, name) for study, trials in digits.STUDIES.items() for name in trials]
FIGURES = Path(__file__).parents[2] / "figures" / "digits"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One with a teacher that was hardly trained."""
    place = tmp_path_factory.mktemp("digits")
    for smooth in (False, True):
        digits.teacher_of(place, steps=10, smooth=smooth)
    return place


@pytest.mark.parametrize(("study", "name"), TRIALS, ids=lambda text: text)
def test_every_trial_runs(study, name, folder, monkeypatch):
    monkeypatch.setattr(digits, "N", 60)
    monkeypatch.setattr(digits, "KEPT", 20)
    monkeypatch.setattr("minidistill.distillation.prepare.make_pairs", few_pairs)
    row = digits.run(study, name, 2, str(folder), steps=2)
    assert (row["study"], row["name"], row["seed"], row["n"], row["calls"]) == (study, name, 2, 60, 1)
    assert row["steps"] == (0 if name == "start" else 2 * digits.LONGER if study == "trajectories" else 2)
    assert ("calls_ratio" in row) == (study == "trajectories")
    assert row.pop("samples").shape == (20, 1, 8, 8)
    assert np.isfinite([value for value in row.values() if isinstance(value, float)]).all()
    rule = digits.STUDIES[study][name]
    has_fake = name != "start" and Needs.of(OBJECTIVES[rule] if isinstance(rule, str) else rule).fake
    assert ("score_gap" in row) == has_fake


def few_pairs(teacher, n, shape, sigma_data, n_classes, **options):
    from minidistill.distillation.pairs import make_pairs
    return make_pairs(teacher, 16, shape, sigma_data, n_classes, **options)


def test_every_objective_is_tried():
    assert set(digits.STUDIES["objectives"]) == {"start", *OBJECTIVES}


def test_only_the_objective_differs(folder):
    """And its critic steps, where it asks for some."""
    teacher = digits.teacher_of(folder)
    usual = digits.settings(teacher, "sim")
    for name, rule in OBJECTIVES.items():
        mine = digits.settings(teacher, name)
        assert mine.keys() == usual.keys()
        assert mine["critic_steps"] == (Needs.of(rule).critic_steps or 2)
        assert all(mine[key] == usual[key] for key in mine if key not in ("critic_steps", "data", "labels"))
        assert torch.equal(mine["data"], data.digits()[0])


def test_the_smooth_teacher_is_another_one_with_fewer_octaves(folder):
    usual, smooth = (digits.teacher_of(folder, smooth=smooth).network for smooth in (False, True))
    assert (len(usual.noise.frequencies), len(smooth.noise.frequencies)) == (8, digits.SMOOTH)


def test_where_students_begin(folder):
    """A copy of the teacher unless a name says so; with its features all inner layers are the teacher's, and the two
    that touch samples are those of a new one with the same seed."""
    teacher = digits.teacher_of(folder)
    assert digits.start_of(teacher, "class_ratio", 0) is None
    new, features = (digits.start_of(teacher, f"class_ratio, {name}", 5).denoiser.network.state_dict()
                     for name in ("new student", "teacher's features"))
    for key, value in teacher.network.state_dict().items():
        outer = key.startswith(("inward", "outward"))
        assert torch.equal(features[key], new[key] if outer else value), key
        assert not torch.equal(new[key], value), key


def test_the_teacher_is_made_once_and_no_student_will_do(folder, tmp_path):
    before = (folder / "teacher.safetensors").read_bytes()
    assert torch.equal(digits.teacher_of(folder, steps=20).network.inward.weight,
                       digits.teacher_of(folder).network.inward.weight)
    assert (folder / "teacher.safetensors").read_bytes() == before
    student = Generator(digits.teacher_of(folder), 1.0)
    digits.checkpoints.save_model(tmp_path / "teacher.safetensors", student)
    with pytest.raises(ValueError, match="is a student; wanted a teacher"):
        digits.teacher_of(tmp_path)


@pytest.mark.parametrize("sigma_data", [1.0, 0.7])
def test_the_halves_of_squared_sims_gradient(sigma_data, folder):
    """Whole = A + B + C with A = twice reverse KL's; y frozen leaves A + B, D_q frozen A + C."""
    teacher = digits.teacher_of(folder)
    images, labels = data.digits()
    rng = torch.Generator().manual_seed(0)
    x0, sigma = images[:16].clone().requires_grad_(), torch.rand(16, generator=rng) + 0.1
    fake = lambda x, sigma, label: 0.8 * teacher(x, sigma, label).square()  # noqa: E731
    batch = Batch(x0, sigma, torch.randn(x0.shape, generator=rng), teacher, fake, labels[:16], sigma_data=sigma_data)
    rules = [OBJECTIVES["sim_l2"], OBJECTIVES["reverse_kl"], *digits.STUDIES["frozen"].values()]
    whole, matching, of_y, of_fake = (torch.autograd.grad(r.generator_loss(batch).sum(), x0)[0] for r in rules)
    torch.testing.assert_close(of_y + of_fake - whole, 2 * matching, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(of_y, of_fake, rtol=0.1)


def test_the_command_asks_for_what_is_missing(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(rows, "collect", lambda *arguments: asked.append(arguments))
    assert main(["digits", "--steps", "3", "--seed", "2", "--seeds", "2", "--studies", "frozen", "--workers", "1",
                 "--out", str(tmp_path / "d")]) == 0
    (out, run, trials, studies, seeds, workers), = asked
    assert (out, studies, list(seeds), workers) == (tmp_path / "d", ["frozen"], [2, 3], 1)
    assert run.keywords == {"folder": str(tmp_path / "d"), "steps": 3}
    assert trials == {study: list(names) for study, names in digits.STUDIES.items()}
    assert (tmp_path / "d" / "teacher.safetensors").exists()


def test_its_errors_name_what_is_wanted(tmp_path, capsys):
    assert main(["digits", "--device", "cuda:0", "--out", str(tmp_path / "d")]) == 2
    assert main(["digits", "--workers", "0", "--out", str(tmp_path / "d")]) == 2
    assert "--workers" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"take figures/digits from .* or make it: minidistill digits"):
        digits.read(tmp_path)


def test_the_stored_rows_are_those_of_the_trials_as_they_are_now():
    """Every trial with its seeds in order, and no other rows; all numbers finite; the teachers beside them, and
    samples."""
    stored = digits.read(FIGURES)
    assert {(row["study"], row["name"]) for row in stored.rows} == set(TRIALS)
    assert set(stored.points) == {f"{study}: {name}" for study, name in TRIALS}
    assert all((FIGURES / f"{name}.safetensors").exists() for name in ("teacher", "teacher_smooth"))
    for study, name in TRIALS:
        seeds = stored.runs(study, name, "seed")
        assert seeds == list(range(len(seeds)))
        assert len(seeds) >= 3
        longer = digits.LONGER if study == "trajectories" else 1
        assert set(stored.runs(study, name, "steps")) == {0 if name == "start" else longer * digits.STEPS}
        assert stored.samples(study, name).shape == (100, 1, 8, 8)
    assert all(np.isfinite([v for v in row.values() if isinstance(v, float)]).all() for row in stored.rows)
