"""The run book on a CPU: a few seconds of each stage, out of minutes, killed, and carried on from the state and from
the exported weights. All with digits as colour images of 16x16."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from minidistill import data, training
from minidistill.cli import main
from minidistill.metrics import features
from minidistill.networks import Denoiser, Generator, grow, preset
from minidistill.studies import cifar10, cifar10_speed
from minidistill.studies import cifar10_quality as quality
from minidistill.training import checkpoints

SMALL = ["--preset", "tiny", "--size", "16", "--data", "digits", "--batch-size", "4", "--checkpoint-images", "40",
         "--speed", "float32", "--track", "8", "--reference", "200", "--n", "12"]
SHORT = ["--minutes", "0.05", "--reserve", "0.001"]  # none to measure


def run(stage, out, *more, minutes=SHORT):
    assert main(["cifar10", "--stage", stage, *minutes, "--out", str(out), *SMALL, *more]) == 0
    return results(out)[-1]


def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(autouse=True)
def _small_grids(monkeypatch):
    monkeypatch.setattr(quality, "FIRST_SHOWN", 10)
    monkeypatch.setattr(quality, "SHOWN", 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("cifar10")
    run("teacher", out)
    return out


def test_a_teacher_carries_on_from_its_state(folder):
    first = results(folder)[0]
    assert first["images"] == first["images_total"] > 0
    assert first["images_per_second"] > 0
    assert first["size"] == 16
    assert first["skipped"] == 0
    assert first["curve"][-1]["images"] == first["images_total"]
    second = run("teacher", folder)
    assert second["images_total"] == first["images_total"] + second["images"]
    assert second["curve"][0]["images"] > first["images_total"]  # of this call alone
    assert second["curve"][-1]["images"] == second["images_total"]
    assert training.progress_of(folder / "state" / "teacher.safetensors")["step"] * 4 == second["images_total"]
    model, info = checkpoints.load_model(folder / "teacher.safetensors")
    assert isinstance(model, Denoiser)
    assert model.shape == (3, 16, 16)
    assert (info["images"], info["data"]) == (second["images_total"], "digits")


def test_every_number_has_its_features(folder):
    rows = run("evaluate", folder, minutes=["--minutes", "5"])["metrics"]
    assert [row["features"] for row in rows] == ["cifar10_classifier of 16x16", "random_conv"]
    for row in rows:
        assert (row["model"], row["n"], row["n_reference"], row["calls"], row["seed"]) == ("teacher", 12, 200, 35, 0)
    assert (folder / "grid_teacher.png").read_bytes()[:4] == b"\x89PNG"


def test_it_goes_on_from_the_exported_weights_where_the_state_is_gone(folder, tmp_path):
    shutil.copy(folder / "teacher.safetensors", tmp_path)
    before, info = checkpoints.load_model(tmp_path / "teacher.safetensors")
    for _ in range(2):  # and then from the state of those
        record = run("teacher", tmp_path, "--learning-rate", "1e-12")
        after, now = checkpoints.load_model(tmp_path / "teacher.safetensors")
        assert now["images"] == info["images"] + record["images"] == record["images_total"]
        info = now
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_it_goes_on_from_committed_weights(folder, tmp_path):
    committed = tmp_path / "checkpoints"
    committed.mkdir()
    shutil.copy(folder / "teacher.safetensors", committed / "cifar10_16x16_teacher.safetensors")
    seen = checkpoints.load_model(folder / "teacher.safetensors")[1]["images"]
    record = run("student", tmp_path / "out", "--objective", "sid_alpha_1", "--weights", str(committed))
    assert (record["teacher_images"], record["objective"]) == (seen, "sid_alpha_1")
    record = run("teacher", tmp_path / "out", "--weights", str(committed))
    assert record["images_total"] == seen + record["images"]
    other = run("teacher", tmp_path / "other", "--weights", str(committed), "--size", "32")  # these do not fit
    assert other["images_total"] == other["images"]


def test_a_teacher_of_32x32_grows_from_one_of_16x16(folder, tmp_path):
    """At a rate of nothing its weights stay the grown ones, and are those that the next call goes on from."""
    small = folder / "teacher.safetensors"
    record = run("teacher", tmp_path, "--size", "32", "--grow", str(small), "--learning-rate", "1e-12")
    assert record["images_total"] == record["images"] > 0
    assert (record["size"], record["patch"]) == (32, 2)
    assert "--grow teacher.safetensors" in record["command"]
    wanted = grow(checkpoints.load_model(small)[0].network)
    for grow_again in ([], ["--grow", str(small)]):
        found = checkpoints.load_model(tmp_path / "teacher.safetensors")[0].network
        for a, b in zip(wanted.parameters(), found.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        again = run("teacher", tmp_path, "--size", "32", "--learning-rate", "1e-12", *grow_again)
    assert again["images_total"] > record["images_total"]
    for wrong in (["--size", "16"], ["--size", "32", "--patch", "1"]):
        assert main(["cifar10", *SMALL, *SHORT, *wrong, "--grow", str(small), "--out", str(tmp_path / "x")]) == 2


def test_a_student_leaves_everything_behind(folder):
    record = run("student", folder, "--objective", "sim", minutes=["--minutes", "5", "--reserve", "4.95"])
    assert [row["model"] for row in record["metrics"]] == ["teacher", "sim"] * 2
    assert [row["calls"] for row in record["metrics"]] == [35, 1] * 2
    assert record["metrics"][1]["frechet_ratio"] > 0
    student, info = checkpoints.load_model(folder / "student_sim.safetensors")
    assert isinstance(student, Generator)
    assert info["objective"] == "sim"
    for name in ("student_sim_panel.png", "grid_teacher.png", "grid_sim.png", "nearest.png", "teacher_and_student.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    assert record["curve"][-1]["score_gap"] >= 0
    assert record["curve"][-1]["frechet"] > 0
    assert {"seconds", "hardware", "torch", "command"} <= set(record)


def test_a_student_of_a_teacher_that_learned_more_goes_on_from_its_average(folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    first = run("student", out, "--objective", "fisher")
    run("teacher", out)
    second = run("student", out, "--objective", "fisher")
    assert second["teacher_images"] > first["teacher_images"]
    assert second["images_total"] == first["images_total"] + second["images"]
    steps = training.progress_of(out / "state" / "student_fisher.safetensors")["step"]
    assert steps * 4 == second["images"]  # a new state


def test_all_stages_in_one_call(tmp_path):
    record = run("all", tmp_path, minutes=["--minutes", "5", "--reserve", "4.9"])
    assert [row["stage"] for row in results(tmp_path)] == ["teacher", "student"]
    assert record["objective"] == "sim"
    assert {row["model"] for row in record["metrics"]} == {"teacher", "sim"}
    taught = results(tmp_path)[0]["images_total"]
    again = run("all", tmp_path, "--share", "0", minutes=SHORT)
    assert again["teacher_images"] == taught
    assert again["images_total"] == record["images_total"] + again["images"]


def test_out_of_minutes_nothing_is_measured_and_all_else_is_there(tmp_path):
    record = run("all", tmp_path, minutes=["--minutes", "0.06", "--reserve", "0.0001"])
    assert record["metrics"] == []
    assert [row["stage"] for row in results(tmp_path)] == ["teacher", "student"]
    for name in ("teacher", "student_sim"):
        assert checkpoints.load_model(tmp_path / f"{name}.safetensors")[1]["images"] > 0


def test_time_that_is_up_leaves_gradients_on():
    """As if the alarm rang inside of `torch.no_grad().__enter__`, whose `__exit__` then is never called."""
    with quality.until(time.monotonic() + 0.05):
        torch.set_grad_enabled(False)
        while True:
            time.sleep(0.01)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("stage", "how"), [
    ("teacher", signal.SIGKILL), ("student", signal.SIGKILL), ("student", signal.SIGTERM),
])
def test_killed_and_started_again(folder, tmp_path, stage, how):
    out, name = tmp_path / "out", {"teacher": "teacher", "student": "student_sim"}[stage]
    shutil.copytree(folder, out)
    for file in (*out.glob("student*"), *out.glob("state/student*"), *out.glob("results.json")):
        file.unlink()
    state = out / "state" / f"{name}.safetensors"
    began = training.progress_of(state)["step"]
    command = ["cifar10", "--stage", stage, "--minutes", "9", "--out", str(out), *SMALL, "--checkpoint-images", "4"]
    process = subprocess.Popen([sys.executable, "-m", "minidistill", *command])
    try:
        while process.poll() is None and training.progress_of(state)["step"] == began:
            time.sleep(0.05)
        time.sleep(0.5)
    finally:
        process.send_signal(how)
        process.wait()
    if how == signal.SIGTERM:  # there is time for a line of what was done
        (interrupted,) = results(out)
        assert interrupted["images"] == 4 * (training.progress_of(state)["step"] - began)
    saved = training.progress_of(state)["step"]
    assert saved > began
    record = run(stage, out, "--checkpoint-images", "4")
    assert record["images_total"] == 4 * training.progress_of(state)["step"] == 4 * saved + record["images"]
    assert checkpoints.load_model(out / f"{name}.safetensors")[1]["images"] == record["images_total"]


def test_some_of_the_five_batches(tmp_path):
    rng = np.random.default_rng(0)
    batches = rng.integers(0, 256, (2, 10_000, 3073), dtype=np.uint8)
    batches[:, :, 0] %= 10
    for number, batch in zip((2, 5), batches, strict=True):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(batch.tobytes())
    images, labels = data.cifar10_batches(tmp_path, (2, 5), 16)
    assert images.shape == (20_000, 3, 16, 16)
    assert labels.tolist() == batches[:, :, 0].flatten().tolist()
    block = batches[1, 7, 1:].reshape(3, 32, 32)[0, :2, :2].mean()
    assert int(images[10_007, 0, 0, 0]) == int(block + 0.5)
    (tmp_path / "data_batch_5.bin").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=r"data_batch_5\.bin is truncated: it has 100 bytes"):
        data.cifar10_batches(tmp_path, (2, 5), 16)


def test_what_does_not_run_is_not_chosen(folder, tmp_path, monkeypatch):
    def rate(preset, speed, *rest):
        if speed.precision == "bfloat16":
            raise RuntimeError("no such kernel")
        return 5.0

    monkeypatch.setattr(cifar10_speed, "throughput", rate)
    shutil.copy(folder / "teacher.safetensors", tmp_path)
    record = run("teacher", tmp_path, "--speed", "try")
    assert record["speed"] == "float32"
    (found,) = json.loads((tmp_path / "throughput.json").read_text()).values()
    assert found == {"float32": 5.0, "bfloat16": 0.0}


def test_milestones():
    assert list(cifar10.milestones(0, 60_000)) == [25_000, 50_000]
    assert list(cifar10.milestones(60_000, 60_000)) == []
    assert list(cifar10.milestones(999_999, 2_100_000)) == [1_000_000, 1_500_000, 2_000_000]


def test_a_block_is_left_when_its_time_is_over():
    seen = []
    with quality.until(time.monotonic() + 0.05):
        while True:
            seen.append(time.monotonic())
    assert seen
    with quality.until(time.monotonic() + 60):
        seen.append("to its end")
    assert seen[-1] == "to its end"
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_the_nearest_training_image_of_a_copy_is_its_original():
    images, _ = data.digits_as_rgb(16)
    copies = data.to_float(images[[5, 300, 900]])
    found = quality.nearest("copier", copies, images[:1000], [features.extractor("random_conv")])
    torch.testing.assert_close(found.found["random_conv"], copies)


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
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    for name in ("float32", "bfloat16", "bfloat16, channels last"):
        network = preset("tiny", (3, 16, 16), n_classes=10)
        rate = cifar10.throughput(network, cifar10.SPEEDS[name], 4, images, torch.arange(8), "cpu", seconds=0.1)
        assert rate > 0
