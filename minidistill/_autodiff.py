"""torch.func's derivatives, made right where torch alone is not.

Two things go wrong without a word or too late. Under `torch.inference_mode()` older releases (2.6 to 2.11 of those
tried) give 0 for every derivative: there it is left for the time. And the fused kernels of attention have no second
derivative, while whoever differentiates a network here may want its gradient too: the plain kernel has all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["derivative", "differentiable", "in_forward_mode", "jvp", "load_forward_mode", "ordinary", "vjp"]

_FORWARD = ContextVar("forward", default=False)


@contextmanager
def differentiable() -> Iterator[None]:
    """Inside the `with`, attention is computed by the kernel that can be differentiated twice, and derivatives are
    right under inference mode too."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if torch.is_inference_mode_enabled() and not _right_in_inference_mode():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # leaving inference mode alone would record every operation
        yield


def vjp(function: Callable[..., Any], *primals: Tensor, has_aux: bool = False) -> Any:
    """`torch.func.vjp`, and the pullback that it returns, `differentiable`."""
    with differentiable():
        out, pull, *aux = torch.func.vjp(function, *map(ordinary, primals), has_aux=has_aux)

    def careful(v: Tensor) -> tuple[Tensor, ...]:
        with differentiable():
            return pull(ordinary(v))

    return out, careful, *aux


def jvp(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """`torch.func.jvp`, `differentiable`: (value, derivative along the tangents). Under no_grad the derivative is right
    all the same; it is taken in the weights' own precision, since torch can't cast what it differentiates forwards.

    Raises RuntimeError, with the way round it, where an operation of the function has no forward derivative.
    """
    load_forward_mode()
    earlier = _FORWARD.set(True)
    with differentiable():
        try:
            value, along = torch.func.jvp(function, tuple(map(ordinary, primals)), tuple(map(ordinary, tangents)))[:2]
        except (RuntimeError, NotImplementedError) as error:
            if not any(word in str(error).lower() for word in ("forward ad", "forward-mode", "jvp", "functorch")):
                raise
            said = str(error).splitlines()[0]
            raise RuntimeError(f"this network can't be differentiated forwards ({said}); wanted derivatives by finite "
                               "differences") from error
        finally:
            _FORWARD.reset(earlier)
    return value, along


def in_forward_mode() -> bool:
    """Whether a `jvp` is under way, where a lower precision has to be left out."""
    return _FORWARD.get()


def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """d function / dt of an elementwise function. torch.func, since that works under no_grad and inside vmap too."""
    with differentiable():
        return torch.func.grad(lambda u: function(u).sum())(ordinary(t))


def ordinary(value: Any) -> Any:
    """The same, but that autograd takes it: a tensor made in inference mode is copied where that mode was left."""
    made_there = isinstance(value, Tensor) and value.is_inference() and not torch.is_inference_mode_enabled()
    return value.clone() if made_there else value


@lru_cache(maxsize=1)
def load_forward_mode() -> None:
    """Torch loads its forward mode when it is first used, and newer releases warn of something of their own then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


@lru_cache(maxsize=1)
def _right_in_inference_mode() -> bool:
    with torch.inference_mode():
        return float(torch.func.grad(torch.sin)(torch.zeros(()))) == 1
