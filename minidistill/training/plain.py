"""Numbers of NumPy and PyTorch turned into Python's own, which a file's text can hold: where they come in, not where
they are written."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["number", "plain", "record"]


def number(name: str, value: Any) -> int | float | bool:
    """The number as one of Python's. TypeError, naming it, for anything but a number or a 0-d tensor or array."""
    single = isinstance(value, np.generic) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0)
    given = value.item() if single else value
    if isinstance(given, bool):
        return given
    if isinstance(given, Integral):
        return int(given)
    if isinstance(given, Real):
        return float(given)
    what = type(value).__name__
    what += f" of shape {tuple(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else ""
    raise TypeError(f"{name} is {what}; wanted a number (of Python or NumPy, or a 0-d tensor)")


def record(given: Any, source: str = "a callback") -> dict[str, Any]:
    """What a callback returned as names and plain numbers, {} for None. TypeError, naming the key, for other things."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"{source} returned {type(given).__name__}; wanted a dict of numbers, or None")
    for key in given:
        if not isinstance(key, str):
            raise TypeError(f"{source} returned the key {key!r}; wanted names")
    return {key: number(f"{key!r}, which {source} returned,", value) for key, value in given.items()}


def plain(name: str, value: Any) -> Any:
    """Dicts, lists, texts and numbers as JSON has them. TypeError, naming the entry, for anything else."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(f"{name}.{key}", each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(f"{name}[{i}]", each) for i, each in enumerate(value)]
    return number(name, value)
