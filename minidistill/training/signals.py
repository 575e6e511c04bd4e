"""Signals: the first one asks a run to finish its step, save and end; so a step is never cut in half."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Asked", "Terminated", "asked_to_stop", "interruption"]

#: Ctrl-C; what Slurm, Kubernetes, `timeout` and torchrun send before they kill; a terminal that was closed.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Terminated(SystemExit):
    """A run that ended, after it was saved, because of a signal other than Ctrl-C: the process exits with 128 + its
    number, as a shell tells it (143 for SIGTERM, 129 for SIGHUP)."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.code = 128 + number


def interruption(number: int, text: str) -> BaseException:
    """What a run that was asked to stop raises once it has stopped."""
    return KeyboardInterrupt(text) if number == signal.SIGINT else Terminated(text, number)


class Asked:
    """Which signal asked the run to stop: its number, 0 while there was none."""

    def __init__(self) -> None:
        self.number, self.since = 0, math.inf

    def handle(self, number: int, frame: object) -> None:
        """A second Ctrl-C raises as usual, unless it comes at once: then a launcher has passed on what the terminal had
        sent already. Other signals are never more urgent than the first: who sends them will kill if it must."""
        if self.number and number == signal.SIGINT and time.monotonic() > self.since + 1:
            raise KeyboardInterrupt
        self.number, self.since = self.number or number, min(self.since, time.monotonic())


@contextmanager
def asked_to_stop() -> Iterator[Asked]:
    """While active, signals are only noted down. In another thread than the main one there are none to note."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    # `nohup` has SIGHUP ignored, and that is to stay so.
    before = {each: signal.getsignal(each) or signal.SIG_DFL for each in SIGNALS}
    mine = [each for each in SIGNALS if each == signal.SIGINT or before[each] is not signal.SIG_IGN]
    for each in mine:
        signal.signal(each, asked.handle)
    try:
        yield asked
    finally:
        for each in mine:
            signal.signal(each, before[each])
