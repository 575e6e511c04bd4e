"""Checks on arguments: each raises one exception that names the argument, what was given and what is wanted.

Numbers come back as Python's own: NumPy's scalars and tensors without dimensions are numbers too.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "T", "any_of", "broadcast_sigma", "choose", "closest", "denoised", "device", "finite", "fits", "floats",
    "generator", "labels", "like", "number", "pair", "path", "positive", "precise", "samples", "seed", "shape",
    "tensor", "whole",
]

T = TypeVar("T")


def closest(name: str, value: object, options: Iterable[str]) -> str:
    """The text of an "unknown name" error: what was given, the nearest valid name, and all of them."""
    valid = sorted(options)
    near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{name}={value!r} is not known{hint} Valid names: {', '.join(valid)}"


def choose(name: str, value: str, options: dict[str, T]) -> T:
    """`options[value]`, or a ValueError with the nearest name."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(closest(name, value, options))
    return options[value]


# ------------------------------------------------- names and numbers

def path(name: str, value: Any) -> Path:
    """The path, with the home folder for a ~ at its beginning; TypeError for what is no path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} is {type(value).__name__}; wanted a path, such as 'runs/teacher.safetensors'")
    return Path(os.path.expanduser(value))


def number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, between: bool = False
) -> float:
    """The value; ValueError unless it is a finite number from low to high (with both ends excluded if `between`)."""
    plain = _plain(value)
    if isinstance(plain, numbers.Real) and math.isfinite(plain):
        real = plain if isinstance(plain, (int, float)) else float(plain)
        if low < real < high if between else low <= real <= high:
            return real
    raise ValueError(f"{name}={value!r}: wanted {_range(low, high, between)}")


def positive(name: str, value: Any, *, strictly: bool = True) -> float:
    """The value; ValueError unless it is a finite number > 0 (>= 0 if not `strictly`)."""
    return number(name, value, 0.0, between=strictly)


def whole(name: str, value: Any, *, least: int = 1) -> int:
    """The value; ValueError unless it is a whole number >= `least`."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Integral) or plain < least:
        raise ValueError(f"{name}={value!r}: wanted a whole number >= {least}")
    return int(plain)


def shape(
    name: str, value: Any, wanted: str = "one sample's shape, such as (2,) or (3, 32, 32)"
) -> tuple[int, ...]:
    """The shape as a tuple of Python numbers; ValueError unless it is a sequence of whole numbers >= 1, not empty."""
    try:
        sides = [_plain(side) for side in value]
    except TypeError:
        sides = []
    if not sides or any(isinstance(s, bool) or not isinstance(s, numbers.Integral) or s < 1 for s in sides):
        raise ValueError(f"{name}={value!r}: wanted {wanted}")
    return tuple(map(int, sides))


def _plain(value: Any) -> Any:
    """What a NumPy scalar, or an array or tensor without dimensions, holds; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _range(low: float, high: float, between: bool) -> str:
    if low == -math.inf and high == math.inf:
        return "a finite number"
    if high == math.inf:
        return f"a finite number {'>' if between else '>='} {low:g}"
    ends = f"between {low:g} and {high:g}, both excluded" if between else f"from {low:g} to {high:g}"
    return f"a number {ends}"


# ------------------------------------------------- tensors

def any_of(bad: Tensor) -> bool:
    """Whether any is true; False inside `torch.vmap`, where values can't be looked at."""
    try:
        return bool(bad.any())
    except RuntimeError as error:
        if "data-dependent" in str(error):
            return False
        raise


def tensor(name: str, value: Any, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """`torch.as_tensor`, whose errors do not say which argument they are about; TypeError for what is no array of real
    numbers."""
    try:
        if (torch.is_complex(value) if isinstance(value, Tensor) else np.iscomplexobj(value)):
            raise TypeError("complex numbers")
        return torch.as_tensor(value, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        what = " ".join(str(error).split())
        raise TypeError(f"{name} is {type(value).__name__}: {what}; wanted numbers, a tensor or an array") from error


def floats(name: str, x: Any) -> None:
    """Raise TypeError unless `x` is a floating tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} is {kind}; wanted a floating point tensor of shape (n, ...)")


def seed(name: str, value: Any) -> int:
    """The value; ValueError unless torch's generators take the number."""
    value = whole(name, value, least=0)
    if value >= 2**64:
        raise ValueError(f"{name}={value}: wanted a whole number from 0 to 2^64 - 1")
    return value


def finite(name: str, x: Tensor) -> None:
    """Raise ValueError if the tensor holds a NaN or an infinity, and say where."""
    if not torch.isfinite(x).all():
        first = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise ValueError(f"{name} holds a NaN or infinite value, first at index {first}; wanted finite numbers")


def samples(name: str, x: Tensor, shape: tuple[int, ...] | None = None, *, least: int = 1) -> None:
    """Raise unless `x` is a floating tensor (n, *shape) of finite numbers with n >= `least`."""
    floats(name, x)
    if x.ndim < 2 or (shape is not None and tuple(x.shape[1:]) != tuple(shape)):
        wanted = "(n, d)" if shape is None else f"(n, {', '.join(map(str, shape))})"
        raise ValueError(f"{name} has shape {tuple(x.shape)}; wanted {wanted}")
    if len(x) < least:
        raise ValueError(f"{name} has {len(x)} samples; wanted at least {least}")
    finite(name, x)


def like(name: str, value: Any, other: str, x: Tensor) -> None:
    """Raise unless `value` is a floating tensor shaped like x, which the caller knows as `other`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; wanted a tensor shaped like {other}, {tuple(x.shape)}")
    floats(name, value)
    if value.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; wanted {tuple(x.shape)}, that of {other}")


def precise(*tensors: Tensor) -> list[Tensor]:
    """All in one dtype, the widest of theirs and float32 at least: half precision is too coarse to add up in."""
    dtype = reduce(torch.promote_types, (each.dtype for each in tensors), torch.float32)
    return [each.to(dtype) for each in tensors]


def pair(x: Tensor, y: Tensor, *, least: int = 1, names: tuple[str, str] = ("x", "y")) -> tuple[Tensor, Tensor]:
    """Two sets of samples (n, *shape) and (m, *shape), checked as by `samples`, in one dtype as by `precise`."""
    samples(names[0], x, least=least)
    samples(names[1], y, tuple(x.shape[1:]), least=least)
    x, y = precise(x, y)
    return x, y


def labels(name: str, label: Tensor, n: int, n_classes: int | None = None, *, wait: bool = True) -> Tensor:
    """The labels as int64; raise unless they are a tensor (n,) of whole numbers of any type, 0 or more, below
    `n_classes` where that is known. A mask (bool) is refused: as an index it means something else.

    wait: look at the values on an accelerator too, for which its work has to be waited for; False inside loops.
    """
    if not isinstance(label, Tensor):
        raise TypeError(f"{name} is {type(label).__name__}; wanted an integer tensor of shape ({n},)")
    if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool or label.shape != (n,):
        what = f"{label.dtype} of shape {tuple(label.shape)}"
        raise ValueError(f"{name} is {what}; wanted an integer tensor of shape ({n},)")
    label = label.to(torch.int64)
    looked_at = n and (wait or label.device.type == "cpu")
    if looked_at and any_of((label < 0) | (label >= (torch.inf if n_classes is None else n_classes))):
        low, high = (int(end) for end in label.aminmax())
        wanted = "0 or more" if n_classes is None else f"0 to {n_classes - 1}"
        raise ValueError(f"{name} runs from {low} to {high}; wanted {wanted}")
    return label


def broadcast_sigma(sigma: Any, x: Tensor, *, positive: bool = False, name: str = "sigma") -> Tensor:
    """The noise level as a tensor that broadcasts against `x`: () for a float, (n, 1, ..., 1) for (n,), in x's dtype,
    but float32 at least, since its square leaves the range of half precision.

    Negative, infinite or NaN levels raise ValueError (also 0 if `positive`). On an accelerator the values are
    not looked at: that would make every training step wait for the device.
    """
    floats("x", x)
    out = tensor(name, sigma, torch.promote_types(x.dtype, torch.float32), x.device)
    if out.device.type == "cpu":
        bad = ~((out > 0) if positive else (out >= 0)) | out.isinf()
        if any_of(bad):
            given = out[bad].flatten()[0].item()
            raise ValueError(f"{name} holds {given:g}; wanted noise levels {'> 0' if positive else '>= 0'}")
    if out.ndim == 1 and out.stride() == (0,) and len(out) == len(x) > 0:
        return out[0]  # one level for all, as samplers hand it over: no need to compute with n of them
    if out.ndim == 0 or out.ndim == x.ndim:
        return out
    if out.shape != x.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(out.shape)}; wanted a float or ({len(x)},), one level a sample")
    return out.reshape(-1, *[1] * (x.ndim - 1))


# ------------------------------------------------- models and where they run

def denoised(out: Any, x: Tensor, name: str = "denoiser") -> Tensor:
    """What a model made of x: an error unless it is a floating tensor of x's shape, which else would be broadcast."""
    if not isinstance(out, Tensor) or not out.is_floating_point():
        kind = f"a tensor of {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"{name} returned {kind}; wanted a floating point tensor of shape {tuple(x.shape)}, that of x")
    if out.shape != x.shape:
        raise ValueError(f"{name} returned shape {tuple(out.shape)}; wanted {tuple(x.shape)}, that of x")
    return out


def fits(network: object, shape: tuple[int, ...], n_classes: int) -> None:
    """Raise unless the network takes samples of that shape, and n_classes classes or more, its null class counted;
    none if that is 0."""
    own, classes = getattr(network, "shape", None), getattr(network, "n_classes", None)
    if own is None or classes is None:
        given = type(network).__name__
        raise TypeError(f"network is {given}; wanted one with .shape and .n_classes, such as MLP or UNet")
    if tuple(own) != shape:
        raise ValueError(f"network takes samples of shape {tuple(own)}, but data has {shape}")
    classes += getattr(network, "null_class", None) is not None
    if bool(classes) != bool(n_classes) or classes < n_classes:
        raise ValueError(f"network has {classes} classes, but labels has {n_classes} (with the null class of dropped "
                         "labels); wanted labels for conditional networks, none for others")


def generator(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a torch.Generator (or behaves like one) or None."""
    alike = isinstance(getattr(value, "device", None), torch.device) and not isinstance(value, Tensor)
    if value is not None and not alike:
        raise TypeError(f"{name} is {type(value).__name__}; wanted a torch.Generator, such as "
                        "torch.Generator().manual_seed(0), or None")


def device(name: str, value: Any) -> torch.device:
    """The device of that name; ValueError for one that is unknown or not here."""
    try:
        where = torch.device(value)
        torch.empty(0, device=where)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}={value!r}: wanted a device that is here, such as 'cpu' ({what})") from error
    return where
