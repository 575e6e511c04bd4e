"""The house: which room may import from which, no cycles, every module with its public list, README's listing true."""

import ast
import importlib
import pkgutil
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minidistill

PACKAGE = Path(minidistill.__file__).parent
#: Rooms, top down; a room imports from lower floors and from itself, never upwards or sideways.
FLOORS = (
    ("__main__",), ("cli",), ("studies",), ("check", "plotting", "scale"), ("bench",), ("distillation",), ("metrics",),
    ("teachers",), ("samplers",), ("training",), ("divergences",), ("processes", "score_matching"),
    ("transport", "networks"), ("distributions", "data"), ("_random",),
    ("_validate", "_autodiff"),
)
HEIGHT = {room: len(FLOORS) - i for i, floor in enumerate(FLOORS) for room in floor}
FILES = {"minidistill." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
         for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}


def imports(path):
    """The modules of ours that a file imports, wherever in it, as full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "minidistill"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module and node.module.split(".")[0] == "minidistill":
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
                found |= inner
                if len(inner) < len(node.names) and node.module != "minidistill":
                    found.add(node.module)
    return found


GRAPH = {name: imports(path) for name, path in FILES.items()}


def room(name):
    return name.split(".")[1]


def test_every_room_has_its_floor():
    assert {room(name) for name in FILES} == set(HEIGHT)


@pytest.mark.parametrize("name", FILES)
def test_imports_only_point_down(name):
    for other in GRAPH[name]:
        below = HEIGHT[room(other)] < HEIGHT[room(name)]
        assert below or room(other) == room(name), f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"minidistill._autodiff"}))
def test_derivatives_are_taken_in_one_place(name):
    """torch.func's alone are 0 in older releases' inference mode; `_autodiff`'s are not."""
    used = {ast.unparse(node) for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute)}
    assert not {each for each in used if re.fullmatch(r"torch\.(func|autograd\.functional)\.(?!vmap$)\w+", each)}


def test_there_are_no_cycles():
    # A package is loaded before the modules in it, so what its face imports counts for everyone who reaches inside.
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names one


def test_a_room_does_not_import_its_own_face():
    faces = {name for name, path in FILES.items() if path.name == "__init__.py"}
    inside = [(name, other) for name, others in GRAPH.items() for other in others & faces
              if name.startswith(other + ".")]
    assert not inside


@pytest.mark.parametrize("name", FILES)
def test_public_lists(name):
    if name.endswith("__main__"):
        return
    module = importlib.import_module(name)
    assert module.__doc__
    if name == "minidistill.studies":  # programs, each with its own
        return
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert hasattr(module, public)


def test_help_names_each_folder():
    folders = {info.name for info in pkgutil.iter_modules([str(PACKAGE)]) if info.ispkg}
    assert all(f"\n    {folder}/ " in minidistill.__doc__ for folder in folders)


# ------------------------------------------------- README

README = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")


def test_readmes_listing_is_the_tree():
    listing = README.split("minidistill/\n", 1)[1].split("```", 1)[0]
    named = [line.split()[0] for line in listing.splitlines() if line.strip()]
    there = {path.name + "/" * path.is_dir() for path in PACKAGE.iterdir()
             if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(named) == there - {"__init__.py", "__main__.py"}
    heights = [HEIGHT[name.removesuffix(".py").rstrip("/")] for name in named if not name.startswith("_")]
    assert heights == sorted(heights)  # from the ground up


def test_the_reading_path_fits_an_afternoon():
    """At most eight files and 1,500 lines, each of which is there."""
    path = re.findall(r"^\| \[.*?\]\((minidistill/.*?)\)", README, re.MULTILINE)
    assert 5 <= len(path) <= 8
    assert sum(len((PACKAGE.parent / file).read_text(encoding="utf-8").splitlines()) for file in path) <= 1500
