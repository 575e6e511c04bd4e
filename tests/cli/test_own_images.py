"""Your own images on the command line, from a folder to a measured student."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from minidistill.cli import main
from minidistill.data import images
from minidistill.networks.unet import UNet
from minidistill.training import checkpoints


def pictures(folder, classes=("a", "b"), each=5, shape=(8, 8, 3)):
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def train(data, out, *more):
    return main(["train", "--data", str(data), "--steps", "2", "--batch-size", "4", "--out", str(out), *more])


def test_train_distil_sample_evaluate_from_a_folder(tmp_path, monkeypatch, capsys):
    """A student of an objective that looks at the images, which both find again from another folder, and when moved."""
    folder = pictures(tmp_path / "pictures")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert train("pictures", "t", "--size", "8") == 0
    teacher, info = checkpoints.load_model("t/teacher.safetensors")
    assert isinstance(teacher.network, UNet)
    assert (teacher.shape, teacher.n_classes) == ((3, 8, 8), 2)
    assert (info["data"], info["size"]) == (str(folder), 8)
    monkeypatch.chdir(tmp_path / "elsewhere")
    distil = ["distill", "--teacher", "../t/teacher.safetensors", "--objective", "dmd2", "--steps", "2",
              "--batch-size", "4", "--critic-steps", "1", "--out", "../s"]
    assert main(distil) == 0
    student, about = checkpoints.load_model("../s/student.safetensors")
    assert (student.shape, about["data"], about["size"]) == ((3, 8, 8), str(folder), 8)
    assert main(["sample", "../s/student.safetensors", "--n", "3", "--out", "../x.safetensors"]) == 0
    assert checkpoints.read("../x.safetensors")[0]["samples"].shape == (3, 3, 8, 8)
    evaluate = ["evaluate", "../s/student.safetensors", "--n", "6", "--levels", "2", "--json"]
    capsys.readouterr()
    assert main(evaluate) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["target"] == str(folder)
    assert [(each["model"], each["calls"], each["n_reference"]) for each in row["rows"]] == [
        ("teacher", 3, 10), ("student", 1, 10)]
    assert all(each["features"] == "cifar10_classifier at 32x32" and each["frechet"] > 0 for each in row["rows"])
    assert all(each["recognised"] is None for each in row["rows"])
    shutil.move(folder, tmp_path / "moved")
    for command, option in ((evaluate, "--target"), (distil, "--data")):
        assert main(command) == 2
        assert f"{folder} is not there (any more); wanted {option} FOLDER" in capsys.readouterr().err
        again = ["--force"] if command is distil else []  # its folder holds the run of before
        assert main([*command, option, "../moved", *again]) == 0
    assert checkpoints.load_model("../s/student.safetensors")[1]["data"] == str(tmp_path / "moved")


@pytest.mark.parametrize("classes", [(), ("one",), ("a", "b", "c")])
def test_classes_of_folders_make_conditional_teachers(classes, tmp_path):
    folder = pictures(tmp_path / "pictures", classes or (".",), shape=(8, 4))
    assert train(folder, tmp_path / "t", "--preset", "tiny") == 0
    teacher, _ = checkpoints.load_model(tmp_path / "t" / "teacher.safetensors")
    assert (teacher.shape, teacher.n_classes) == ((1, 8, 4), len(classes) if len(classes) > 1 else 0)


def test_arrays_are_trained_on_as_the_folder_they_came_from(tmp_path):
    folder = pictures(tmp_path / "pictures")
    pixels, labels = images(folder)
    np.savez(tmp_path / "x.npz", images=pixels.numpy(), labels=labels.numpy())
    assert train(folder, tmp_path / "t") == train(tmp_path / "x.npz", tmp_path / "u") == 0
    one, other = (checkpoints.load_model(tmp_path / name / "teacher.safetensors") for name in "tu")
    assert all(torch.equal(a, b) for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True))
    assert other[1]["data"] == str(tmp_path / "x.npz")
    assert "size" not in other[1]


def test_bad_images_are_refused_in_one_line(tmp_path, capsys):
    odd = pictures(tmp_path / "odd", shape=(6, 6, 3))
    for data, more, words in (
        (odd, [], "divisible by 4; --size N makes images N x N"),
        (odd, ["--size", "0"], "size=0"),
        (odd, ["--root", "x"], f"--root x: only for cifar10, not for {odd}"),
        (odd, ["--subset", "10"], "--subset 10: only for cifar10"),
        (tmp_path / "x.npz", [], "x.npz is not there"),
        ("pictures", [], "or a folder of images, or an .npz file"),
        ("digits", ["--size", "8"], "--size 8: only for cifar10 and your own images, not for digits"),
    ):
        assert train(data, tmp_path / "t", *more) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "t").exists() or not list((tmp_path / "t").iterdir())
