"""What the committed notebooks must look like for their comparison to mean anything."""

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbval.plugin import get_sanitize_patterns

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    read = nbformat.read(request.param, as_version=4)
    read.path = request.param
    return read


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_executed_and_compared(notebook):
    for cell in _code(notebook):
        assert cell.execution_count, f"not executed: {cell.source[:60]}"  # nbval would skip it silently
        if "nbval-check-output" in cell.metadata.get("tags", []):
            assert cell.outputs, f"compared, but prints nothing: {cell.source[:60]}"
            for out in cell.outputs:  # text, or a table of claims: its HTML, with the numbers, is not compared
                assert out.output_type == "stream" or set(out.data) == {"text/plain", "text/html"}, "text only"


def test_outputs_are_clean(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    for output in (output for cell in _code(notebook) for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        for mime, data in output.get("data", {}).items():
            assert "svg" not in mime
            assert "widget" not in mime
            if mime == "image/png":
                assert len(base64.b64decode(data)) < 150_000


def test_size_and_paths(notebook):
    text = notebook.path.read_text(encoding="utf-8")
    assert len(text) <= 1_000_000
    assert not re.search(r"/(home|Users|work|tmp|root|venvs|mnt)/|[A-Z]:\\\\", text)


def test_ends_with_its_claims_and_has_an_exercise(notebook):
    code = _code(notebook)
    assert any("Exercise" in cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "claims" in code[-1].source
    assert notebook.cells[-1] is code[-1]
    assert "nbval-check-output" in code[-1].metadata.get("tags", [])


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_every_sanitizer_rule_is_parsed():
    text = (ROOT / "tutorials" / "nbval.cfg").read_text(encoding="utf-8")  # nbval drops a malformed rule without a word
    assert len(get_sanitize_patterns(text)) == len(re.findall(r"^regex:", text, re.MULTILINE)) > 0
