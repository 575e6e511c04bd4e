"""A solved copy of a notebook: `python tutorials/solve.py NOTEBOOK COPY`.

Each stub, a function that returns `...` or a class with one for a method, is replaced by its
namesake in `solutions.py`, with the imports that this needs. Nothing else changes, so there is one
source for both versions.
"""

import argparse
import ast
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent


def answers():
    """The solutions' sources by name, each with the imports that it uses above it."""
    text = (HERE / "solutions.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            needed = [ast.unparse(one) for one in imports
                      if used & {alias.asname or alias.name for alias in one.names}]
            found[node.name] = "\n".join([*needed, ast.get_source_segment(text, node)])
    return found


def is_stub(node):
    """Whether a function only returns `...`, below its docstring and comments, or a class has a
    method that does."""
    if isinstance(node, ast.ClassDef):
        return any(is_stub(method) for method in node.body)
    if not isinstance(node, ast.FunctionDef) or not isinstance(node.body[-1], ast.Return):
        return False
    rest = [ast.get_docstring(node) is not None, 1]
    value = node.body[-1].value
    return (len(node.body) == sum(rest) and isinstance(value, ast.Constant) and value.value is ...)


def solved(source, known):
    """A code cell's source with its stubs filled in, and their names."""
    try:
        stubs = [node for node in ast.parse(source).body if is_stub(node)]
    except SyntaxError:  # a cell with a magic command
        return source, []
    lines = source.splitlines()
    for node in reversed(stubs):
        lines[node.lineno - 1 : node.end_lineno] = known[node.name].splitlines()
    return "\n".join(lines), [node.name for node in stubs]


def solve(path, copy):
    """Write the solved copy of a notebook, outputs and all; the names of the exercises in it."""
    known, names = answers(), []
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source, found = solved("".join(cell["source"]), known)
            cell["source"] = source.splitlines(keepends=True)
            names += found
    Path(copy).write_text(json.dumps(notebook, indent=1, ensure_ascii=False), encoding="utf-8")
    return names


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebook")
    parser.add_argument("copy", help="where to write it")
    asked = parser.parse_args()
    print("solved:", ", ".join(solve(asked.notebook, asked.copy)))
