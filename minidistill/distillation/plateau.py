"""An early end to a run whose student no longer gets better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minidistill import _validate, training
from minidistill.training import parallel

__all__ = ["Plateau", "Record", "check_patience", "run_to_end", "stale", "stop_on_plateau"]

Record = dict[str, float]


class Plateau(Exception):
    """Raised to leave the training loop; holds the last record, which the loop did not get to write."""

    def __init__(self, record: Record) -> None:
        super().__init__("no improvement")
        self.record = record


def check_patience(patience: int | None, monitor: str | None, evaluates: bool) -> None:
    """Raise ValueError unless there is something to watch, in one process."""
    if patience is None:
        if monitor is not None:
            raise ValueError(f"monitor={monitor!r}: wanted patience too, the evaluations to wait for a better number")
        return
    _validate.whole("patience", patience)
    if not evaluates:
        raise ValueError(f"patience={patience}: wanted evaluate (or inspect) too, whose numbers are watched")
    if parallel.world() > 1:
        raise ValueError(f"patience={patience}: wanted one process; of several only the first evaluates")


def stale(values: Sequence[float], patience: int) -> bool:
    """Whether none of the last `patience` values was below all before it. NaN never is."""
    best, since = float("inf"), 0
    for value in values:
        best, since = (value, 0) if value < best else (best, since + 1)
    return since >= patience


def stop_on_plateau(
    callbacks: Sequence[training.Callback], patience: int, monitor: str | None, losses: Callable[[], Record]
) -> training.Callback:
    """One callback that calls them all and raises `Plateau` once the number named `monitor` (None: the first of all)
    was not below its best for `patience` evaluations. What came before is read off the run's history, so that a
    resumed run remembers. `losses` tells the step's, for the last record."""

    def call(state: training.State) -> Record:
        record: Record = {}
        for callback in callbacks:
            record |= callback(state) or {}
        name = next(iter(record), None) if monitor is None else monitor
        if name not in record:
            raise ValueError(f"monitor={monitor!r}: wanted one of evaluate's numbers: {', '.join(record) or 'none'}")
        seen = [past[name] for past in state.history if name in past]
        if stale([*seen, record[name]], patience):
            raise Plateau(losses() | record | {"plateau": 1.0})
        return record

    return call


def run_to_end(state: training.State, update: training.Update, steps: int, *, batch_size: int, **options: Any) -> None:
    """`training.fit`, with a `Plateau` taken for its end: recorded in the history and saved like any other. A run that
    ended so stays ended when it is resumed."""
    checkpoint = options.get("checkpoint")
    if checkpoint is not None and options.get("resume"):
        history = training.progress_of(checkpoint)["history"]
        if history and "plateau" in history[-1]:
            training.load_state(checkpoint, state)
            return
    try:
        training.fit(state, update, steps, batch_size=batch_size, **options)
    except Plateau as end:
        state.history.append({"step": state.step, "images": state.step * batch_size, **end.record})
        if checkpoint is not None:
            training.save_state(checkpoint, state)
