"""Several processes at one file or folder."""

import pytest
import torch

from minidistill.training import checkpoints
from tests.faults.programs import ended, minidistill, read_often, start, until, write_often
from tests.faults.test_kills import COMMON


def test_several_writers_and_readers_of_one_file(tmp_path, times, tally):
    """Every writer ends well, every reader sees one of the contents whole, and nothing else is left in the folder."""
    file, seconds = tmp_path / "here" / "samples.safetensors", times(2, 20)
    checkpoints.write(file, {"x": torch.zeros(1000)}, {"kind": "samples"})
    logs = [tmp_path / f"log{i}" for i in range(7)]
    writers = [start(log, write_often, file, seconds, i) for i, log in enumerate(logs[:4])]
    readers = [start(log, read_often, file, seconds, tmp_path / f"{log.name}.count") for log in logs[4:]]
    codes = [ended(child, log) for child, log in zip([*writers, *readers], logs, strict=True)]
    assert codes == [0] * 7, "\n".join(log.read_text() for log in logs)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    tally("reads beside four writers", sum(int((tmp_path / f"{log.name}.count").read_text()) for log in logs[4:]))


@pytest.mark.parametrize("first", ["train", "cifar10"])
def test_of_two_runs_in_one_folder_the_second_is_refused(first, tmp_path, times, tally):
    """In one line, at once, and the first goes on to its end untouched."""
    out, log = tmp_path / "run", tmp_path / "log"
    commands = {"train": ["train", "--data", "ring", "--steps", "100000", *COMMON],
                "cifar10": ["cifar10", "--data", "digits", "--preset", "tiny", "--batch-size", "4", "--minutes", "9"]}
    child = minidistill(log, *commands[first], "--out", out)
    assert until((out / ".lock").exists, child), log.read_text()
    tried, lost = times(1, 5), 0
    for number in range(tried):
        second = tmp_path / f"second{number}"
        code = ended(minidistill(second, *commands["train"], "--out", out), second)
        lines = second.read_text().splitlines()
        lost += code != 2 or len(lines) != 1 or f"in use by another run: process {child.pid} on " not in lines[0]
    assert child.exitcode is None
    child.terminate()
    ended(child, log)
    tally(f"second runs beside {first}", tried, lost)
