"""The one training loop: progress bar, callbacks, checkpoints, exact resume, signals, time budgets.

A run is a `State`; what one step does is a function `update(state) -> losses`, written by whoever trains it
(`teachers/learned.py`, `distillation/loop.py`). `fit` repeats it and looks after everything else.
"""

from __future__ import annotations

import math
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from minidistill import _validate
from minidistill.training import checkpoints, files, parallel, plain, signals
from minidistill.training.state import State, check_state, load_state, save_state

__all__ = [
    "AGREE_EVERY", "AGREE_SECONDS", "PATIENCE", "Callback", "Update", "bar_options", "fit", "mostly_skipped",
]

#: Extra arguments of every progress bar; a worker process puts its own line here.
bar_options: dict[str, Any] = {}

PATIENCE = 20  # so many skipped updates in a row end the run

#: Several processes ask each other whether one of them was told to stop, at the latest after so many steps, and sooner
#: where steps are slow: a launcher that has been told to stop kills after 30 seconds.
AGREE_EVERY, AGREE_SECONDS = 5, 2.0

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
    steps and at the end, and the numbers it returns join the history as plain ones. With `batch_size`, records and bar
    also count the samples seen. With `checkpoint`, the whole state is written there every `checkpoint_every` steps, at
    the end and when a signal (Ctrl-C, SIGTERM, SIGHUP) asks the run to stop: it finishes the step, saves, and raises
    KeyboardInterrupt or `Terminated`. With `resume`, it is read back first if the file is there, which is this run's
    alone until `fit` returns. Of several processes (`parallel.py`) only number 0 writes and calls callbacks, however
    long that takes. A save that fails is warned of, and the run goes on; likewise an OSError of a callback, which is
    raised only at the end, once the state is saved.

    An entry "skipped" of what `update` returns (as `optimizer_step`'s) says whether the step was left out. A state is
    not saved while they are, nor with a NaN or an infinity in it: the last good file stays.

    `random` and NumPy's global generator are seeded from `state.rng` while the run lasts, and then put back.

    Raises:
        ValueError: bad counts, or a checkpoint that is corrupt or of another run.
        TypeError: a callback returned something else than numbers, or the config holds something else.
        BlockingIOError: another run writes that checkpoint.
        FloatingPointError: a loss became NaN or infinite and was not skipped, or 20 steps in a row were, or the last
            two; or weights are no longer finite.
    """
    for name, value in (("steps", steps), ("log_every", log_every), ("callback_every", callback_every),
                        ("checkpoint_every", checkpoint_every)):
        _validate.whole(name, value, least=0 if name == "steps" else 1)
    if minutes is not None:
        _validate.positive("minutes", minutes)
    main = parallel.rank() == 0
    path = None if checkpoint is None else checkpoints.writable(checkpoint)
    with ExitStack() as stack:
        if path is not None:
            plain.plain("config", state.config)  # what can't be written is better known now
            if main:
                stack.enter_context(files.hold(path.parent, path.name))
        parallel.meet()
        stack.enter_context(_seeded(state.rng.initial_seed()))
        if path is not None and resume and path.exists():
            load_state(path, state)
        bar = stack.enter_context(_bar(state, steps, batch_size, description, shown=progress and main))
        ending = _Ending(stack.enter_context(signals.asked_to_stop()), minutes, state)
        health = _Health(state.rng.device)
        while state.step < steps:
            losses = update(state)
            state.step += 1
            bar.update(batch_size or 1)
            health.add(losses.pop("skipped", None))
            asked, over = ending.now(state.step, last=state.step == steps)
            last = over or state.step == steps
            saving = path is not None and bool(last or asked or state.step % checkpoint_every == 0)
            calling = bool(callbacks) and (last or state.step % callback_every == 0)
            record: dict[str, float] = {}
            if saving or last or asked or state.step % log_every == 0:
                record = health.look(losses, state, ends=last and not asked)
            if saving or last:
                check_state(state)
            called, failed = _call(callbacks if calling and main else (), state)
            if record := record | called:
                seen = {"images": state.step * batch_size} if batch_size else {}
                state.history.append({"step": state.step, **seen, **record})
                bar.set_postfix({name: f"{value:.3g}" for name, value in record.items()})
            outcome = _save(path, state, health, bool(last or asked)) if path is not None and saving and main else ""
            if failed is not None and last:  # now that the state is safe
                raise failed
            if calling or saving:
                parallel.meet()  # the others wait for number 0, which may take long
            if asked:
                raise signals.interruption(asked, f"stopped at step {state.step} of {steps}{outcome}")
            if over:
                break
    if main and (problem := mostly_skipped(state.step, state.skipped)):
        warnings.warn(problem, stacklevel=2)
    return state


def _bar(state: State, steps: int, batch_size: int | None, description: str, shown: bool) -> tqdm[Any]:
    size = batch_size or 1
    unit: dict[str, Any] = {"unit": "sample", "unit_scale": True} if batch_size else {}
    return tqdm(total=steps * size, initial=state.step * size, disable=not shown, desc=description, **unit,
                **bar_options)


def _call(callbacks: Sequence[Callback], state: State) -> tuple[dict[str, Any], OSError | None]:
    """(the numbers that callbacks return, what kept one of them from writing a file). A full disk does not end a run:
    its callbacks are called again."""
    record: dict[str, Any] = {}
    failed = None
    for callback in callbacks:
        try:
            record |= plain.record(callback(state))
        except OSError as error:
            failed = error
            warnings.warn(f"a callback failed at step {state.step} ({error}); the run goes on", stacklevel=3)
    return record, failed


def mostly_skipped(step: int, skipped: int) -> str:
    """What is wrong with a run of which most updates were skipped; "" for others."""
    wrong = "updates were skipped, since their gradients were not finite; what came of it is not to be trusted"
    return f"{skipped} of {step} {wrong}" if 2 * skipped > step else ""


def _save(path: Path, state: State, health: _Health, ends: bool) -> str:
    """Save if the state is to be trusted and the disk lets us. Returns what became of it, to follow a message."""
    if health.in_a_row and not (ends and health.good):
        return f"; not saved, since its last {health.in_a_row} updates were skipped: {path} is as it was before"
    try:
        save_state(path, state)
    except OSError as error:
        then = "it is as it was before" if ends else "the run goes on, and tries again at its next checkpoint"
        warnings.warn(f"{path} could not be written at step {state.step} ({error.strerror or error}); {then}",
                      stacklevel=3)
        return f"; not saved: {path} could not be written ({error.strerror or error})"
    return f"; saved in {path}"


class _Ending:
    """Whether a run ends before its last step: asked to by a signal or a launcher's death, or its minutes are over.

    Of several processes all must leave at the same step. So they ask each other, and agree when to ask again.
    """

    def __init__(self, asked: signals.Asked, minutes: float | None, state: State) -> None:
        self.asked, self.device = asked, state.rng.device
        self.step, self.since = state.step, time.monotonic()  # of the last agreement
        self.deadline = self.since + 60 * (minutes if minutes is not None else math.inf)
        self.next = state.step + 1

    def now(self, step: int, last: bool) -> tuple[int, bool]:
        """(the number of the signal that asks for an end, or 0; whether the minutes are over)."""
        clock = time.monotonic()
        number = self.asked.number or (int(signal.SIGTERM) if parallel.orphaned() else 0)
        if parallel.world() == 1:
            return number, clock > self.deadline
        if step < self.next and not last:
            return 0, False
        each = (clock - self.since) / (step - self.step)
        first, over, slowest = parallel.largest([number, clock > self.deadline, each], self.device)
        self.next = step + min(AGREE_EVERY, max(1, int(AGREE_SECONDS / max(slowest, 1e-9))))
        self.step, self.since = step, clock
        return int(first), bool(over)


class _Health:
    """Which updates were skipped: counted on the device, so that nobody waits for it until it is asked for.

    `in_a_row`: how many were, up to the last one. `good`: whether the state may be kept, since the last update was made
    or, if that one alone was skipped, since its loss was finite.
    """

    def __init__(self, device: torch.device) -> None:
        self.none = torch.zeros((), device=device)
        self.new, self.streak = self.none, self.none
        self.in_a_row, self.good = 0, True

    def add(self, skipped: Tensor | None) -> None:
        bad = self.none if skipped is None else skipped
        self.new, self.streak = self.new + bad, (self.streak + bad) * bad

    def look(self, losses: dict[str, Tensor], state: State, ends: bool) -> dict[str, float]:
        """The losses' means over processes without what is not finite, which is tolerated only while updates are
        skipped now and then; FloatingPointError otherwise."""
        record = parallel.mean(losses | {"skipped": self.new}, state.rng.device)
        state.skipped += round(record.pop("skipped"))
        self.new, self.in_a_row = self.none, int(self.streak)
        bad = [name for name, value in record.items() if not math.isfinite(value)]
        self.good = not self.in_a_row or (self.in_a_row == 1 and not bad)
        if (bad and not self.in_a_row) or self.in_a_row >= min(PATIENCE, state.step) or (ends and not self.good):
            what = ", ".join(bad) or "the gradient"
            length = f" ({self.in_a_row} updates in a row were skipped)" if self.in_a_row else ""
            raise FloatingPointError(f"{what} is not finite at step {state.step}{length}; try a lower learning rate")
        kept = {name: value for name, value in record.items() if name not in bad}
        return kept | ({"skipped": float(state.skipped)} if state.skipped else {})


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The generators of `random` and NumPy, which a state holds too: seeded, so that equal runs leave equal files, and
    then put back."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
