"""Checksums of what a run was given (a teacher, data, labels), so that it is not resumed with something else."""

from __future__ import annotations

import dataclasses
import types
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fingerprint"]

#: What every module has, and what compiling it adds, besides what its class gives it.
_OWN = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}


def fingerprint(given: Any) -> str | None:
    """Eight hexadecimal digits of a tensor, a module, an exact mixture, a closed form, a guided teacher: of its
    class, its weights (names, types, shapes, bytes) and its numbers, wherever they are. None for None.

    Of a function the values that it closes over count, not its code. A CRC-32: it tells mistakes, not forgeries.
    """
    if given is None:
        return None
    total = 0
    for piece in _pieces(given, {}):
        total = zlib.crc32(piece, total)
    return f"{total:08x}"


def _pieces(given: Any, seen: dict[int, Any]) -> Iterator[bytes | memoryview]:
    """Bytes that differ where two things differ. `seen` has what was passed already, by its id (and so kept alive, with
    an id of its own): nothing is visited twice, and a thing may hold itself."""
    if isinstance(given, (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size)):
        yield f"{type(given).__name__} {given!r};".encode()
        return
    yield f"{type(given).__qualname__};".encode()
    if id(given) in seen:
        return
    seen[id(given)] = given
    if isinstance(given, Tensor):
        yield f"{given.dtype} {tuple(given.shape)};".encode()
        yield given.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        return
    for name, part in _parts(given):
        yield f"{name}:".encode()
        yield from _pieces(part, seen)


def _parts(given: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(given, Mapping):
        yield from ((str(key), value) for key, value in given.items())
    elif isinstance(given, (list, tuple)):
        yield from ((str(i), value) for i, value in enumerate(given))
    elif isinstance(given, nn.Module):
        yield from given.state_dict().items()
        yield from _settings(given)
    elif isinstance(given, types.FunctionType):
        yield "name", given.__qualname__
        yield from ((str(i), cell.cell_contents) for i, cell in enumerate(given.__closure__ or ()))
    elif isinstance(given, types.MethodType):
        yield "name", given.__func__.__qualname__
        yield "self", given.__self__
    elif dataclasses.is_dataclass(given) and not isinstance(given, type):
        yield from ((field.name, getattr(given, field.name)) for field in dataclasses.fields(given))
    else:
        yield from sorted(getattr(given, "__dict__", {}).items())


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What classes other than torch's keep beside their weights: sigma_data, a list that hides another module, ...,
    but not how fast they compute."""
    for name, each in module.named_modules():
        if not type(each).__module__.startswith("torch."):
            rest = {key: value for key, value in vars(each).items() if key not in _OWN | {"autocast"}}
            yield from ((f"{name}.{key}", value) for key, value in sorted(rest.items()))
