"""How an exercise is checked, what is printed, and which hint a foreseeable mistake gets."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Case", "Function", "points", "report"]

Function = Callable[..., Any]
#: What the case is; the arguments, or a function that makes them afresh (an optimizer, say); the expected value.
Case = tuple[str, "tuple[Any, ...] | Callable[[], tuple[Any, ...]]", Any]


def points(n: int, seed: int = 0) -> Tensor:
    """n fixed points of the plane, (n, 2)."""
    return 2 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def report(
    number: int, function: Function, cases: Sequence[Case], *, hints: Mapping[str, Function] | None = None,
    rtol: float = 1e-3, atol: float = 1e-4,
) -> bool:
    """Check an exercise of your own: print "exercise NUMBER: " and a verdict in one line; whether it is correct.

    Each case is (title, arguments, expected): the function is called with a copy of the arguments, and what it returns
    has to be numbers, a tensor, or several tensors of one shape; shaped like what is expected, and within `rtol` and
    `atol` of it. Whatever the function does, nothing is raised. The verdict is "not attempted yet" for a stub that
    returns `...`, "correct", or what is wrong in the first case that is, with the line in which the function raised.

    `hints` are foreseeable mistakes: a sentence, and the wrong function that it describes; it is printed if that
    function's answers are the learner's in every case. A wrong sign, a constant factor, a power of an argument as
    factor ("right up to a factor sigma") and two wrong shapes are found without.

        check.report(1, double, [("three", (3.0,), 6.0)], hints={"you square": lambda x: x**2})
    """
    verdict = _verdict(function, cases, hints or {}, rtol, atol)
    print(f"exercise {number}: {verdict}")
    return verdict == "correct"


def _verdict(f: Function, cases: Sequence[Case], hints: Mapping[str, Function], rtol: float, atol: float) -> str:
    for title, arguments, expected in cases:
        given, unchanged = _fresh(arguments), _fresh(arguments)
        try:
            got = f(*given)
        except Exception as error:
            said = f"{title}: raised {type(error).__name__}: {' '.join(str(error).split())}{_line(f, error)}"
            hint = _error_hint(f, error, arguments)
            return said + (f". Hint: {hint}" if hint else "")
        if got is ...:
            return "not attempted yet"
        if got is None:
            return "your function returns None; is a `return` missing?"
        if not callable(arguments) and (name := _changed(f, given, unchanged)):
            return f"{title}: your function changes its argument `{name}`, which others still need. Hint: no x += y"
        mismatch = _mismatch(got, expected, rtol, atol)
        if mismatch:
            hint = _shape_hint(got, expected) or _hint(f, cases, hints, rtol, atol)
            return f"{title}: {mismatch}" + (f". Hint: {hint}" if hint else "")
    return "correct"


def _fresh(arguments: tuple[Any, ...] | Callable[[], tuple[Any, ...]]) -> list[Any]:
    """Copies of the arguments, so that a function that changes them changes no other case."""
    given = arguments() if callable(arguments) else arguments
    return [a.clone() if isinstance(a, Tensor) else a for a in given]


def _changed(f: Function, given: Sequence[Any], before: Sequence[Any]) -> str:
    """The first argument whose numbers are not what they were, or ""."""
    names = _parameters(f)
    for i, (now, then) in enumerate(zip(given, before, strict=True)):
        if isinstance(now, Tensor) and not torch.equal(now.nan_to_num(), then.nan_to_num()):
            return names[i] if i < len(names) else str(i)
    return ""


def _parameters(f: Function) -> list[str]:
    """The names of its arguments, as far as they can be told."""
    try:
        return list(inspect.signature(f).parameters)
    except (TypeError, ValueError):
        return []


def _line(f: Function, error: Exception) -> str:
    """The line of the learner's own function in which it went wrong, or "" where that cannot be told."""
    file = getattr(getattr(inspect.unwrap(f), "__code__", None), "co_filename", None)
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file and frame.line]
    return f" (line {own[-1].lineno} of your cell or file: `{own[-1].line}`)" if own else ""


def _numbers(value: Any) -> Tensor:
    """What a function returned, or was to return; several tensors (a mean and a variance, say) stacked."""
    if isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value):
        return torch.stack([_numbers(part) for part in value])
    return torch.as_tensor(value).detach().to("cpu", torch.float64)


def _mismatch(got: Any, expected: Any, rtol: float, atol: float) -> str:
    """The first difference in words, or "" if there is none."""
    want = _numbers(expected)
    try:
        have = _numbers(got)
    except Exception:
        return f"expected numbers, got {type(got).__name__}"
    if have.shape != want.shape:
        return f"expected shape {tuple(want.shape)}, got {tuple(have.shape)}"
    wrong = ~torch.isclose(have, want, rtol=rtol, atol=atol)
    if not wrong.any():
        return ""
    index = tuple(wrong.nonzero()[0].tolist())
    where = f" at index {list(index)}" if index else ""
    return f"expected {want[index]:.4g}{where}, got {have[index]:.4g}"


# ------------------------------------------------- hints

def _shape_hint(got: Any, expected: Any) -> str:
    want = tuple(_numbers(expected).shape)
    have = tuple(np.shape(got))  # of lists too
    if len(want) == 1 and have == (*want, 1):
        return "one dimension too many: leave keepdim=True out, or drop the last one"
    if want and have == ():
        return "you return one number for all samples; wanted one for each: sum or average over dim=1 only"
    return ""


def _error_hint(f: Function, error: Exception, arguments: tuple[Any, ...] | Callable[[], tuple[Any, ...]]) -> str:
    """For numbers (n,) that were put together with samples (n, d) as they are, and for one number taken for many."""
    given = dict(zip(_parameters(f), _fresh(arguments), strict=False))
    if "'float' object is not subscriptable" in str(error):
        single = [name for name, value in given.items() if isinstance(value, float)]
        return f"`{single[0]}` is a single number here, so that it needs no [:, None]" if single else ""
    if "must match the size" not in str(error):
        return ""
    flat = [name for name, value in given.items() if isinstance(value, Tensor) and value.ndim == 1]
    wide = any(isinstance(value, Tensor) and value.ndim > 1 for value in given.values())
    return f"`{flat[0]}` has one number a row: as a column it is `{flat[0]}[:, None]`" if flat and wide else ""


def _hint(f: Function, cases: Sequence[Case], hints: Mapping[str, Function], rtol: float, atol: float) -> str:
    """The one sentence that explains the answers to all cases, or ""."""
    try:
        answers = [_numbers(f(*_fresh(arguments))) for _, arguments, _ in cases]
        wanted = [_numbers(expected) for _, _, expected in cases]

        def same(others: Sequence[Any]) -> bool:
            return all(torch.allclose(have, _numbers(other), rtol=rtol, atol=atol, equal_nan=True)
                       for have, other in zip(answers, others, strict=True))

        for sentence, mistake in hints.items():
            if same([mistake(*_fresh(arguments)) for _, arguments, _ in cases]):
                return sentence
        for name, factors in _factors(f, cases, wanted):
            for sign, said in ((1, ""), (-1, "-")):
                if same([sign * factor * want for factor, want in zip(factors, wanted, strict=True)]):
                    return "the sign is wrong" if (name, sign) == ("1", -1) else f"right up to a factor {said}{name}"
        scale = _constant(answers, wanted)
        if math.isfinite(scale) and abs(scale) > atol and same([scale * want for want in wanted]):
            return f"right up to a factor {scale:.4g}"
    except Exception:  # a hint is never worth an exception
        return ""
    return ""


def _constant(answers: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The one number that makes of the wanted values the answers, as nearly as one can."""
    have, want = torch.cat([a.flatten() for a in answers]), torch.cat([b.flatten() for b in wanted])
    return float(have @ want / want.square().sum())


def _factors(f: Function, cases: Sequence[Case], wanted: Sequence[Tensor]) -> list[tuple[str, list[Any]]]:
    """Named factors that an answer may have too many: 1, and powers of arguments that are one number, or one a row."""
    found: list[tuple[str, list[Any]]] = [("1", [1.0] * len(cases))]
    columns = zip(*(_fresh(arguments) for _, arguments, _ in cases), strict=True)
    for name, values in zip(inspect.signature(f).parameters, columns, strict=False):
        rows = [_per_row(value, want) for value, want in zip(values, wanted, strict=True)]
        if all(row is not None for row in rows):
            found += [(said.format(name), [row**power for row in rows])
                      for power, said in ((1, "{}"), (-1, "1 / {}"), (2, "{}**2"), (-2, "1 / {}**2"))]
    return found


def _per_row(value: Any, want: Tensor) -> Any:
    """A number, or a tensor that holds one a row of `want`, as a factor of it; else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Tensor) and value.is_floating_point():
        if value.ndim == 0:
            return value.double()
        if want.ndim and value.shape == want.shape[:1]:
            return value.double().reshape(-1, *[1] * (want.ndim - 1))
    return None
