"""The one training loop: progress bar, callbacks, checkpoints, exact resume, Ctrl-C, time budgets.

A run is a `State`; what one step does is a function `update(state) -> losses`, written by whoever trains it
(`teachers/learned.py`, `distillation/loop.py`). `fit` repeats it and looks after everything else.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from minidistill import _validate
from minidistill.training import checkpoints, parallel
from minidistill.training.state import State, load_state, save_state

__all__ = ["AGREE_EVERY", "PATIENCE", "Callback", "Update", "bar_options", "fit"]

#: Extra arguments of every progress bar; a worker process puts its own line here.
bar_options: dict[str, Any] = {}

PATIENCE = 20  # so many skipped updates in a row end the run

AGREE_EVERY = 5  # several processes ask each other this often whether one of them was told to stop

Update = Callable[[State], dict[str, Tensor]]

Callback = Callable[[State], "dict[str, float] | None"]


def fit(
    state: State,
    update: Update,
    steps: int,
    *,
    batch_size: int | None = None,
    minutes: float | None = None,
    progress: bool = True,
    description: str = "training",
    log_every: int = 50,
    callbacks: Sequence[Callback] = (),
    callback_every: int = 500,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
) -> State:
    """Call `update(state)` until `state.step == steps`, or until `minutes` have passed.

    Losses are logged to `state.history` every `log_every` steps; each callback is called every `callback_every`
    steps and at the end, and what it returns is added to the history too. With `batch_size`, records and bar also count
    the samples seen. With `checkpoint`, the whole state is written there every `checkpoint_every` steps, at the
    end and on Ctrl-C (which lets the step finish, saves, and then raises KeyboardInterrupt); with `resume`, it is read
    back first if the file is there. Of several processes (`parallel.py`) only number 0 writes and calls callbacks.

    An entry "skipped" of what `update` returns (as `optimizer_step`'s) says whether the step was left out.

    Raises:
        ValueError: bad counts, or a checkpoint that is corrupt or of another run.
        FloatingPointError: a loss became NaN or infinite and was not skipped, or 20 steps in a row were; the last
            checkpoint stays as it was.
    """
    for name, value in (("steps", steps), ("log_every", log_every), ("callback_every", callback_every),
                        ("checkpoint_every", checkpoint_every)):
        _validate.whole(name, value, least=0 if name == "steps" else 1)
    if minutes is not None:
        _validate.positive("minutes", minutes)
    deadline = time.monotonic() + 60 * (minutes if minutes is not None else math.inf)
    device, main = state.rng.device, parallel.rank() == 0
    path = None if checkpoint is None else checkpoints.writable(checkpoint)
    if path is not None and resume and path.exists():
        load_state(path, state)
    size = batch_size or 1
    bar = tqdm(
        total=steps * size, initial=state.step * size, disable=not progress or not main, desc=description,
        **({"unit": "sample", "unit_scale": True} if batch_size else {}), **bar_options,
    )
    skipped, in_a_row = torch.zeros((), device=device), torch.zeros((), device=device)
    with bar, _sigint() as stopped:
        while state.step < steps:
            losses = update(state)
            state.step += 1
            bar.update(size)
            bad = losses.pop("skipped", torch.zeros((), device=device))  # added up on the device: no waiting for it
            skipped, in_a_row = skipped + bad, (in_a_row + bad) * bad
            last, stopping, over = state.step == steps, stopped.is_set(), time.monotonic() > deadline
            if parallel.world() > 1:  # all must leave the loop at the same step
                agree = state.step % AGREE_EVERY == 0
                stopping, over = (agree and parallel.any_of(flag, device) for flag in (stopping, over))
            last = last or over
            record: dict[str, float] = {}
            saving = path is not None and (state.step % checkpoint_every == 0 or last or stopping)
            if state.step % log_every == 0 or last or saving or stopping:  # a state with NaNs is never saved
                record = parallel.mean(losses | {"skipped": skipped}, device)
                record = _checked(record, state, int(in_a_row))
                skipped = torch.zeros_like(skipped)
            if main and (state.step % callback_every == 0 or last):
                for callback in callbacks:
                    record |= callback(state) or {}
            if record:
                seen = {"images": state.step * batch_size} if batch_size else {}
                state.history.append({"step": state.step, **seen, **record})
                bar.set_postfix({name: f"{value:.3g}" for name, value in record.items()})
            if path is not None and saving and main:
                save_state(path, state)
            if stopping or (state.step == steps and stopped.is_set()):
                saved = f"; saved in {path}" if path else ""
                raise KeyboardInterrupt(f"stopped at step {state.step} of {steps}{saved}")
            if over:
                break
    return state


def _checked(record: dict[str, float], state: State, in_a_row: int) -> dict[str, float]:
    """The record without what is not finite, which is tolerated only while updates are skipped now and then."""
    new = round(record.pop("skipped"))
    state.skipped += new
    bad = [name for name, value in record.items() if not math.isfinite(value)]
    if (bad and not in_a_row) or in_a_row >= min(PATIENCE, state.step):
        what = ", ".join(bad) or "the gradient"
        length = f" ({in_a_row} updates in a row were skipped)" if in_a_row else ""
        raise FloatingPointError(f"{what} is not finite at step {state.step}{length}; try a lower learning rate")
    kept = {name: value for name, value in record.items() if name not in bad}
    return kept | ({"skipped": float(state.skipped)} if state.skipped else {})


@contextmanager
def _sigint() -> Iterator[threading.Event]:
    """While active, the first Ctrl-C only sets the event, so that a step is never cut in half; a second one raises as
    usual, unless it comes at once: then a launcher has passed on what the terminal had sent already."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield stopped
        return
    before, first = signal.getsignal(signal.SIGINT), math.inf

    def handle(signum: int, frame: object) -> None:
        nonlocal first
        if stopped.is_set() and time.monotonic() > first + 1:
            raise KeyboardInterrupt
        first = min(first, time.monotonic())
        stopped.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)

