"""Runs on the command line: earlier ones are not lost without a word, and what went wrong is in the exit code."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minidistill import training
from minidistill.cli import main, program
from minidistill.training import checkpoints, files
from tests.helpers import small_denoiser

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "--data", "ring", "--steps", "6", "--batch-size", "8"]


def complaint(capsys):
    """What was said on stderr besides the progress bars."""
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return [line.removeprefix("minidistill: ") for line in lines if line.startswith("minidistill: ")]


@pytest.mark.parametrize(("command", "name"), [
    (TRAIN, "teacher.safetensors"),
    (["distill", "--teacher", "ring", "--steps", "3", "--batch-size", "8"], "student.safetensors"),
])
def test_a_finished_folder_is_refused_without_resume_or_force(tmp_path, command, name, capsys):
    command = [*command, "--out", str(tmp_path)]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert main([*command, "--seed", "1"]) == 2
    assert complaint(capsys) == [f"--out {tmp_path} holds a finished run ({name}, training.safetensors); wanted "
                                 "--resume to go on with it, --force to replace it, or another folder"]
    assert main([*command, "--resume"]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main([*command, "--seed", "1", "--force"]) == 0
    assert (tmp_path / name).read_bytes() != before[name]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--resume", "--force"])


def test_so_is_one_that_is_not_finished(tmp_path, capsys):
    """A forgotten --resume would else cost all of it."""
    assert main([*TRAIN, "--out", str(tmp_path)]) == 0
    state, model = tmp_path / "training.safetensors", tmp_path / "teacher.safetensors"
    kept = model.read_bytes()
    model.unlink()
    assert main([*TRAIN, "--out", str(tmp_path)]) == 2
    assert "holds a run that is not finished (training.safetensors)" in complaint(capsys)[0]
    model.write_bytes(kept)
    state.unlink()
    assert main([*TRAIN, "--out", str(tmp_path), "--resume"]) == 2  # there is nothing to go on from, but much to lose
    assert model.read_bytes() == kept


def test_resume_with_nothing_there_says_so(tmp_path, capsys):
    assert main([*TRAIN, "--out", str(tmp_path / "new"), "--resume"]) == 0
    assert complaint(capsys) == [f"--resume: no training.safetensors in {tmp_path / 'new'}; a new run begins"]


def test_a_student_knows_its_teacher_again(tmp_path, capsys):
    teacher, student = tmp_path / "t" / "teacher.safetensors", tmp_path / "s" / "student.safetensors"
    train = ["train", "--data", "digits", "--steps", "2", "--batch-size", "8", "--out", str(tmp_path / "t")]
    assert main(train) == 0
    assert main(["distill", "--teacher", str(teacher), "--objective", "sim", "--steps", "1", "--batch-size", "8",
                 "--out", str(tmp_path / "s")]) == 0
    evaluate = ["evaluate", str(student), "--n", "12", "--levels", "2"]
    capsys.readouterr()
    assert main(evaluate) == 0
    assert complaint(capsys) == []
    assert main([*train, "--seed", "1", "--force"]) == 0
    capsys.readouterr()
    assert main(evaluate) == 0
    assert f"{teacher} is not the teacher that {student} was distilled from" in complaint(capsys)[0]


@pytest.mark.parametrize("name", program.RUNS)
def test_a_second_run_in_the_same_folder_is_refused(tmp_path, name, capsys):
    extra = {"distill": ["--teacher", "ring"], "cifar10": ["--data", "digits"]}.get(name, [])
    with files.hold(tmp_path):
        assert main([name, "--out", str(tmp_path), *extra]) == 2
    said = complaint(capsys)
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path} is in use by another run: process {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_weights_that_explode_are_an_error(tmp_path, capsys):
    assert main([*TRAIN[:3], "--steps", "1", "--learning-rate", "1e42", "--out", str(tmp_path)]) == 2
    assert "after step 1 (try a lower learning rate)" in complaint(capsys)[0]
    assert not list(tmp_path.iterdir())


def test_a_run_of_which_most_updates_were_skipped_is_an_error_after_its_model_is_saved(tmp_path, monkeypatch, capsys):
    descend, calls = training.descend, iter(range(100))
    monkeypatch.setattr(training, "descend", lambda *given: torch.maximum(
        descend(*given), torch.tensor(float(next(calls) % 3 < 2))))
    with pytest.warns(UserWarning, match="4 of 6 updates were skipped"):
        assert main([*TRAIN, "--out", str(tmp_path)]) == 2
    assert "4 of 6 updates were skipped" in complaint(capsys)[0]
    assert (tmp_path / "teacher.safetensors").exists()


def test_on_a_full_disk_the_model_comes_first(tmp_path, monkeypatch, capsys):
    """The state can't be written at the end, the model can: it is, and then the error is told."""
    replace = os.replace

    def refuse(partial, path):
        if Path(path).name == "training.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(partial, path)

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.warns(UserWarning, match=r"training\.safetensors could not be written at step 6"):
        assert main([*TRAIN, "--out", str(tmp_path)]) == 2
    assert complaint(capsys) == [
        f"{tmp_path / 'training.safetensors'} is of step 0 of 6: it could not be written at the end"]
    checkpoints.load_model(tmp_path / "teacher.safetensors")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_the_exit_code_tells_the_signal(tmp_path, name, code, monkeypatch, capsys):
    descend = training.descend

    def stopping(*given):
        signal.raise_signal(getattr(signal, name))
        return descend(*given)

    monkeypatch.setattr(training, "descend", stopping)
    assert main([*TRAIN, "--out", str(tmp_path)]) == code
    assert complaint(capsys) == [f"stopped at step 1 of 6; saved in {tmp_path / 'training.safetensors'}"]


@pytest.mark.parametrize("how", [["-m", "minidistill"], ["-c", "from minidistill.__main__ import main; exit(main())"]])
def test_ctrl_c_while_everything_is_imported_ends_with_a_word(tmp_path, how):
    """In place of torch's import, the first of those that take seconds, the interrupt comes."""
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, *how, "train"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (130, "minidistill: stopped\n", "")


def test_the_top_level_is_loaded_when_it_is_asked_for():
    code = ("import sys, minidistill; assert 'torch' not in sys.modules; from minidistill import *; "
            "assert distill and ring and minidistill.metrics.mode_coverage; "
            "print(sorted(set(minidistill.__all__) - {*dir()}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == "[]", done.stderr


def test_samples_that_are_not_finite_are_not_written(tmp_path, capsys):
    model = small_denoiser(n_classes=0)
    with torch.no_grad():
        model.network.outward.weight.fill_(1e38)
    file = checkpoints.save_model(tmp_path / "m.safetensors", model, data="ring")
    assert main(["sample", str(file), "--n", "3", "--levels", "2", "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "samples are not finite" in complaint(capsys)[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
