"""The table that ends every notebook: who claims what, what was to be seen, what was, and whether it holds."""

from __future__ import annotations

import html
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["Row", "claims", "slug"]

#: (claim, source, criterion, measured, holds); the older (claim, criterion, holds) is printed as it was.
Row = tuple[str, str, str, str, "bool | Tensor | str"] | tuple[str, str, "bool | Tensor | str"]
COLUMNS = ("claim", "source", "criterion, fixed before measuring", "measured", "holds?")
OLD_COLUMNS = ("claim of the paper", "what we measured", "holds?")


def claims(rows: Sequence[Row]) -> None:
    """Show rows of (claim, source, criterion fixed before measuring, measured, whether it holds) as a table.

    `source` is a paper ("Yin 2024", several with ";") or "ours"; `measured` a number with its unit and its seeds;
    whether it holds is said by anything that is true or false, a tensor of one number too, or in words.

    In a notebook the table is HTML, and its text, which tests compare, leaves the measured numbers out: verdicts are
    the same at every scale, numbers are not. Elsewhere it is printed. Rows of three (claim, criterion, holds) are
    printed. ValueError for rows of other lengths, or of both.
    """
    lengths = {len(row) for row in rows}
    if lengths not in ({3}, {5}, set()):
        raise ValueError(f"rows have {sorted(lengths)} entries; wanted (claim, source, criterion, measured, holds)")
    table = [(*(str(text) for text in row[:-1]), _said(row[-1])) for row in rows]
    if lengths == {3}:
        print(_text([OLD_COLUMNS, *table]))
    elif _in_notebook():
        sys.modules["IPython"].display.display(Table(table))  # loaded: we are in it
    else:
        print(_text([COLUMNS, *table]))


class Table:
    """Five columns: all of them as HTML, without the measured ones as text."""

    def __init__(self, rows: Sequence[tuple[str, ...]]) -> None:
        self.rows = rows

    def __repr__(self) -> str:
        return _text([(row[4], *row[:3]) for row in (COLUMNS, *self.rows)])

    def _repr_html_(self) -> str:
        head = "".join(f'<th style="text-align:left">{name}</th>' for name in COLUMNS)
        body = "\n".join("<tr>" + "".join(map(_cell, COLUMNS, row)) + "</tr>" for row in self.rows)
        return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def slug(source: str) -> str:
    """The anchor of a paper in tutorials/references.md: "Song & Ermon 2019" -> "song-ermon-2019"."""
    plain = unicodedata.normalize("NFKD", source).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def _cell(column: str, text: str) -> str:
    inside = html.escape(text, quote=False)
    if column == "source":
        inside = "; ".join(_linked(part.strip()) for part in text.split(";"))
    return f'<td style="text-align:left">{inside}</td>'


def _linked(source: str) -> str:
    shown = html.escape(source, quote=False)
    return f'<a href="references.md#{slug(source)}">{shown}</a>' if re.search(r"\d{4}", source) else shown


def _said(holds: Any) -> str:
    return holds if isinstance(holds, str) else "yes" if holds else "no"


def _text(table: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)][:-1]
    return "\n".join(" | ".join([*map(str.ljust, row, widths), row[-1]]) for row in table)


def _in_notebook() -> bool:
    python = sys.modules.get("IPython")
    return python is not None and getattr(python.get_ipython(), "kernel", None) is not None
