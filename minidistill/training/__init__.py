"""The one training loop, the files it writes, and how several processes share it.

    loop.py          `fit`: bar, callbacks, checkpoints, exact resume, Ctrl-C, time budgets
    optimizers.py    what one update does: gradients, clipping, rates, the average of the weights, `Speed`
    state.py         a run's state, saved and loaded to the bit
    checkpoints.py   safetensors files, written atomically and verified when read; models by name
    parallel.py      several processes (DDP), started by torchrun
"""

from minidistill.training.loop import AGREE_EVERY, PATIENCE, Callback, Update, bar_options, fit
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
from minidistill.training.state import State, load_state, progress_of, save_state

__all__ = [
    "AGREE_EVERY", "PATIENCE", "Callback", "Speed", "State", "Update", "backward", "bar_options", "descend", "fit",
    "generator_on", "load_state", "optimizer_step", "progress_of", "save_state", "schedule", "set_learning_rate",
    "update_ema",
]
