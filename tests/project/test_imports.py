"""The pipeline imports only upwards, and a folder only what its docstring allows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsam

PACKAGE = Path(sparsam.__file__).parent
STAGES = [
    "patterns",
    "vocabulary",
    "config",
    "schedules",
    "moment_sums",
    "moments",
    "statistics",
    "score_data",
    "scores",
    "masks",
    "orientation",
    "tiles",
    "selection",
    "ranking",
    "allocation",
    "coupling",
    "pools",
    "sharing",
    "report",
    "pruner",
    "shrinking",
    "runtime",
]
PLACE = {name: place for place, name in enumerate(STAGES)}
# What every stage may import.
BASIS = {"_core", "inputs"}
PIPELINE = {*STAGES, *BASIS}

FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def allowed(folder: str) -> set[str]:
    """The other folders that a folder may import: those that its docstring names where it says "imports"."""
    text = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text())) or ""
    sentence = re.search(r"\b(?:Imports|It imports)\b[^.]*\.", text)
    assert sentence, f"{folder}/__init__.py: expected a docstring that says what the folder imports"
    if "every other folder" in sentence[0]:
        return set(FOLDERS)
    return set(re.findall(r"`(\w+)`", sentence[0])) & set(FOLDERS)


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of what a module imports from the package: a stage or a folder."""
    tree = ast.parse(source)
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "sparsam":
            names = [f"sparsam.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        else:
            assert not getattr(node, "level", 0), "expected absolute imports"
            continue
        yield from ((node.lineno, name.split(".")[1]) for name in names if name.startswith("sparsam."))


def test_every_module_has_its_place() -> None:
    found = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert found == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_the_pipeline_imports_only_upwards(name: str) -> None:
    for line, other in imported((PACKAGE / f"{name}.py").read_text()):
        assert other in BASIS or PLACE.get(other, PLACE[name]) < PLACE[name], (
            f"{name}.py:{line} imports {other}"
        )


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_what_it_may(folder: str) -> None:
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        for line, other in imported(path.read_text()):
            fine = other in PIPELINE or other in allowed(folder) | {folder, "__version__"}
            assert fine, f"{path.relative_to(PACKAGE)}:{line} imports {other}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import sparsam.pruner", ["pruner"]),
        ("from sparsam.torch.layers import x", ["torch"]),
        ("from sparsam import masks, _core\nimport numpy", ["masks", "_core"]),
        ("def f():\n    from sparsam import plot", ["plot"]),
        ("if TYPE_CHECKING:\n    import sparsam.plot", []),
    ],
)
def test_the_reading_itself(source: str, found: list[str]) -> None:
    assert [name for _, name in imported(source)] == found
