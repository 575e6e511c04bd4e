"""Two processes that train together: one is told to stop, one is stopped, one takes long, their launcher dies."""

import os
import signal

from minidistill import training
from tests.faults.programs import ended, launcher, main, slow_callback, start, stopped_on_its_way, two_ranks, until

TRAIN = ["train", "--data", "ring", "--steps", "100000", "--batch-size", "16", "--checkpoint-every", "20"]


def begun(state, child):
    return until(lambda: state.exists() and training.progress_of(state)["step"] >= 20, child)


def test_a_long_evaluation_on_process_0_does_not_end_the_run(tmp_path, tally):
    """The others wait for it in a barrier of its own, three times as long as they wait in any other exchange."""
    file = tmp_path / "run.safetensors"
    ranks = two_ranks(tmp_path, 60, slow_callback, file, 3.0, 1.0)
    codes = [ended(child, tmp_path / f"log{rank}") for rank, child in enumerate(ranks)]
    tally("evaluations beyond the time-out", 2, sum(code != 0 for code in codes))
    assert training.progress_of(file)["step"] == 12


def test_a_signal_to_one_process_ends_all_at_the_same_step(tmp_path, times, tally):
    tried, lost = times(1, 5), 0
    for number in range(tried):
        folder = tmp_path / str(number)
        folder.mkdir()
        state = folder / "run" / "training.safetensors"
        ranks = two_ranks(folder, 60, main, [*TRAIN, "--out", str(folder / "run")])
        assert begun(state, ranks[0]), (folder / "log0").read_text()
        os.kill(ranks[1].pid, signal.SIGTERM)
        codes = [ended(child, folder / f"log{rank}") for rank, child in enumerate(ranks)]
        step = training.progress_of(state)["step"]
        said = [(folder / f"log{rank}").read_text() for rank in range(2)]
        lost += codes != [143, 143] or not all(f"stopped at step {step} of 100000" in text for text in said)
    tally("SIGTERM of one of two processes", tried, lost)


def test_a_process_that_is_stopped_is_noticed(tmp_path, tally):
    """SIGSTOP, as a machine that hangs: the other ends after the time-out, which is the caller's to choose."""
    state = tmp_path / "run" / "training.safetensors"
    ranks = two_ranks(tmp_path, 3, main, [*TRAIN, "--out", str(tmp_path / "run")])
    try:
        assert begun(state, ranks[0]), (tmp_path / "log0").read_text()
        os.kill(ranks[1].pid, signal.SIGSTOP)
        code = ended(ranks[0], tmp_path / "log0")
    finally:
        ranks[1].kill()
        ranks[1].join()
    tally("SIGSTOP of one of two processes", 1, int(code == 0 or training.progress_of(state)["step"] % 20 != 0))


def test_a_process_that_is_stopped_on_its_way_to_the_others_is_noticed(tmp_path, tally):
    """The first does not wait for it as long as the others may wait for the first."""
    ranks = two_ranks(tmp_path, 2, stopped_on_its_way)
    try:
        code = ended(ranks[0], tmp_path / "log0")
    finally:
        ranks[1].kill()
        ranks[1].join()
    tally("SIGSTOP before a meeting", 1, int(code != 2 or "minidistill: " not in (tmp_path / "log0").read_text()))


def test_processes_do_not_outlive_their_launcher(tmp_path, times, tally):
    """They notice that it is gone, save and end; and the folder is free for the next."""
    tried, lost = times(1, 5), 0
    for number in range(tried):
        folder = tmp_path / str(number)
        folder.mkdir()
        state = folder / "run" / "training.safetensors"
        child = start(folder / "log", launcher, folder, 60, [*TRAIN, "--out", str(folder / "run")])
        assert begun(state, child), (folder / "log").read_text()
        child.kill()
        child.join()
        gone = until(lambda folder=folder: (folder / "ended0").exists() and (folder / "ended1").exists())
        codes = gone and [(folder / f"ended{rank}").read_text() for rank in range(2)]
        lost += codes != ["143", "143"] or list((folder / "run").iterdir()) != [state]
    tally("launchers killed", tried, lost)
