"""What is stored of the CIFAR-10 runs: weights that load and sample, records that belong to them."""

import json
from pathlib import Path

import pytest
import torch

from minidistill.networks import Generator
from minidistill.studies import cifar10_quality as quality
from minidistill.training import checkpoints

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tutorials" / "checkpoints").glob("*.safetensors"))
RECORDS = json.loads((ROOT / "figures" / "cifar10" / "results.json").read_text())


SIZES = sorted({row["size"] for row in RECORDS})


def records(stage, size):
    return [row for row in RECORDS if (row["stage"], row["size"]) == (stage, size)]


def test_both_sizes_are_there():
    assert SIZES == [16, 32]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_weights_load_and_say_what_they_are(file):
    model, info = checkpoints.load_model(file)
    size = int(file.stem.split("_")[1].split("x")[0])
    assert model.shape == (3, size, size)
    assert model.n_classes == 10
    assert info["data"] == "cifar10"
    assert isinstance(model, Generator) == ("_student_" in file.stem)
    if isinstance(model, Generator):
        made, _ = quality.sample(model, 2)
    else:
        with torch.no_grad():
            made = model(torch.zeros(2, 3, size, size), 1.0, torch.tensor([0, 9]))
    assert made.shape == (2, 3, size, size)
    assert float(made.abs().max()) < 2


def test_they_are_few_megabytes():
    assert FILES
    assert sum(file.stat().st_size for file in FILES) < 60 * 2**20


@pytest.mark.parametrize("size", SIZES)
def test_every_student_has_its_record_and_its_numbers(size):
    (measured,) = records("evaluate", size)[-1:]
    students = [file for file in FILES if f"_{size}x{size}_student_" in file.stem]
    assert students
    for file in students:
        name, (_, info) = file.stem.split("_student_")[1], checkpoints.load_model(file)
        trained = [row for row in records("student", size) if row["objective"] == name]
        assert trained[-1]["images_total"] == sum(row["images"] for row in trained) == info["images"]
        rows = [row for row in measured["metrics"] if row["model"] == name]
        assert len({row["features"] for row in rows}) == 2
        assert all(row["n"] >= 1000 and row["calls"] == 1 and row["frechet"] > 0 for row in rows)


@pytest.mark.parametrize("size", SIZES)
def test_the_teacher_s_record_reaches_to_its_weights(size):
    _, info = checkpoints.load_model(ROOT / "tutorials" / "checkpoints" / f"cifar10_{size}x{size}_teacher.safetensors")
    stretches = records("teacher", size)
    assert stretches[-1]["images_total"] == sum(row["images"] for row in stretches) == info["images"]
    seen = [point["images"] for row in stretches for point in row["curve"]]
    assert seen == sorted(seen)  # each stretch's curve is its own


@pytest.mark.parametrize("record", RECORDS, ids=lambda row: f"{row['stage']} {row.get('objective', '')}")
def test_records_say_where_and_how(record):
    assert record["command"].startswith("minidistill cifar10 ")
    assert {"hardware", "torch", "seed", "size", "data"} <= set(record)
    assert "/" not in record["command"]  # no places
