"""The pipeline imports only upwards, and a folder only what its docstring allows."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import sparsam

PACKAGE = Path(sparsam.__file__).parent
STAGES = [
    "patterns",
    "vocabulary",
    "overrides",
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
    "apportionment",
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
TORCH_FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("torch/*/__init__.py"))


def allowed(folder: str) -> set[str]:
    """The other folders that a folder may import: those that its docstring names where it says "imports".

    A folder of `torch` is written with it, as in `torch.layers`.
    """
    text = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text())) or ""
    sentence = re.search(r"\b(?:Imports|It imports)\b.*?\.(?=\s|$)", text, re.DOTALL)
    assert sentence, f"{folder}/__init__.py: expected a docstring that says what the folder imports"
    if "every other folder" in sentence[0]:
        return set(FOLDERS)
    names = {name.replace(".", "/") for name in re.findall(r"`([\w.]+)`", sentence[0])}
    return names & {*FOLDERS, *(f"torch/{name}" for name in TORCH_FOLDERS)}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of what a module imports from the package: a stage or a folder, or one of `torch`."""
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
        for parts in (name.split(".") for name in names if name.startswith("sparsam.")):
            yield node.lineno, parts[1]
            if parts[1] == "torch" and parts[2:] and parts[2] in TORCH_FOLDERS:
                yield node.lineno, f"torch/{parts[2]}"


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
            fine = other in PIPELINE or other in allowed(folder) | {folder, "__version__"} or "/" in other
            assert fine, f"{path.relative_to(PACKAGE)}:{line} imports {other}"


@pytest.mark.parametrize("folder", TORCH_FOLDERS)
def test_a_folder_of_torch_imports_what_it_may(folder: str) -> None:
    may = allowed(f"torch/{folder}") | {f"torch/{folder}", "torch"}
    for path in sorted((PACKAGE / "torch" / folder).rglob("*.py")):
        for line, other in imported(path.read_text()):
            fine = other in PIPELINE or other in may
            assert fine, f"{path.relative_to(PACKAGE)}:{line} imports {other}"


def test_no_folders_import_each_other() -> None:
    graph = {folder: allowed(folder) for folder in FOLDERS if folder not in ("cli", "torch", "inputs")}
    graph |= {f"torch/{folder}": allowed(f"torch/{folder}") for folder in TORCH_FOLDERS}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def modules_imported(path: Path) -> set[str]:
    """Every name that may be a module which this one imports, for typing too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_no_modules_import_each_other() -> None:
    modules = {
        ".".join(("sparsam", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    graph = {name: modules_imported(path) & modules.keys() for name, path in modules.items()}
    assert graph["sparsam.pruner"] >= {"sparsam.selection", "sparsam.config"}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import sparsam.pruner", ["pruner"]),
        ("from sparsam.torch.layers import x", ["torch", "torch/layers"]),
        ("from sparsam import masks, _core\nimport numpy", ["masks", "_core"]),
        ("def f():\n    from sparsam import plot", ["plot"]),
        ("if TYPE_CHECKING:\n    import sparsam.plot", []),
    ],
)
def test_the_reading_itself(source: str, found: list[str]) -> None:
    assert [name for _, name in imported(source)] == found


@pytest.mark.parametrize("package", ["sparsam", "sparsam.checkpoint", "sparsam.torch"])
def test_names_on_demand_are_those_for_type_checkers(package: str) -> None:
    """What is imported late is found, listed, and comes from where a type checker thinks that it does."""
    module = importlib.import_module(package)
    source = Path(str(module.__file__)).read_text()
    typed = {
        alias.name: str(node.module)
        for branch in ast.walk(ast.parse(source))
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(module.__all__) <= {*vars(module), *typed}
    for name, home in typed.items():
        found = getattr(module, name)
        if not isinstance(found, ModuleType):
            assert found is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_importing_the_package_imports_no_more_than_the_pipeline() -> None:
    script = "import sys, sparsam; print([name.split('.')[1] for name in sys.modules if 'sparsam.' in name])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    others = {"analysis", "training", "reconstruction", "plot", "cli", "torch"}
    assert not others & set(ast.literal_eval(done.stdout))
