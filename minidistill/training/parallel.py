"""Several processes, one device each, through PyTorch's own DistributedDataParallel (DDP).

`torchrun --nproc-per-node=N -m minidistill train ...` starts N processes; a plain run is a world of one, and every
function here then does nothing. Each process draws the random numbers of the whole batch and works on its own
share of it: so a batch, its loss and the generator's state do not depend on how many processes there are.

`workers` is for another kind of company: independent jobs that share the cores of one machine.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from minidistill import _validate

__all__ = [
    "TIMEOUT", "any_of", "largest", "last_only", "mean", "meet", "orphaned", "parts", "rank", "start", "stop", "total",
    "workers", "world", "wrap",
]

TIMEOUT = 180.0  # seconds that a process waits in an exchange for one that does not answer; see `start`
_waiting_room: Any = None  # a group of its own, with gloo, for `meet`
_launcher: int | None = None  # the process that started this one of several
_patience: float | None = None  # the time-out that `start` was given


def start(device: str | torch.device = "cpu", timeout: float | None = None) -> torch.device:
    """Join the other processes if torchrun started this one. Returns the device to work on: with NCCL the GPU of
    this process's LOCAL_RANK; on CPUs, with gloo, the CPU.

    timeout: seconds after which an exchange with a process that does not answer ends the run; None for the environment
    variable MINIDISTILL_TIMEOUT, else 180. Evaluations and saves on process 0 may take longer (`meet`).
    Raises ValueError if there are more processes than GPUs, and for a time-out that is no number > 0.
    """
    global _launcher, _patience
    device = torch.device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"--nproc-per-node: process {local} has no GPU; there are {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        _patience = _seconds(timeout)
        distributed.init_process_group(backend, timeout=timedelta(seconds=_patience))
        _launcher = os.getppid()
    meet()
    return device


def _seconds(timeout: float | None) -> float:
    if timeout is not None:
        _validate.positive("timeout", timeout)
        return timeout
    given = os.environ.get("MINIDISTILL_TIMEOUT", "")
    try:
        seconds = float(given or TIMEOUT)
        _validate.positive("MINIDISTILL_TIMEOUT", seconds)
    except ValueError as error:
        raise ValueError(f"MINIDISTILL_TIMEOUT={given!r}: wanted a number of seconds > 0") from error
    return seconds


def stop() -> None:
    """Leave the group, if there is one."""
    global _waiting_room, _launcher, _patience
    if distributed.is_initialized():
        distributed.destroy_process_group()
    _waiting_room = _launcher = _patience = None


def orphaned() -> bool:
    """Whether torchrun, which started this process, is gone: nobody would notice what becomes of it."""
    return _launcher is not None and os.getppid() != _launcher


def meet() -> None:
    """Wait until all processes are here: where process 0 alone evaluates or saves, the others would else give up
    waiting for it in their next exchange. So they wait for up to a day, and process 0, for which nobody does such
    work, no longer than in any exchange. Signals are noticed meanwhile."""
    global _waiting_room
    if world() == 1:
        return
    if _waiting_room is None:
        seconds = 86_400.0 if rank() else (_patience or _seconds(None))
        _waiting_room = distributed.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
    arrived = distributed.barrier(_waiting_room, async_op=True)
    pause = 1e-4
    while not arrived.is_completed():  # Python's handlers run between two pauses, and not inside of a wait
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    arrived.wait()


def world() -> int:
    """How many processes work together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0; number 0 alone writes files and shows bars."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def wrap(module: nn.Module) -> Any:
    """The module, its gradients averaged over processes when `backward` runs; dropout now differs between them."""
    if world() == 1:
        return module
    torch.manual_seed(torch.initial_seed() + rank())
    # Buffers are constants here (noise embeddings), so nothing has to be sent before each call.
    return DistributedDataParallel(module, broadcast_buffers=False)


def parts(batch_size: int, accumulate: int = 1) -> list[slice]:
    """This process's share of a batch, cut into `accumulate` pieces.

    Raises ValueError unless the batch divides evenly.
    """
    pieces = world() * accumulate
    if batch_size % pieces:
        raise ValueError(f"batch_size={batch_size}: wanted a multiple of {pieces} ({world()} processes x {accumulate} "
                         "accumulated parts)")
    size = batch_size // pieces
    first = rank() * accumulate
    return [slice((first + i) * size, (first + i + 1) * size) for i in range(accumulate)]


@contextmanager
def last_only(last: bool, *modules: Any) -> Iterator[None]:
    """Average gradients over processes only in the last of several accumulated backward passes."""
    with ExitStack() as stack:
        for module in modules:
            if not last and isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


def total(values: Tensor) -> Tensor:
    """The sum over processes, without gradient."""
    if world() == 1:
        return values
    values = values.detach().clone()
    distributed.all_reduce(values)
    return values


def mean(values: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """Means over processes of scalars with the same names everywhere."""
    both = torch.stack([torch.as_tensor(value, dtype=torch.float64).to(device) for value in values.values()])
    return dict(zip(values, (total(both) / world()).tolist(), strict=True))


def largest(values: list[float], device: torch.device) -> list[float]:
    """The largest of each number over processes."""
    if world() == 1:
        return values
    both = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(both, distributed.ReduceOp.MAX)
    return both.tolist()


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    return bool(largest([float(flag)], device)[0])


@contextmanager
def workers(
    n: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """A pool of n fresh processes (spawned) that do not outlive this one: they end when it dies, whatever the cause,
    and when the block is left by an error or Ctrl-C, without finishing what they are at."""
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(n, mp_context=context, initializer=_begin, initargs=(initializer, initargs))
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        raise


def _begin(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    """What a worker does first: have an eye on its parent."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        def follow() -> None:
            wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)
