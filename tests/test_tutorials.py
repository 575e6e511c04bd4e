"""The course as a whole: solved notebooks pass the command that unsolved ones pass, and only wrong answers fail; the
ledger of claims, the references and the page of symptoms are true of the notebooks as they stand."""

import ast
import base64
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minidistill import check
from minidistill.check._claims import slug

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
#: Not rewritten yet: what ruff still excuses.
OLD = [path for path in NOTEBOOKS if any(path.match(pattern) for pattern in re.findall(
    r'"(\S+ipynb)" = \["E501"', (TUTORIALS / "ruff.toml").read_text(encoding="utf-8")))]
NEW = [path for path in NOTEBOOKS if path not in OLD]


def _load(name):
    spec = importlib.util.spec_from_file_location(name, TUTORIALS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


claims, solve = _load("claims"), _load("solve")


def _cells(path, kind):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def _run(folder, *what):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *what]
    environment = os.environ | {"MINIDISTILL_SCALE": "smoke", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def _copy_of_the_rest(folder):
    """What lies beside a notebook, and the stored runs that some read from beside the folder."""
    folder.mkdir()
    shutil.copytree(ROOT / "figures", folder.parent / "figures")
    for path in TUTORIALS.iterdir():
        if path.suffix in (".py", ".cfg", ".md"):
            shutil.copy(path, folder)
        elif path.name == "checkpoints":
            shutil.copytree(path, folder / path.name)


# ------------------------------------------------- exercises

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_solved_notebook_passes_too(path, tmp_path):
    folder = tmp_path / "tutorials"
    _copy_of_the_rest(folder)
    names = solve.solve(path, folder / path.name)
    assert names
    assert set(names) <= set(check.__all__)
    done = _run(folder, path.name)
    assert done.returncode == 0, done.stdout[-4000:]


def _own_notebook(path, answer, stored="not attempted yet"):
    """A notebook as an instructor would write one: a stub's place, a check of their own, an output that is compared."""
    source = f"""from minidistill import check

def double(x):
    return {answer}

_ = check.report(1, double, [("three", (3.0,), 6.0), ("one", (1.0,), 2.0)], hints={{"you square": lambda x: x**2}})"""
    cell = {"cell_type": "code", "execution_count": 1, "id": "own-1", "metadata": {"tags": ["nbval-check-output"]},
            "outputs": [{"name": "stdout", "output_type": "stream", "text": [f"exercise 1: {stored}\n"]}],
            "source": source.splitlines(keepends=True)}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path.write_text(json.dumps({"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4,
                                "nbformat_minor": 5}), encoding="utf-8")


@pytest.mark.parametrize(
    ("answer", "passes", "says"), [("...", True, ""), ("2 * x", True, ""), ("x**2", False, "you square")]
)
def test_an_instructors_own_exercise_elsewhere(answer, passes, says, tmp_path):
    for name in ("conftest.py", "nbval.cfg"):
        shutil.copy(TUTORIALS / name, tmp_path)
    _own_notebook(tmp_path / "own.ipynb", answer)
    done = _run(tmp_path, "own.ipynb")
    assert (done.returncode == 0) is passes, done.stdout[-4000:]
    assert says in done.stdout


@pytest.mark.parametrize(("answer", "passes"), [("x**2", False), ("2 * x", True)])
def test_a_wrong_answer_that_was_saved_is_still_wrong(answer, passes, tmp_path):
    """Run in Jupyter and saved, the notebook holds the verdict of its wrong answer as its output."""
    for name in ("conftest.py", "nbval.cfg"):
        shutil.copy(TUTORIALS / name, tmp_path)
    verdict = "three: expected 6, got 9. Hint: you square"
    _own_notebook(tmp_path / "own.ipynb", answer, stored=verdict)
    done = _run(tmp_path, "own.ipynb")
    assert (done.returncode == 0) is passes, done.stdout[-4000:]
    assert passes or verdict in done.stdout


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [("(teacher_x0 - fake_x0) / sigma[:, None] ** 2", "1 passed"), ("...", "1 skipped"),
     ("(teacher_x0 - fake_x0) / sigma[:, None]", "divide by sigma^2, not by sigma")],
)
def test_an_answer_in_a_file(answer, verdict, tmp_path):
    shutil.copy(TUTORIALS / "test_answers.py", tmp_path)
    (tmp_path / "answers.py").write_text(f"def score_gap(teacher_x0, fake_x0, sigma):\n    return {answer}\n")
    assert verdict in _run(tmp_path, "test_answers.py").stdout


def test_every_stub_has_an_answer_and_the_other_way_round():
    known, stubs = set(solve.answers()), set()
    for path in NOTEBOOKS:
        for source in _cells(path, "code"):
            stubs |= set(solve.solved(source, dict.fromkeys(known, ""))[1])
    assert stubs == known


def test_every_prediction_that_is_asked_for_is_answered():
    asked = {name for path in NOTEBOOKS for text in _cells(path, "markdown")
             for name in re.findall(r'PREDICTIONS\["(\w+)"\]', text)}
    assert asked == set(_load("solutions").PREDICTIONS)


def test_a_class_with_one_stub_for_a_method_is_filled_in():
    source = "class Own:\n    a = 1\n\n    def loss(self, batch):\n        return ...\n\n\nprint(Own.a)"
    answer = "class Own:\n    def loss(self, batch):\n        return 2"
    filled, names = solve.solved(source, {"Own": answer})
    assert names == ["Own"]
    assert filled == answer + "\n\n\nprint(Own.a)"
    whole = source.replace("...", "3")
    assert solve.solved(whole, {"Own": answer}) == (whole, [])


# ------------------------------------------------- claims

def test_the_ledger_is_up_to_date():
    assert claims.LEDGER.read_text(encoding="utf-8") == claims.ledger(), "run python tutorials/claims.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_verdict_is_a_literal(path):
    for node in ast.walk(ast.parse(_cells(path, "code")[-1])):
        if isinstance(node, ast.Tuple) and len(node.elts) == 5:
            assert not isinstance(node.elts[-1], ast.Constant), ast.unparse(node)


@pytest.mark.parametrize("path", NEW, ids=lambda path: path.stem)
def test_claims_have_five_columns_and_numbers(path):
    rows = claims.rows(path)
    assert rows
    for claim, source, criterion, measured, holds in rows:
        assert all((claim, source, criterion, holds))
        assert re.search(r"\d", measured), f"{claim}: no number measured"


def test_large_pictures_are_stored_with_fewer_colours(monkeypatch):
    monkeypatch.syspath_prepend(TUTORIALS)
    execute = _load("execute")
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)

    def png(pixels):
        stored = io.BytesIO()
        Image.fromarray(pixels).save(stored, "PNG")
        return base64.b64encode(stored.getvalue()).decode()

    assert execute.smaller(png(noise[:20])) == png(noise[:20])
    large = png(noise)
    small = execute.smaller(large)
    assert len(small) < len(large) / 2
    assert Image.open(io.BytesIO(base64.b64decode(small))).size == (300, 200)
    photograph = png(noise[:50])  # 45 kB: not large, and off by more than is seen
    assert execute.smaller(photograph) == photograph
    drawing = png(np.repeat(np.repeat(noise[:12, :12] // 128 * 255, 24, 0), 24, 1))  # eight colours
    monkeypatch.setattr(execute, "SMALL", 500)
    small = execute.smaller(drawing)
    assert len(small) < len(drawing)


# ------------------------------------------------- pages beside the notebooks

ANCHORS = re.findall(r'<a id="(.*?)"></a>', (TUTORIALS / "references.md").read_text(encoding="utf-8"))


def test_each_paper_has_one_anchor_a_title_and_a_link():
    page = (TUTORIALS / "references.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("- ")]
    assert len(lines) == len(ANCHORS) == len(set(ANCHORS))
    for line, anchor in zip(lines, ANCHORS, strict=True):
        name = re.search(r"\*\*(.+?)\.\*\*", line).group(1)
        assert slug(name) == anchor
        assert re.search(r"\[.+\]\(https://\S+\)", line)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papers_that_are_cited_are_listed(path):
    text = " ".join(" ".join(_cells(path, "markdown") + _cells(path, "code")[-1:]).split())
    for surname, year in re.findall(r"([A-Z][\w-]+)(?: \(|, | )((?:19|20)\d\d)b?\b", text):
        if surname in ("EDM2", "CIFAR-10", "January"):
            continue
        found = [a for a in ANCHORS if slug(surname) in a and year in a]
        assert found, f"{surname} {year} is not in references.md"


PAGES = [*NEW, *sorted(TUTORIALS.glob("*.md")), ROOT / "README.md"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = "\n".join(_cells(path, "markdown")) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+(?:\([^)\s]*\))?[^)\s]*)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), f"{path.name}: {target}"
        if anchor and there.suffix == ".ipynb":
            titles = re.findall(r"^#+ (.+)$", "\n".join(_cells(there, "markdown")), re.MULTILINE)
            assert anchor in [title.replace(" ", "-") for title in titles], f"{path.name}: {target}"
        elif anchor and there.name == "references.md":
            assert anchor in ANCHORS, f"{path.name}: {target}"


@pytest.mark.parametrize("path", NEW, ids=lambda path: path.stem)
def test_a_rewritten_notebook_is_for_reading(path):
    code, prose = _cells(path, "code"), "\n".join(_cells(path, "markdown"))
    assert "noqa" not in "".join(code)
    assert '"google.colab" in sys.modules' in code[0]
    assert "(glossary.md)" in prose
    assert "Predict, change, look" in prose
    if "import figures" in "".join(code):  # a copy of the notebook alone takes them from the package
        assert "from minidistill import tutorial_figures as figures" in "".join(code)
        assert '"tutorials/figures.py" = "minidistill/tutorial_figures.py"' in (ROOT / "pyproject.toml").read_text()
