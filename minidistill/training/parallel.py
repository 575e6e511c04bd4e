"""Several processes, one device each, through PyTorch's own DistributedDataParallel (DDP).

`torchrun --nproc-per-node=N -m minidistill train ...` starts N processes; a plain run is a world of one, and every
function here then does nothing. Each process draws the random numbers of the whole batch and works on its own
share of it: so a batch, its loss and the generator's state do not depend on how many processes there are.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "any_of", "last_only", "mean", "parts", "rank", "start", "stop", "total", "world", "wrap",
]


def start(device: str | torch.device = "cpu") -> torch.device:
    """Join the other processes if torchrun started this one. Returns the device to work on: with NCCL the GPU of
    this process's LOCAL_RANK; on CPUs, with gloo, the CPU.

    Raises ValueError if there are more processes than GPUs.
    """
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
        # A process that waits for a dead one gives up after this long, if the launcher has not ended it before.
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return device


def stop() -> None:
    """Leave the group, if there is one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


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


def last_only(module: Any, last: bool) -> AbstractContextManager[Any]:
    """Average gradients over processes only in the last of several accumulated backward passes."""
    return nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync()


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


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    return flag if world() == 1 else bool(total(torch.tensor(float(flag), device=device)) > 0)
