"""What is asked of the command line is done or refused: nothing dropped, no 0 taken for "not given", no traceback."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minidistill import __version__, bench
from minidistill.cli import main, program
from minidistill.distributions import GaussianMixture
from minidistill.metrics import evaluation, features
from minidistill.networks import MLP, Denoiser, Generator
from minidistill.studies import cifar10, quickstart, sweep
from minidistill.training import checkpoints, generator_on
from tests.helpers import small_denoiser

ROOT = Path(__file__).parents[2]


def commands():
    parser = program._parser()
    return next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices


def asked(*words):
    """What a command is given."""
    arguments = program._parser().parse_args(words)
    arguments.argv = list(words)
    return arguments


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A teacher and a student of points, and of digits, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, shape, data in (("points", (2,), "ring"), ("digits", (1, 8, 8), "digits")):
        torch.manual_seed(0)
        teacher = small_denoiser(shape=shape)
        checkpoints.save_model(f"{name}.safetensors", teacher, data=data)
        student = Generator(Denoiser(MLP(shape, hidden=16, depth=1), 0.7), 1.0)
        checkpoints.save_model(f"{name}-student.safetensors", student, data=data, teacher=f"{name}.safetensors")
    return tmp_path


def refused(capsys, *words):
    """The one line in which a request was refused."""
    capsys.readouterr()
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err


# Help and version.


def entry(parser, option):
    """What --help says of an option, in one line."""
    text = parser.format_help()
    found = re.search(rf"\n  {option}\b.*?(?=\n  -|\n\n|$)", text[text.index("options:"):], re.DOTALL)
    return " ".join(found[0].split())


def test_every_option_has_help_that_names_its_default():
    for name, parser in commands().items():
        for action in parser._actions:
            assert action.help, f"{name} {action.option_strings or action.dest}"
            if action.option_strings and not any(action.default is none for none in (None, False, argparse.SUPPRESS)):
                said = entry(parser, action.option_strings[-1])
                assert "default" in said, f"{name}: {said}"


@pytest.mark.parametrize(("command", "option", "words"), [
    ("train", "--steps", "default 3000"), ("train", "--learning-rate", "default 1e-3 for a U-Net, 2e-3 for an MLP"),
    ("train", "--precision", "default float32"), ("sample", "--n", "default 100"), ("evaluate", "--n", "default 4000"),
    ("evaluate", "--solver", "default heun"), ("sweep", "--seeds", "default 5"),
    ("classifier", "--out", "cifar10_classifier.safetensors"),
])
def test_defaults_are_shown(command, option, words):
    assert words in entry(commands()[command], option)


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"minidistill {__version__}\n"


def test_help_of_the_script_that_executes_notebooks():
    script = ROOT / "tutorials" / "execute.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "00_quickstart" in done.stdout
    done = subprocess.run([sys.executable, script, "99_nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no notebook 99_nothing; there are 00_quickstart" in done.stderr
    assert "Traceback" not in done.stderr


# Options that are parsed are used or refused.


@pytest.mark.parametrize("request_", [
    "train --data ring --root x --steps 1", "train --data digits --subset 10 --steps 1",
    "train --data ring --size 8 --steps 1", "train --data ring --preset tiny --steps 1",
    "distill --teacher ring --data digits --steps 1", "distill --teacher ring --root x --steps 1",
    "distill --teacher digits.safetensors --objective sim --data digits --steps 1",
    "distill --teacher digits.safetensors --objective sim --subset 10 --steps 1",
    "distill --teacher digits.safetensors --objective dmd2 --root x --steps 1",
    "sample points-student.safetensors --solver euler", "sample points-student.safetensors --levels 3",
    "evaluate points-student.safetensors --solver euler", "evaluate points-student.safetensors --levels 3",
    "evaluate points.safetensors --features inception", "evaluate points.safetensors --root x",
    "evaluate points.safetensors --teacher digits.safetensors", "evaluate ring --features inception",
    "evaluate digits.safetensors --teacher digits.safetensors", "evaluate digits.safetensors --root x",
    "bench unet --seed 3", "sweep --device cuda:0", "cifar10 --data digits --subset 10",
    "cifar10 --data digits --batches 1,2", "cifar10 --batches 1,2 --subset 10", "cifar10 --critic-steps 2",
    "cifar10 --stage evaluate --critic-steps 2", "cifar10 --stage evaluate --learning-rate 1e-3", "train --solver heun",
])
def test_an_option_that_would_be_dropped_is_refused(request_, models, capsys, monkeypatch):
    monkeypatch.setattr(program, "_device", lambda name: name)
    monkeypatch.setitem(bench.BENCHES, "unet", lambda short: pytest.fail("it ran"))
    monkeypatch.setattr(sweep, "sweep", lambda *arguments, **options: pytest.fail("it ran"))
    monkeypatch.setattr(cifar10, "_images", lambda settings: pytest.fail("it ran"))
    words = request_.split()
    if words == ["train", "--solver", "heun"]:  # argparse's own refusal
        with pytest.raises(SystemExit, match="2"):
            main(words)
        return
    error = refused(capsys, *words)
    option = next(word for word in words[:0:-1] if word.startswith("--") and word != "--steps")
    assert option in error or "--preset" in words


@pytest.mark.parametrize("name", ["ring", "points.safetensors", "digits.safetensors"])
def test_solver_and_levels_are_used(name, models, capsys):
    """By sample and evaluate alike: the numbers are those of samples drawn that way."""
    def numbers(*more):
        assert main(["evaluate", name, "--n", "60", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    def samples(*more):
        assert main(["sample", name, "--n", "60", "--out", "x.safetensors", *more]) == 0
        return checkpoints.read("x.safetensors")[0]["samples"]

    plain, few, euler = ([], ["--levels", "4"], ["--levels", "4", "--solver", "euler"])
    drawn = [samples(*more) for more in (plain, few, euler)]
    assert len({tuple(x.flatten()[:5].tolist()) for x in drawn}) == 3
    capsys.readouterr()
    found = [numbers(*more) for more in (plain, few, euler)]
    assert len({str(each) for each in found}) == 3
    if "rows" in found[0]:
        assert [each["rows"][0]["calls"] for each in found] == [35, 7, 4]
    if name == "points.safetensors":
        wanted, _ = evaluation.sample_teacher(checkpoints.load_model(name)[0], 60, levels=4, solver="euler")
        assert torch.equal(drawn[2], wanted)
    assert "did you mean 'heun'" in refused(capsys, "evaluate", name, "--solver", "hune")
    assert "--levels=0" in refused(capsys, "evaluate", name, "--levels", "0")


def test_a_students_teacher_is_measured_by_the_solver(models, capsys):
    assert main(["evaluate", "digits-student.safetensors", "--n", "40", "--levels", "4", "--solver", "euler",
                 "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["calls"] for row in rows] == [4, 1]


def test_a_model_is_brought_to_the_device(models, capsys, monkeypatch):
    """Mixtures too, whether a solver is asked for or not; the random numbers are those of the CPU everywhere."""
    seen = []
    for kind in (GaussianMixture, Denoiser, Generator):
        monkeypatch.setattr(kind, "to", lambda self, device, own=kind.to: seen.append(device) or own(self, device))
    for model, more in (("ring", []), ("ring", ["--levels", "2"]), ("points.safetensors", ["--levels", "2"]),
                        ("points-student.safetensors", [])):
        for command in (["sample", model, "--out", "x.safetensors"], ["evaluate", model]):
            seen.clear()
            assert main([*command, "--n", "20", *more]) == 0
            assert torch.device("cpu") in seen


def test_a_target_of_another_shape_is_refused_before_anything_is_drawn(models, capsys, monkeypatch):
    for name in ("sample_teacher", "sample_student"):
        monkeypatch.setattr(evaluation, name, lambda *arguments, **options: pytest.fail("it drew"))
    for model, target in (("digits.safetensors", "ring"), ("digits-student.safetensors", "grid"), ("ring", "digits"),
                          ("points.safetensors", "digits")):
        assert "the model's samples has shape" in refused(capsys, "evaluate", model, "--target", target)


def test_how_many_samples_a_picture_shows(models, capsys):
    for words, said in ((["digits.safetensors", "--n", "130"], "the first 100 of 130 samples in x.png"),
                        (["digits.safetensors", "--n", "30"], "30 samples in x.png"),
                        (["ring", "--n", "4000"], "4000 samples in x.png")):
        assert main(["sample", *words, "--out", "x.png", *(["--levels", "2"] if words[0] != "ring" else [])]) == 0
        assert capsys.readouterr().out.strip() == said


def test_calls_are_counted():
    """Of each solver as it is, and per batch: 20 samples in batches of 6."""
    teacher, images = small_denoiser(shape=(1, 8, 8)), torch.rand(20, 1, 8, 8)
    look = features.Extractor("x", 2, lambda x: x.flatten(1)[:, :2], (1, 8, 8))
    for solver, calls in (("euler", 3), ("heun", 5), ("dpm_solver_2m", 3)):
        rows = evaluation.compare(teacher, Generator(teacher, 1.0), images, n=20, levels=3, solver=solver, batch_size=6,
                                  features=look, progress=False).rows
        assert [row["calls"] for row in rows] == [calls, 1]
    with pytest.raises(ValueError, match="did you mean 'heun'"):
        evaluation.compare(teacher, {}, images, n=20, solver="hune", features=look)


def test_bench_and_sweep_use_what_they_are_given(tmp_path, capsys, monkeypatch):
    seen = {}
    row = {"name": "x", "ours": 1.0, "peer": 2.0, "peer_version": "y 1", "ratio": 0.5, "unit": "s/step"}
    monkeypatch.setitem(bench.BENCHES, "unet", lambda short, **options: seen.update(options) or [row])
    monkeypatch.setattr(sweep, "sweep", lambda *arguments, **options: seen.update(options))
    monkeypatch.setattr(program, "_device", lambda name: name)
    assert main(["bench", "unet", "--out", str(tmp_path / "rows.json"), "--device", "cuda:0"]) == 0
    assert json.loads((tmp_path / "rows.json").read_text()) == [row]
    assert main(["sweep", "--seed", "7", "--workers", "1", "--out", str(tmp_path / "sweep")]) == 0
    assert seen == {"device": "cuda:0", "first": 7, "workers": 1}


# 0 is a value.


@pytest.mark.parametrize("request_", [
    "train --data ring --learning-rate 0", "train --data ring --ema-halflife 0", "train --data ring --batch-size 0",
    "train --data ring --accumulate 0", "train --data ring --images 0", "train --data ring --log-every 0",
    "distill --teacher ring --learning-rate 0", "distill --teacher ring --critic-learning-rate 0",
    "distill --teacher ring --critic-steps 0", "distill --teacher ring --sigma-init 0",
    "distill --teacher ring --sigma-max 0", "distill --teacher digits.safetensors --objective sim --learning-rate 0",
    "evaluate ring --levels 0", "sample ring --levels 0", "sample ring --n 0", "quickstart --steps 0",
])
def test_zero_is_not_taken_for_the_default(request_, models, capsys):
    option = request_.split()[-2].strip("-")
    error = refused(capsys, *request_.split())
    assert re.search(rf"{option.replace('-', '[-_]')}=0|sigma_max=0|not below sigma_max=0", error)


def test_zero_in_python():
    with pytest.raises(ValueError, match="steps=0"):
        quickstart.quickstart(steps=0)
    with pytest.raises(ValueError, match=r"only='rings' is not known; did you mean 'ring'"):
        quickstart.quickstart(only="rings")
    with pytest.raises(ValueError, match="out_features=0"):
        MLP((2,), out_features=0)


def test_an_empty_name_is_not_taken_for_the_default(models, capsys):
    assert "--target" in refused(capsys, "evaluate", "ring", "--target", "")
    assert "features=''" in refused(capsys, "evaluate", "digits.safetensors", "--features", "")


# Paths.


def test_a_tilde_in_a_path_is_the_home_folder(models, monkeypatch):
    home = models / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "p.safetensors").write_bytes((models / "points.safetensors").read_bytes())
    assert main(["train", "--data", "ring", "--steps", "1", "--batch-size", "4", "--out", "~/run"]) == 0
    assert (home / "run" / "teacher.safetensors").is_file()
    assert main(["distill", "--teacher", "~/p.safetensors", "--steps", "1", "--batch-size", "4", "--out", "~/s"]) == 0
    assert (home / "s" / "student.safetensors").is_file()
    assert main(["sample", "~/p.safetensors", "--n", "4", "--levels", "2", "--out", "~/x.safetensors"]) == 0
    assert (home / "x.safetensors").is_file()
    assert main(["evaluate", "ring", "--n", "50", "--out", "~/e.json"]) == 0
    assert (home / "e.json").is_file()
    assert main(["train", "--data", "cifar10", "--root", "~/nothing"]) == 2
    assert cifar10.Settings.of(asked("cifar10", "--weights", "~/w")).weights == home / "w"
    assert not (models / "~").exists()


@pytest.mark.parametrize("request_", [
    "train --data ring --out points.safetensors", "distill --teacher ring --out points.safetensors",
    "quickstart --out points.safetensors", "sweep --out points.safetensors", "cifar10 --out points.safetensors",
    "train --data ring --out points.safetensors/deeper", "sample ring --out points.safetensors/x.png",
    "evaluate ring --out points.safetensors/x.json",
])
def test_out_that_is_a_file(request_, models, capsys):
    assert "points.safetensors is a file; wanted a folder there" in refused(capsys, *request_.split())


def test_out_that_is_a_folder(models, capsys):
    for words in ("sample ring --out .", "evaluate ring --out .", "bench unet --out ."):
        assert "is a folder; wanted a file's name" in refused(capsys, *words.split())


# Requests that can't be met.


@pytest.mark.parametrize("request_", [
    "distill --teacher points-student.safetensors --steps 1",
    "evaluate digits-student.safetensors --teacher digits-student.safetensors",
])
def test_a_student_given_as_teacher(request_, models, capsys):
    assert "-student.safetensors is a student; wanted a teacher" in refused(capsys, *request_.split())


@pytest.mark.parametrize("device", ["mps", "cuda:7", "cuda", "meta", "gpu9", "", "cpu:x"])
def test_a_device_that_is_not_there(device, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert refused(capsys, "train", "--device", device).startswith("minidistill: --device ")


@pytest.mark.parametrize("seed", ["18446744073709551616", "-1", str(10**30)])
def test_a_seed_that_torch_does_not_take(seed, capsys):
    assert f"--seed={seed}: wanted a whole number" in refused(capsys, "train", "--data", "ring", "--seed", seed)
    with pytest.raises(ValueError, match=f"seed={seed}: wanted a whole number"):
        generator_on("cpu", int(seed))


def test_the_largest_seed(models):
    assert main(["sample", "ring", "--seed", str(2**64 - 1), "--out", "x.safetensors"]) == 0


@pytest.mark.parametrize(("error", "said"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nsee"), "x: out of memory: CUDA out of"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: x"), "x: out of memory: [enforce fail]"),
    (MemoryError(), "x: out of memory: MemoryError"),
    (RuntimeError("PyTorch is not linked with support for mps devices\nException raised from ..."),
     "x: PyTorch is not linked with support for mps devices"),
    (NotImplementedError("no kernel\nstack"), "x: no kernel"),
])
def test_torchs_own_errors_take_one_line(error, said, capsys):
    def command():
        raise error

    assert program.run("x", command) == 2
    text = capsys.readouterr().err
    assert text.startswith(said)
    assert text.count("\n") == 1


# Scripts without a main guard.


def test_worker_processes_of_a_plain_script(tmp_path):
    """It starts workers at its top level, without asking for its own name; they must not run it again."""
    (tmp_path / "plain.py").write_text(
        "import math\n"
        "from minidistill.studies import quickstart\n"
        "print(quickstart._run([(math.sqrt, 4.0), (math.sqrt, 9.0)], parallel=True), __file__, __spec__)\n"
    )
    done = subprocess.run([sys.executable, "plain.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"[2.0, 3.0] {tmp_path / 'plain.py'} None\n"
