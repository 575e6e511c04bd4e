"""Damaged files: every byte of a small header, and random changes and cuts of whole files. None is ever taken."""

import random

import pytest

from minidistill import training
from minidistill.training import checkpoints
from tests.helpers import small_denoiser
from tests.training.test_runs import adam_state


def refused(read, file):
    """Whether reading it is the one error that names it."""
    try:
        read(file)
    except ValueError as error:
        return str(file) in str(error)
    return False


def header_length(file):
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize("reads", [checkpoints.load_model, checkpoints.read_info])
def test_every_byte_of_a_header(reads, tmp_path, times, tally):
    """Each byte changed in one bit, or, in the long form, in each of its eight."""
    file = checkpoints.save_model(tmp_path / "model.safetensors", small_denoiser(hidden=2), note="a small one")
    whole, tried, lost = file.read_bytes(), 0, 0
    for at in range(header_length(file)):
        for bit in times([at % 8], range(8)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1:])
            tried += 1
            lost += not refused(reads, file)
    tally(f"bytes of a header, {reads.__name__}", tried, lost)


def damage(rng, data):
    """A byte changed, some bytes overwritten, a cut, an addition, or two parts exchanged."""
    at, end = sorted(rng.sample(range(len(data)), 2))
    return rng.choice([
        data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1:],
        data[:at] + bytes(255 - byte for byte in data[at:end]) + data[end:],
        data[:at], data + data[at:end], data[:at] + data[end:], b"",
        bytes(8) + data[8:], data[end:] + data[at:end] + data[:at] + b"x",
    ])


@pytest.mark.parametrize("kind", ["model", "state"])
def test_random_damage(kind, tmp_path, times, tally):
    file, tried, lost = tmp_path / f"{kind}.safetensors", times(100, 1000), 0
    if kind == "model":
        checkpoints.save_model(file, small_denoiser())
    else:
        training.save_state(file, adam_state())
    whole, rng, state = file.read_bytes(), random.Random(0), adam_state()
    for _ in range(tried):
        file.write_bytes(damaged := damage(rng, whole))
        assert damaged != whole
        reads = checkpoints.load_model if kind == "model" else lambda path: training.load_state(path, state)
        lost += not refused(reads, file)
    tally(f"corruptions of a {kind}", tried, lost)
