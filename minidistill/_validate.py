"""Checks on arguments: each raises one exception that names the argument, what was given and what is wanted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "T", "broadcast_sigma", "choose", "closest", "finite", "fits", "labels", "positive", "samples", "seed", "whole",
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


def positive(name: str, value: float, *, strictly: bool = True) -> None:
    """Raise ValueError unless `value` is a finite number > 0 (>= 0 if not `strictly`)."""
    good = isinstance(value, (int, float)) and value == value and abs(value) != float("inf")
    if not (good and (value > 0 or (value == 0 and not strictly))):
        wanted = "a finite number > 0" if strictly else "a finite number >= 0"
        raise ValueError(f"{name}={value!r}: wanted {wanted}")


def whole(name: str, value: int, *, least: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: wanted a whole number >= {least}")


def seed(name: str, value: int) -> None:
    """Raise ValueError unless torch's generators take the number."""
    whole(name, value, least=0)
    if value >= 2**64:
        raise ValueError(f"{name}={value}: wanted a whole number from 0 to 2^64 - 1")


def finite(name: str, x: Tensor) -> None:
    """Raise ValueError if the tensor holds a NaN or an infinity, and say where."""
    if not torch.isfinite(x).all():
        first = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise ValueError(f"{name} holds a NaN or infinite value, first at index {first}; wanted finite numbers")


def samples(name: str, x: Tensor, shape: tuple[int, ...] | None = None, *, least: int = 1) -> None:
    """Raise unless `x` is a floating tensor (n, *shape) of finite numbers with n >= `least`."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} is {kind}; wanted a floating point tensor of shape (n, ...)")
    if x.ndim < 2 or (shape is not None and tuple(x.shape[1:]) != tuple(shape)):
        wanted = "(n, d)" if shape is None else f"(n, {', '.join(map(str, shape))})"
        raise ValueError(f"{name} has shape {tuple(x.shape)}; wanted {wanted}")
    if len(x) < least:
        raise ValueError(f"{name} has {len(x)} samples; wanted at least {least}")
    finite(name, x)


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
    if n and (wait or label.device.type == "cpu"):
        low, high = (int(end) for end in label.aminmax())
        if low < 0 or (n_classes is not None and high >= n_classes):
            wanted = "0 or more" if n_classes is None else f"0 to {n_classes - 1}"
            raise ValueError(f"{name} runs from {low} to {high}; wanted {wanted}")
    return label


def fits(network: object, shape: tuple[int, ...], n_classes: int) -> None:
    """Raise unless the network takes samples of that shape, and n_classes classes or more; none if that is 0."""
    own, classes = getattr(network, "shape", None), getattr(network, "n_classes", None)
    if own is None or classes is None:
        given = type(network).__name__
        raise TypeError(f"network is {given}; wanted one with .shape and .n_classes, such as MLP or UNet")
    if tuple(own) != shape:
        raise ValueError(f"network takes samples of shape {tuple(own)}, but data has {shape}")
    if bool(classes) != bool(n_classes) or classes < n_classes:
        raise ValueError(f"network has {classes} classes, but labels has {n_classes} (with the null class of dropped "
                         "labels); wanted labels for conditional networks, none for others")


def broadcast_sigma(sigma: float | Tensor, x: Tensor, *, positive: bool = False) -> Tensor:
    """The noise level as a tensor that broadcasts against `x`: () for a float, (n, 1, ..., 1) for (n,).

    Negative or NaN levels raise ValueError (also 0 if `positive`). On an accelerator the values are
    not looked at: that would make every training step wait for the device.
    """
    out = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    if out.device.type == "cpu":
        good = (out > 0) if positive else (out >= 0)
        if not bool(good.all()):
            bad = out[~good].flatten()[0].item()
            raise ValueError(f"sigma holds {bad:g}; wanted noise levels {'> 0' if positive else '>= 0'}")
    if out.ndim == 0 or out.ndim == x.ndim:
        return out
    if out.shape != x.shape[:1]:
        raise ValueError(f"sigma has shape {tuple(out.shape)}; wanted a float or ({len(x)},), one level a sample")
    return out.reshape(-1, *[1] * (x.ndim - 1))
