"""The table that ends a notebook: five columns, in a notebook as HTML beside a text without numbers."""

import sys
import types

import pytest
import torch

from minidistill import check
from minidistill.check import _claims

ROWS = [
    ("one step is enough", "Yin 2024; Yin 2024b", "KL(p||q) < 0.2", "0.11, 1 seed", torch.tensor(0.1) < 0.2),
    ("noise helps", "ours", "10 % lower", "5 % <-", False),
]


def test_five_columns(capsys):
    check.claims(ROWS)
    head, first, second = capsys.readouterr().out.splitlines()
    assert [part.strip() for part in head.split(" | ")] == list(_claims.COLUMNS)
    assert [part.strip() for part in first.split(" | ")][3:] == ["0.11, 1 seed", "yes"]
    assert second.endswith("| no")


def test_three_columns_as_before(capsys):
    check.claims([("a claim", "what was seen", True), ("b", "c", "not here")])
    assert capsys.readouterr().out == (
        "claim of the paper | what we measured | holds?\n"
        "a claim            | what was seen    | yes\n"
        "b                  | c                | not here\n"
    )


def test_in_a_notebook_numbers_are_not_compared(monkeypatch, capsys):
    shown = []
    fake = types.SimpleNamespace(
        get_ipython=lambda: types.SimpleNamespace(kernel=object()),
        display=types.SimpleNamespace(display=shown.append),
    )
    monkeypatch.setitem(sys.modules, "IPython", fake)
    check.claims(ROWS)
    assert capsys.readouterr().out == ""
    table = shown[0]
    assert "0.11" not in repr(table)
    assert repr(table).splitlines()[1].startswith("yes")
    page = table._repr_html_()
    assert ">0.11, 1 seed<" in page
    assert '<a href="references.md#yin-2024">Yin 2024</a>; <a href="references.md#yin-2024b">' in page
    assert "5 % &lt;-" in page


@pytest.mark.parametrize("rows", [[("a", "b", "c", True)], [("a", "b", True), ("a", "b", "c", "d", True)]])
def test_other_lengths_are_refused(rows):
    with pytest.raises(ValueError, match="entries; wanted"):
        check.claims(rows)


@pytest.mark.parametrize(
    ("source", "anchor"),
    [("Song & Ermon 2019", "song-ermon-2019"), ("Hyvärinen 2005", "hyvarinen-2005"), ("Yin 2024b", "yin-2024b")],
)
def test_anchors(source, anchor):
    assert _claims.slug(source) == anchor
