"""Files that several processes may write and read at once: whole or not at all, and one run a folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minidistill import _validate

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and what a killed writer left is not cleaned up
    fcntl = None  # type: ignore[assignment]

__all__ = ["atomic", "hold", "writable"]

_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_held: set[int] = set()  # descriptors of this process's locks


def writable(path: str | Path) -> Path:
    """The path, its folder made; OSError now if a file can't be written there, not after an hour's training."""
    path = _validate.path("path", path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; wanted a file's name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass
    return path


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A new, empty file beside `path`, moved onto it when the block ends well and removed when it does not: readers
    see the old file or the new one, never a part, however many write at once. What is there after the block outlives a
    power cut. Files that killed writers left half done are removed."""
    path = _validate.path("path", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean(path)
    partial, descriptor = _partial(path)
    try:
        yield partial
        os.fsync(descriptor)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        os.close(descriptor)  # and with it the lock that tells others that this file is being written
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> tuple[Path, int]:
    """A name that nobody has, opened for this process alone (never through a link), and locked."""
    while True:
        partial = path.with_name(f".partial-{secrets.token_hex(4)}-{path.name}")
        try:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666)
        except FileExistsError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            _lock(descriptor, wait=True)
        if _is(partial, descriptor):  # else it was taken for a dead writer's in the instant before it was locked
            return partial, descriptor
        os.close(descriptor)


def _clean(path: Path) -> None:
    """Remove what dead writers of this very file left: names that `_partial` gives and that nobody has locked."""
    if fcntl is None:
        return
    name = re.compile(r"\.partial-[0-9a-f]{8}-" + re.escape(path.name))
    for entry in os.scandir(path.parent):
        if not name.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
            continue
        with contextlib.suppress(OSError):  # somebody else's, or gone already
            descriptor = os.open(entry.path, os.O_RDWR | _NO_LINK)
            try:
                if _lock(descriptor):
                    os.unlink(entry.path)
            finally:
                os.close(descriptor)


def _sync(folder: Path) -> None:
    """Make a renaming in the folder outlive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def hold(folder: str | Path, name: str = "") -> Iterator[None]:
    """While active, the folder (or the file of that name in it) is this run's alone. However the process ends, the
    system lets it go; the file ".lock" that says who has it is removed when the block ends.

    Raises BlockingIOError, in one line that names the other, if another run has it; OSError if the folder can't be
    written.
    """
    folder = _validate.path("folder", folder)
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / (f".lock-{name}" if name else ".lock")
    descriptor = _acquire(lock, folder / name)
    _held.add(descriptor)
    me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock alone will do
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(me).encode())
        yield
    finally:
        if descriptor in _held:  # not in a fork of the process
            _held.discard(descriptor)
            lock.unlink(missing_ok=True)  # while it is locked: whoever waits for it sees that it is gone
            os.close(descriptor)
            if fresh:
                with contextlib.suppress(OSError):  # something is in it
                    folder.rmdir()


def _acquire(lock: Path, what: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
        try:
            mine = _lock(descriptor)
        except OSError as error:
            warnings.warn(f"{what}: no locks there ({error}), so a second run would not be noticed", stacklevel=4)
            return descriptor
        if not mine:
            said = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            raise BlockingIOError(f"{what} is in use by another run: {_holder(said)}; wanted another place, or to wait")
        if _is(lock, descriptor):
            return descriptor
        os.close(descriptor)  # its holder has just removed it


def _holder(said: str) -> str:
    try:
        who = json.loads(said)
        return f"process {who['pid']} on {who['host']}, since {who['since']}"
    except (ValueError, TypeError, KeyError):  # it has not written that yet
        return "a process that has just begun"


def _lock(descriptor: int, wait: bool = False) -> bool:
    """Whether the open file is now locked by this process; not if another has it. OSError where nothing has locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _is(path: Path, descriptor: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """In a fork: a copy of a lock would outlive the process that has it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
