"""The long experiments: their trials, students, numbers, and a sweep that goes on where it was."""

from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from minidistill import metrics
from minidistill.cli import main
from minidistill.distillation import OBJECTIVES, Distilled, ScoreIdentity, ScoreOfMixture, distill, draw
from minidistill.distillation.objectives.matching import ratio_loss
from minidistill.distributions import GaussianMixture
from minidistill.networks import MLP, Affine, Denoiser, Generator
from minidistill.studies import sweep, trajectories, trials

TRIALS = [(study, name) for study, trials in sweep.STUDIES.items() for name in trials]


@pytest.mark.parametrize(("study", "name"), TRIALS, ids=lambda text: text)
def test_every_trial_runs(study, name, monkeypatch):
    monkeypatch.setattr(sweep, "N", 300)
    monkeypatch.setattr(sweep, "KEPT", 100)
    monkeypatch.setattr(trajectories, "STEPS", 16)
    monkeypatch.setattr(trajectories, "PATHS", 20)
    # Starts that are themselves distilled are looked at in a test of their own.
    monkeypatch.setattr(trials, "distill", lambda *args, steps, **more: distill(*args, steps=2, **more))
    row = sweep.run(study, name, 0, at_most=2)
    assert (row["study"], row["name"], row["seed"]) == (study, name, 0)
    assert row["n"] == (sweep.KEPT if study == "jko" else 300)  # particles are all kept
    assert row.pop("samples").shape == (sweep.KEPT, 2)
    assert ("curve" in row) == (sweep.STUDIES[study][name].watch > 0)
    assert [step for step, _ in row.get("curve", [])] in ([], [2])  # at the end at least
    assert np.isfinite([value for value in row.values() if isinstance(value, float)]).all()


def test_every_objective_is_tried_on_both_targets():
    assert set(sweep.STUDIES["ring"]) == set(sweep.STUDIES["lattice"])
    assert set(sweep.STUDIES["no fake"]) == set(sweep.STUDIES["no fake, lattice"])
    assert set(sweep.STUDIES["trajectories"]) == set(sweep.STUDIES["trajectories, lattice"])
    assert set(sweep.STUDIES["no scores"]) == set(sweep.STUDIES["no scores, lattice"])
    tried = {name for study in ("ring", "no fake", "trajectories", "no scores") for name in sweep.STUDIES[study]}
    assert tried == set(OBJECTIVES) - {"score_forgetting"}  # which wants classes
    for study in sweep.STUDIES.values():
        for trial in study.values():
            rule = OBJECTIVES[trial.objective] if isinstance(trial.objective, str) else trial.objective
            assert hasattr(rule, "terms"), trial
            assert {trial.teacher, trial.truth or trial.teacher} <= set(sweep.TARGETS)


def test_where_students_start():
    """Displaced by three radii to a tenth of one; collapsed on the first mode, all but a fraction of it."""
    ring = sweep.TARGETS["ring"]
    usual, moved = (draw(make(ring, 3), 2000) for make in (sweep.student, sweep.displaced))
    torch.testing.assert_close(moved - usual, torch.tensor([[6.0, 0.0]]).expand(2000, 2), atol=1e-4, rtol=0)
    shares = metrics.mode_coverage(ring, draw(sweep.collapsed(ring, 0), 2000)).shares
    assert shares[0] > 0.9
    assert sum(p.numel() for p in sweep.narrow(ring, 0).parameters()) < 2500


@pytest.mark.parametrize("study", ["from the teacher, ring", "from the teacher, lattice"])
def test_students_that_start_from_the_teachers_weights(study, monkeypatch):
    """Each is a copy of a teacher that was trained with its seed, read at 1.5 standard deviations of the data; only the
    objective differs, and all three alphas of SiD are there."""
    seen = {}

    class Stop(Exception):
        pass

    def start(teacher, generator, objective, **options):
        seen[name] = teacher, generator, {key: options[key] for key in ("critic_steps", "learning_rate")}
        assert options["data"].shape == (100_000, 2)
        raise Stop

    monkeypatch.setattr(sweep, "distill", start)
    monkeypatch.setattr(sweep, "N", 300)
    for name in sweep.STUDIES[study]:
        with pytest.raises(Stop):
            sweep.run(study, name, 3, at_most=2)
    teachers = {id(teacher) for teacher, _, _ in seen.values()}
    assert len(teachers) == 1  # trained once
    for teacher, generator, options in seen.values():
        assert generator.denoiser is not teacher
        assert generator.sigma_init == pytest.approx(1.5 * teacher.sigma_data)
        for own, copied in zip(teacher.parameters(), generator.denoiser.parameters(), strict=True):
            assert torch.equal(own, copied)
        assert options == {"critic_steps": 5, "learning_rate": 5e-4}
    alphas = [trial.objective.alpha for trial in sweep.STUDIES[study].values()
              if isinstance(trial.objective, ScoreIdentity)]
    assert alphas == [0.5, 1.0, 1.2]


def exact_student():
    """A generator of N(0, 0.5^2), and its law."""
    return Generator(Affine((2,), 0.0, 0.5), 1.0), GaussianMixture([[0.0, 0.0]], 0.5)


def test_the_critic_gap_is_that_of_the_student_as_it_is():
    """An exact critic scores the estimate's own error, under 0.05; one off by a constant, that constant."""
    generator, own = exact_student()
    for offset, wanted in ((0.0, 0.0), (0.4, 0.8)):
        fake = lambda x, sigma, label=None, by=offset: own(x, sigma, label) + by  # noqa: E731
        made = Distilled(generator, generator, [], own, fake, None)
        assert sweep.critic_gap(made, 0.5) == pytest.approx(wanted, abs=0.05)


def test_ratio_quality_is_the_error_of_the_log_ratio():
    """0 for the exact ratio, up to the kernel density's error; off by a constant, that; nothing learned, its size."""
    (generator, own), truth = exact_student(), sweep.TARGETS["ring"]

    def exact(x, sigma):
        return truth.noised(sigma).log_prob(x) - own.noised(sigma).log_prob(x)

    for sigma in (0.2, 1.0):
        assert sweep.ratio_quality(generator, exact, truth, sigma).error < 0.1
        off = sweep.ratio_quality(generator, lambda x, s: exact(x, s) + 2, truth, sigma)
        assert off.error == pytest.approx(2, abs=0.1)
        nothing = sweep.ratio_quality(generator, lambda x, s: torch.zeros(len(x)), truth, sigma)
        assert nothing.error == pytest.approx(nothing.size)
        x = own.noised(sigma).sample(20_000, torch.Generator().manual_seed(0))
        assert nothing.size == pytest.approx(float(exact(x, sigma).square().mean().sqrt()), rel=0.1)


@pytest.mark.parametrize(("loss", "share"), [(ratio_loss, 0.3), (ScoreOfMixture().critic_loss, 0.6)],
                         ids=["logistic", "denoising"])
def test_both_ways_to_learn_a_ratio_find_it(loss, share):
    """Where ln r is above -3, and real samples are not rare: the error in its standard deviation, which nothing learned
    would leave at 1 (0.17 and 0.47 here; denoising is the slower way)."""
    p, q = GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], 0.5), GaussianMixture([[0.2, 0.1]], 1.0)
    ratio = sweep.learn_ratio(loss, p, q, 300)
    x = q.noised(0.5).sample(2000, torch.Generator().manual_seed(0))
    exact = p.noised(0.5).log_prob(x) - q.noised(0.5).log_prob(x)
    near = exact > -3
    assert float(near.double().mean()) > 0.9
    error = (ratio(x, 0.5) - exact)[near].square().mean().sqrt()
    assert float(error) < share * float(exact[near].std())


def test_the_ratio_learned_by_denoising_gives_the_mixtures_score():
    """D_alpha = rho D_p + (1 - rho) D_q against the closed form: scores within 5 % in mean square."""
    p, q, sigma = GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], 0.5), GaussianMixture([[0.2, 0.1]], 1.0), 0.5
    ratio = sweep.learn_ratio(ScoreOfMixture().critic_loss, p, q, 300)
    for alpha in (0.3, 0.7):
        m = GaussianMixture(torch.cat([p.means, q.means]), torch.cat([p.covs, q.covs]),
                            torch.cat([alpha * p.weights, (1 - alpha) * q.weights]))
        x = m.noised(sigma).sample(2000, torch.Generator().manual_seed(0))
        rho = torch.sigmoid(ratio(x, sigma) + torch.tensor(alpha).logit())[:, None]
        error = rho * p(x, sigma) + (1 - rho) * q(x, sigma) - m(x, sigma)
        assert float(error.square().sum() / (m(x, sigma) - x).square().sum()) < 0.05


def test_a_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    done = []

    def run(study, name, seed, at_most):
        done.append((study, name, seed))
        return {"study": study, "name": name, "seed": seed, "steps": at_most,
                "samples": np.full((sweep.KEPT, 2), seed, np.float32)}

    class Here:
        """A pool of no processes."""

        def __init__(self, *arguments, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, f, *arguments):
            future: Future = Future()
            future.set_result(f(*arguments))
            return future

    monkeypatch.setattr(sweep, "run", run)
    monkeypatch.setattr(sweep.rows.parallel, "workers", Here)
    sweep.sweep(tmp_path, ["alpha"], seeds=1, at_most=2)
    sweep.sweep(tmp_path, ["capacity", "alpha"], seeds=2, at_most=2)
    assert len(done) == len(set(done)) == 10
    stored, names = sweep.read(tmp_path), list(sweep.STUDIES["alpha"])
    assert [(row["study"], row["name"], row["seed"]) for row in stored.rows] == [
        *[("alpha", name, seed) for name in names for seed in (0, 1)],
        ("capacity", "16 units", 0), ("capacity", "16 units", 1)]
    assert set(stored.points) == {f"alpha: {name}" for name in names} | {"capacity: 16 units"}
    assert stored.runs("alpha", "1", "seed") == [0, 1]
    assert stored.median("alpha", "1", "seed") == 0.5
    assert stored.runs("alpha", "none", "seed") == []
    assert torch.equal(stored.samples("alpha", "1"), torch.zeros(sweep.KEPT, 2))
    assert stored.about["workers"] == 2


def test_the_command_line_names_its_studies(capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "--studies", "rings"])
    assert "invalid choice: 'rings'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    assert "slow critic" in capsys.readouterr().out


def test_stabilisers_are_switched_off_one_at_a_time():
    rules = [trial.objective for trial in sweep.STUDIES["stabilisers"].values()]
    fields = ("scale", "clip", "levels", "unit_mean", "normalise")
    usual = [getattr(OBJECTIVES["forward_kl"], name) for name in fields]
    changed = [[getattr(rule, f) != u for f, u in zip(fields, usual, strict=True)] for rule in rules]
    assert [sum(row) for row in changed] == [1] * 5
    assert all(any(row[i] for row in changed) for i in range(5))


def test_networks_of_the_students():
    generator = sweep.student(sweep.TARGETS["lattice"], 0)
    assert isinstance(generator.denoiser, Denoiser)
    assert isinstance(generator.denoiser.network, MLP)
    assert generator.sigma_init == pytest.approx(0.5 * sweep.TARGETS["lattice"].sigma_data)


#: Trials that are still being run: (study, name), or a whole study.
UNDER_WAY: set[str | tuple[str, str]] = set()


def test_the_stored_rows_are_those_of_the_trials_as_they_are_now():
    """Every trial has three seeds or more, in order, but for those under way; no other rows; all numbers finite,
    samples too."""
    stored = sweep.read(Path(__file__).parents[2] / "figures" / "sweep")
    there = {(row["study"], row["name"]) for row in stored.rows}
    assert there <= set(TRIALS)
    assert set(stored.points) == {f"{study}: {name}" for study, name in there}
    finished = [(study, name) for study, name in TRIALS if not {study, (study, name)} & UNDER_WAY]
    assert set(finished) <= there
    for study, name in there:
        seeds = stored.runs(study, name, "seed")
        assert seeds == list(range(len(seeds)))
        assert len(seeds) >= 3 or (study, name) not in finished
        assert set(stored.runs(study, name, "steps")) == {sweep.STUDIES[study][name].steps}
        assert stored.samples(study, name).isfinite().all()
    assert all(np.isfinite([v for v in row.values() if isinstance(v, float)]).all() for row in stored.rows)
