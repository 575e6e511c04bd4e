"""Signals at random moments: the step is finished, the state saved, the exit code a shell's, nothing lost."""

import os
import random
import signal

import pytest

from minidistill import training
from tests.faults.programs import ended, minidistill, until
from tests.faults.test_kills import COMMON

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.mark.parametrize("name", CODES)
def test_a_signal_costs_no_step(name, tmp_path, times, tally):
    """What it says on the way out is what the file holds: no periodic save is needed for that."""
    out, log, rng, lost, tried = tmp_path / "run", tmp_path / "log", random.Random(0), 0, times(2, 20)
    command = ["train", "--data", "ring", "--steps", "100000", *COMMON, "--checkpoint-every", "100000", "--out", out]
    state = out / "training.safetensors"
    for number in range(tried):
        log.write_text("")
        child = minidistill(log, *command, "--resume")
        assert until(lambda: " step" in log.read_text() or "sample/s" in log.read_text(), child), log.read_text()
        child.join(rng.uniform(0.3, 1.0))
        os.kill(child.pid, getattr(signal, name))
        code, said = ended(child, log), log.read_text()
        saved = f"stopped at step {training.progress_of(state)['step']} of 100000; saved in {state}"
        lost += code != CODES[name] or saved not in said
        assert list(out.iterdir()) == [state], number
    tally(f"{name} of train", tried, lost)
