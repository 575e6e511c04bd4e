"""The command line: every command end to end, small, and every bad request refused in one line with code 2."""

import json

import pytest
import torch

from minidistill import bench, cli
from minidistill.cli import main
from minidistill.training import checkpoints


@pytest.mark.parametrize(("request_", "names"), [
    (["distill", "--teacher", "rng"], "did you mean 'ring'"),
    (["distill", "--teacher", "ring", "--objective", "revers_kl"], "did you mean 'reverse_kl'"),
    (["distill", "--teacher", "ring", "--steps", "0"], "steps=0"),
    (["train", "--data", "digit"], "did you mean 'digits'"),
    (["train", "--seed", "-1"], "--seed=-1"),
    (["sample", "none.safetensors"], "no such file"),
    (["sample", "ring", "--solver", "hune"], "did you mean 'heun'"),
    (["sample", "ring", "--out", "x.gif"], ".png or .safetensors"),
    (["evaluate", "ring", "--target", "digits"], "wanted (n, 1, 8, 8)"),
    (["evaluate", "ring", "--target", "rng"], "did you mean 'ring'"),
    (["quickstart", "--device", "gpu9"], "--device"),
    (["quickstart", "--steps", "0"], "--steps=0"),
    (["bench", "unets"], "did you mean 'unet'"),
    (["train", "--data", "cifar10", "--root", "nowhere"], "nowhere"),
    (["train", "--preset", "huge"], None),
    (["train", "--steps", "3", "--images", "9"], None),
    (["train", "--batch-size", "10", "--accumulate", "3"], "batch_size=10: wanted a multiple of 3"),
])
def test_bad_requests_exit_with_2_and_one_line(request_, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if names is None:  # argparse's own refusal
        with pytest.raises(SystemExit, match="2"):
            main(request_)
        return
    assert main(request_) == 2
    captured = capsys.readouterr()
    assert names in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_unwritable_output_is_refused_before_work(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["train", "--data", "ring", "--steps", "1000000", "--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["sim", "jensen_shannon"])
def test_train_distil_sample_evaluate(objective, tmp_path, capsys):
    """From digits to a student's picture and numbers, with --resume as a no-op on finished runs."""
    teacher, student = tmp_path / "t" / "teacher.safetensors", tmp_path / "s" / "student.safetensors"
    train = ["train", "--data", "digits", "--steps", "3", "--batch-size", "16", "--out", str(tmp_path / "t")]
    assert main(train) == 0
    before = checkpoints.read(teacher)[0]
    assert main([*train, "--resume"]) == 0
    after = checkpoints.read(teacher)[0]
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert main(["distill", "--teacher", str(teacher), "--objective", objective, "--steps", "2", "--batch-size", "16",
                 "--out", str(tmp_path / "s")]) == 0
    assert main(["sample", str(student), "--n", "12", "--out", str(tmp_path / "x.safetensors")]) == 0
    assert checkpoints.read(tmp_path / "x.safetensors", "samples")[0]["samples"].shape == (12, 1, 8, 8)
    assert main(["sample", str(teacher), "--n", "4", "--levels", "3", "--out", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    evaluate = ["evaluate", str(student), "--n", "40", "--levels", "4", "--json", "--out", str(tmp_path / "e.json")]
    assert main(evaluate) == 0
    row = json.loads(capsys.readouterr().out)
    assert row == json.loads((tmp_path / "e.json").read_text())
    assert row["target"] == "digits"
    kinds = [(each["model"], each["calls"], each["n"]) for each in row["rows"]]
    assert kinds == [("teacher", 7, 40), ("student", 1, 40)]
    assert row["rows"][1]["frechet_ratio"] == pytest.approx(row["rows"][1]["frechet"] / row["rows"][0]["frechet"])
    assert (tmp_path / "e.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "s" / "panel.png").read_bytes()[:4] == b"\x89PNG"
    teacher.unlink()
    assert main(["evaluate", str(student), "--n", "40"]) == 2
    assert "--teacher" in capsys.readouterr().err


def test_evaluating_the_exact_ring_finds_almost_no_divergence(capsys):
    assert main(["evaluate", "ring", "--n", "20000", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    # The bias of 20,000 samples: modes of area about 8 pi (3 x 0.22)^2 over 4 pi sigma^2 cells, over 2 n.
    assert 0 <= row["kl"] < 3 * (8 * (3 * 0.22) ** 2 / (4 * 0.1**2)) / (2 * 20_000)
    assert row["modes"] == "8/8"


@pytest.mark.parametrize("only", ["ring", "digits"])
def test_quickstart_writes_its_figures_and_numbers(only, tmp_path, capsys):
    assert main(["quickstart", "--only", only, "--steps", "4", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    figures = {path.name for path in tmp_path.glob("*.png")}
    if only == "ring":
        assert figures == {"ring.png", "ring_kl.png"}
        assert [row["objective"] for row in results["ring"]] == ["drifting", "reverse_kl", "forward_kl", "sim"]
        assert results["digits"] is None
    else:
        assert figures == {"digits.png"}
        assert results["digits"]["frechet_ratio"] > 0
        assert results["ring"] == []
    assert "results.json" in capsys.readouterr().out


def test_images_count_instead_of_steps(tmp_path):
    out = tmp_path / "t"
    assert main(["train", "--data", "ring", "--images", "100", "--batch-size", "30", "--log-every", "2", "--out",
                 str(out)]) == 0
    history = json.loads((out / "history.json").read_text())
    assert [(record["step"], record["images"]) for record in history] == [(2, 60), (4, 120)]
    assert checkpoints.load_model(out / "teacher.safetensors")[1]["images"] == 120


def test_a_bench_prints_a_list_of_rows(monkeypatch, capsys):
    row = {"name": "x", "ours": 1.0, "peer": 2.0, "peer_version": "y 1", "ratio": 0.5, "unit": "s/step"}
    monkeypatch.setitem(bench.BENCHES, "unet", lambda short: [{**row, "name": f"short={short}"}])
    assert main(["bench", "unet", "--short", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{**row, "name": "short=True"}]
    assert main(["bench", "unet"]) == 0
    assert "0.5" in capsys.readouterr().out


@pytest.mark.parametrize(("stop", "said"), [
    (KeyboardInterrupt(), "x: stopped"), (KeyboardInterrupt("at 3"), "x: at 3"),
])
def test_an_interrupt_ends_with_a_word(stop, said, capsys):
    def command():
        raise stop

    assert cli.run("x", command) == 130
    assert capsys.readouterr().err.strip() == said


@pytest.mark.parametrize("objective", ["ict", "ctm", "mean_flow", "reflow"])
def test_students_of_trajectories_are_sampled_in_any_number_of_calls(objective, tmp_path, capsys, monkeypatch):
    from minidistill.distillation import prepare
    real = prepare.make_pairs
    monkeypatch.setattr(prepare, "make_pairs", lambda teacher, n, *rest, **options: real(teacher, 16, *rest, **options))
    assert main(["distill", "--teacher", "ring", "--objective", objective, "--steps", "2", "--batch-size", "16",
                 "--out", str(tmp_path)]) == 0
    student = tmp_path / "student.safetensors"
    drawn = []
    for more in ([], ["--steps", "2"], ["--steps", "2", "--gamma", "1"]):
        out = tmp_path / f"{len(drawn)}.safetensors"
        assert main(["sample", str(student), "--n", "20", "--out", str(out), *more]) == 0
        drawn.append(checkpoints.read(out)[0]["samples"])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1], drawn[2]) == (objective == "ict")  # which always lands on clean samples
    assert main(["evaluate", str(student), "--n", "50"]) == 0
    capsys.readouterr()
    for bad, said in ((["--steps", "0"], "steps=0"), (["--gamma", "2"], "gamma=2"), (["--levels", "5"], "a student")):
        assert main(["sample", str(student), "--out", str(out), *bad]) == 2
        assert said in capsys.readouterr().err
    assert main(["sample", "ring", "--steps", "2", "--out", str(out)]) == 2
    assert "--steps 2: ring is no student" in capsys.readouterr().err
