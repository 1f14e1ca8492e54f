"""No module has the name of a function or class that it exports, and no attribute hides a module."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

import sparsam

PACKAGE = Path(sparsam.__file__).parent
MODULES = sorted(
    ".".join(("sparsam", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if path.name not in {"__init__.py", "__main__.py"}
)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_exports_no_name_of_its_own(module: str) -> None:
    path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    defined = {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }
    assert module.rpartition(".")[2] not in defined


@pytest.mark.parametrize("module", MODULES)
def test_no_attribute_hides_a_module(module: str) -> None:
    found = importlib.import_module(module)
    reached: ModuleType = sparsam
    for name in module.split(".")[1:]:
        reached = getattr(reached, name)
    assert reached is found
