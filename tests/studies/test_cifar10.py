"""The GPU run book on a CPU: a few seconds of each stage, carried on, from the state and from the exported weights."""

import json
import shutil

import pytest
import torch

from minidistill import training
from minidistill.cli import main
from minidistill.networks import Denoiser, Generator
from minidistill.studies import cifar10
from minidistill.training import checkpoints

SMALL = ["--preset", "tiny", "--data", "digits", "--batch-size", "4", "--n", "8", "--checkpoint-images", "40"]


def run(stage, out, *more):
    minutes = ["--minutes", "0.12", "--reserve", "0.06"]
    assert main(["cifar10", "--stage", stage, *minutes, "--out", str(out), *SMALL, *more]) == 0
    return json.loads((out / "results.json").read_text())[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("recipes")
    run("teacher", out)
    return out


def test_a_teacher_carries_on_from_its_state(folder):
    first = json.loads((folder / "results.json").read_text())[-1]
    assert first["images"] == first["images_total"] > 0
    assert first["images_per_second"] > 0
    assert first["metrics"][0]["model"] == "teacher"
    assert first["metrics"][0]["n"] == 8
    assert first["skipped"] == 0
    second = run("teacher", folder)
    assert second["images_total"] == first["images_total"] + second["images"]
    assert training.progress_of(folder / "state" / "teacher.safetensors")["step"] * 4 == second["images_total"]
    model, info = checkpoints.load_model(folder / "teacher.safetensors")
    assert isinstance(model, Denoiser)
    assert info["images"] == second["images_total"]
    assert (folder / "grid_teacher.png").read_bytes()[:4] == b"\x89PNG"
    assert all(path.stat().st_size < 16 * 2**20 for path in folder.glob("*.safetensors"))


def test_it_goes_on_from_the_exported_weights_where_the_state_is_gone(folder, tmp_path):
    for path in folder.glob("teacher*.safetensors"):
        shutil.copy(path, tmp_path)
    before, info = checkpoints.load_model(tmp_path / "teacher.safetensors")
    record = run("teacher", tmp_path, "--learning-rate", "1e-12")
    after, now = checkpoints.load_model(tmp_path / "teacher.safetensors")
    assert now["images"] == info["images"] + record["images"] == record["images_total"]
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_a_student_leaves_everything_behind(folder):
    record = run("student", folder, "--objective", "sid")
    assert [row["model"] for row in record["metrics"]] == ["teacher", "sid"]
    assert record["metrics"][0]["calls"] == 35
    assert record["metrics"][1]["frechet_ratio"] > 0
    student, info = checkpoints.load_model(folder / "student_sid.safetensors")
    assert isinstance(student, Generator)
    assert info["objective"] == "sid"
    for name in ("student_sid_panel.png", "grid_teacher.png", "grid_sid.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    assert record["score_gap"] >= 0


@pytest.mark.parametrize(("arguments", "words"), [
    (["cifar10", "--minutes", "0.5", "--reserve", "1", "--data", "digits"], "--minutes 0.5: nothing is left"),
    (["cifar10", "--data", "no/such/folder"], "no/such/folder"),
    (["cifar10", "--stage", "student", "--data", "digits", "--minutes", "2"], "run --stage teacher first"),
])
def test_bad_requests_exit_with_2(arguments, words, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_throughput_of_every_way_to_run_a_step():
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    for name in ("float32", "bfloat16", "bfloat16, channels last"):
        rate = cifar10.throughput("tiny", cifar10.SPEEDS[name], 4, images, torch.arange(8), "cpu", seconds=0.1)
        assert rate > 0
