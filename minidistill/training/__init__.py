"""The one training loop, the files it writes, and how several processes share it.

    loop.py          `fit`: bar, callbacks, checkpoints, exact resume, time budgets
    optimizers.py    what one update does: gradients, clipping, rates, the average of the weights, `Speed`
    state.py         a run's state, saved and loaded to the bit
    fingerprint.py   checksums of what a run was given: a teacher, data, labels
    checkpoints.py   safetensors files, verified when read; models by name
    files.py         files written whole or not at all; one run a folder
    plain.py         numbers of NumPy and PyTorch as Python's own
    signals.py       Ctrl-C, SIGTERM, SIGHUP: finish the step, save, end
    parallel.py      several processes (DDP), started by torchrun; pools of workers
"""

from minidistill.training.fingerprint import fingerprint
from minidistill.training.loop import (
    AGREE_EVERY,
    PATIENCE,
    Callback,
    Update,
    bar_options,
    fit,
    mostly_skipped,
)
from minidistill.training.optimizers import (
    Speed,
    backward,
    descend,
    generator_on,
    optimizer_step,
    schedule,
    set_learning_rate,
    update_ema,
)
from minidistill.training.signals import Terminated
from minidistill.training.state import State, load_state, progress_of, save_state

__all__ = [
    "AGREE_EVERY", "PATIENCE", "Callback", "Speed", "State", "Terminated", "Update", "backward", "bar_options",
    "descend", "fingerprint", "fit", "generator_on", "load_state", "mostly_skipped", "optimizer_step", "progress_of",
    "save_state", "schedule", "set_learning_rate", "update_ema",
]
