"""How an exercise is checked and what is printed; and the table that ends every notebook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Case", "claims", "points", "report"]

Case = tuple[str, tuple[Any, ...], Any]  # what the case is, the arguments, the expected value


def claims(rows: Sequence[tuple[str, str, bool | Tensor | str]]) -> None:
    """Print rows of (claim of the paper, what we measured, whether it holds) as an aligned table. Whether it holds is
    said by anything that is true or false, a tensor of one number too, or in words."""
    table = [("claim of the paper", "what we measured", "holds?")]
    for claim, seen, holds in rows:
        table.append((claim, seen, holds if isinstance(holds, str) else "yes" if holds else "no"))
    first, second = (max(len(row[i]) for row in table) for i in (0, 1))
    for claim, seen, holds in table:
        print(f"{claim:<{first}} | {seen:<{second}} | {holds}")


def points(n: int, seed: int = 0) -> Tensor:
    """n fixed points of the plane, (n, 2)."""
    return 2 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def report(number: int, f: Callable[..., Any], cases: Sequence[Case]) -> bool:
    """Print the verdict on `f` over all cases, in one line; whether it is correct."""
    verdict = _verdict(f, cases)
    print(f"exercise {number}: {verdict}")
    return verdict == "correct"


def _verdict(f: Callable[..., Any], cases: Sequence[Case]) -> str:
    for title, arguments, expected in cases:
        try:
            got = f(*(a.clone() if isinstance(a, Tensor) else a for a in arguments))
        except Exception as error:
            return f"{title}: raised {type(error).__name__}: {' '.join(str(error).split())}"
        if got is None or got is ...:
            return "not attempted yet"
        mismatch = _mismatch(got, expected)
        if mismatch:
            return f"{title}: {mismatch}"
    return "correct"


def _mismatch(got: Any, expected: Any) -> str:
    """The first difference in words, or "" if there is none."""
    want = torch.as_tensor(expected, dtype=torch.float64)
    try:
        have = torch.as_tensor(got).detach().to("cpu", torch.float64)
    except Exception:
        return f"expected numbers, got {type(got).__name__}"
    if have.shape != want.shape:
        return f"expected shape {tuple(want.shape)}, got {tuple(have.shape)}"
    wrong = ~torch.isclose(have, want, rtol=1e-3, atol=1e-4)
    if not wrong.any():
        return ""
    index = tuple(wrong.nonzero()[0].tolist())
    where = f" at index {list(index)}" if index else ""
    return f"expected {want[index]:.4g}{where}, got {have[index]:.4g}"
