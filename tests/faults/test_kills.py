"""SIGKILL at random moments: what is on the disk is whole, and a run that is resumed ends as if nothing had been."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from minidistill import training
from minidistill.studies import sweep
from minidistill.training import checkpoints, files
from tests.faults.programs import alive, ended, hold_forever, minidistill, start, until, with_workers

COMMON = ["--batch-size", "16", "--checkpoint-every", "7", "--log-every", "10"]
PROGRAMS = {
    "train": ("teacher", ["train", "--data", "ring", "--steps", "1500", *COMMON]),
    "distill": ("student", ["distill", "--teacher", "ring", "--objective", "sim", "--steps", "500", *COMMON]),
}


def kill_at_random(start_, rng, span, check, saved=None):
    """Whether the program was still running when it was killed; afterwards everything it left is looked at. With a file
    it is given that until it has written it anew: fast machines are done before a fixed moment, slow ones not begun."""
    def written():
        return saved.stat().st_mtime_ns if saved and saved.exists() else 0

    before, child = written(), start_()
    while saved and child.exitcode is None and written() == before:
        time.sleep(0.002)
    child.join(rng.uniform(*span))
    running = child.exitcode is None
    child.kill()
    child.join()
    check()
    return running


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_killed_again_and_again_ends_with_the_same_files(name, tmp_path, times, tally):
    model, command = PROGRAMS[name]
    command = [*command, *times(["--steps", "150"], [])]
    whole, out, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    assert ended(minidistill(log, *command, "--out", whole), log) == 0
    rng, state, kills = random.Random(0), out / "training.safetensors", 0

    def check():
        if state.exists():
            step = training.progress_of(state)["step"]
            assert step % 7 == 0 or step in (150, 500, 1500)
            checkpoints.read(state, "training")

    for _ in range(times(3, 20)):
        again = lambda: minidistill(log, *command, "--out", out, "--resume")  # noqa: E731
        kills += kill_at_random(again, rng, (0.0, times(0.05, 0.2)), check, saved=state)
    assert ended(minidistill(log, *command, "--out", out, "--resume"), log) == 0, log.read_text()
    different = [path.name for path in whole.iterdir() if path.read_bytes() != (out / path.name).read_bytes()]
    different += [path.name for path in out.iterdir() if not (whole / path.name).exists()]
    assert {path.name for path in whole.iterdir()} == {f"{model}.safetensors", "training.safetensors", "history.json"}
    tally(f"SIGKILL of {name}", kills, len(different))


def test_kills_of_the_run_book(tmp_path, only_long, tally):
    out, log, rng, kills = tmp_path / "book", tmp_path / "log", random.Random(1), 0
    command = ["cifar10", "--preset", "tiny", "--data", "digits", "--batch-size", "4", "--n", "8", "--minutes", "0.12",
               "--checkpoint-images", "40", "--reserve", "0.06", "--out", out]

    def check():
        if (out / "results.json").exists():
            assert json.loads((out / "results.json").read_text())
        for path in out.rglob("[!.]*.safetensors"):  # a lock outlives who held it, as a file
            checkpoints.read(path)

    for _ in range(20):
        kills += kill_at_random(lambda: minidistill(log, *command), rng, (0.2, 7.0), check)
    before = training.progress_of(out / "state" / "teacher.safetensors")["step"]
    assert ended(minidistill(log, *command), log) == 0, log.read_text()
    lost = training.progress_of(out / "state" / "teacher.safetensors")["step"] <= before
    tally("SIGKILL of cifar10", kills, int(lost))


def test_kills_of_the_sweep(tmp_path, only_long, tally):
    out, log, rng, kills = tmp_path / "sweep", tmp_path / "log", random.Random(2), 0
    command = ["sweep", "--studies", "alpha", "--seeds", "2", "--at-most", "2", "--out", out]
    seen = []

    def check():
        if not (out / "results.json").exists():
            return
        rows = [(row["study"], row["name"], row["seed"]) for row in sweep.read(out).rows]
        assert len(rows) == len(set(rows)) >= len(seen)
        seen[:] = rows

    for _ in range(20):
        kills += kill_at_random(lambda: minidistill(log, *command), rng, (0.2, 25.0), check)
    assert ended(minidistill(log, *command), log) == 0, log.read_text()
    check()
    tally("SIGKILL of sweep", kills, 2 * len(sweep.STUDIES["alpha"]) - len(seen))


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_quickstart_ends_with_all_its_workers(name, tmp_path, only_long, tally):
    """Ended by a signal to its process alone, whenever it comes."""
    rng, tried, left = random.Random(3), 20 if name == "SIGKILL" else 5, 0
    for _ in range(tried):
        command = [sys.executable, "-m", "minidistill", "quickstart", "--only", "ring", "--out", str(tmp_path / "q")]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(rng.uniform(4, 20))
        family = children(child.pid)
        child.send_signal(getattr(signal, name))
        code = child.wait(60)
        assert code == (-signal.SIGKILL if name == "SIGKILL" else 130)
        left += not until(lambda family=family: not any(alive(pid) for pid in family))
    tally(f"{name} of quickstart", tried, left)


def children(pid):
    """The process ids of a process's children."""
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_workers_end_with_who_started_them(name, tmp_path, tally):
    """Killed, or interrupted while they are at jobs of a minute."""
    out, log = tmp_path / "pids", tmp_path / "log"
    child = start(log, with_workers, out)
    assert until(out.exists, child), log.read_text()
    pids = [int(word) for word in out.read_text().split()]
    assert len(pids) == 2
    os.kill(child.pid, getattr(signal, name))
    code = ended(child, log)
    assert code == -signal.SIGKILL if name == "SIGKILL" else code != 0
    tally(f"workers after {name} of their parent", 2, 0 if until(lambda: not any(map(alive, pids))) else 2)


def test_a_lock_ends_with_its_process_and_not_with_a_fork_of_it(tmp_path, times, tally):
    lost, tried = 0, times(2, 20)
    for number in range(tried):
        folder, log = tmp_path / str(number), tmp_path / "log"
        folder.mkdir()
        child = start(log, hold_forever, folder)
        assert until((folder / "held").exists, child), log.read_text()
        with pytest.raises(BlockingIOError, match=f"process {child.pid} on "), files.hold(folder):
            pass
        child.kill()
        child.join()
        try:
            with files.hold(folder):
                pass
        except BlockingIOError:
            lost += 1
    tally("lock after SIGKILL of its holder", tried, lost)
