"""`minidistill` as a script in which process 1 of several dies in the middle of step 12: see test_parallel.py."""

import os
import signal
import sys

from minidistill import training
from minidistill.cli import main

update_ema = training.update_ema


def die_at_step_12(*arguments):
    if os.environ.get("RANK") == "1" and arguments[-1] == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    update_ema(*arguments)


training.update_ema = die_at_step_12
sys.exit(main(sys.argv[1:]))
