"""Every error that the package and its core raise says `WHAT: expected X; got Y; do Z`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import sparsam
from messages import FORM
from sparsam import _core

PACKAGE = Path(sparsam.__file__).parent
# Messages that have another form, by how they begin, with the reason.
EXCEPTIONS = {
    "{error}": "another error's message, which has the form, under another class",
    "in the worker:": "what came from another process, with its traceback",
    "{type(error).__name__}": "an error of another process that cannot be pickled",
    "{type(self).__name__} object has no attribute": "Python's own words",
    "module {package} has no attribute": "Python's own words",
    "environment variable {variable}: {error}": "the core's message, which has the form",
}
# What only a fault of this package can cause.
OWN_FAULT = "; please report this"
RAISED = {"ValueError", "TypeError", "RuntimeError", "ImportError", "OSError", "AttributeError"}


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every message given to one of RAISED; placeholders stand as {source}."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    functions = {node.name: node for node in found}
    imported = {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    constants = {
        ast.unparse(target): [node.value]
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
    }
    for function in found:
        earlier = 0
        for call in sorted(errors(function), key=lambda call: call.lineno):
            argument = call.args[0]
            sources = [argument]
            if isinstance(argument, ast.Name) and argument.id in imported:
                continue  # checked where it is defined
            if isinstance(argument, ast.Name):  # msg = f"..."; raise ValueError(msg)
                sources = [
                    node.value
                    for node in ast.walk(function)
                    if isinstance(node, ast.Assign)
                    and earlier < node.lineno < call.lineno
                    and argument.id in [ast.unparse(target) for target in node.targets]
                ]
                sources = sources or constants.get(argument.id, [])
                assert sources, f"line {call.lineno}: no assignment to {argument.id} found"
                earlier = call.lineno
            for source in sources:
                yield from ((call.lineno, text) for text in texts(source, functions))


def errors(function: ast.FunctionDef) -> Iterator[ast.Call]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in RAISED and node.args:
            yield node


def texts(node: ast.AST, functions: dict[str, ast.FunctionDef]) -> Iterator[str]:
    """All that an expression can say."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"  # type: ignore[attr-defined,misc]
                for part in parts
            )
        case ast.IfExp(body=one, orelse=other):
            yield from texts(one, functions)
            yield from texts(other, functions)
        case ast.Call(func=ast.Name(id="expected")):  # the shared helper of inputs/checks.py
            yield "WHAT: expected X; got Y; do Z" if len(node.args) == 4 else f"{{{ast.unparse(node)}}}"
        case ast.Call(func=ast.Name(id=name)) if name in functions:
            others = {key: value for key, value in functions.items() if key != name}
            returned = [
                text
                for found in ast.walk(functions[name])
                if isinstance(found, ast.Return) and found.value is not None
                for text in texts(found.value, others)
            ]
            yield from returned or [f"{{{ast.unparse(node)}}}"]
        case _:
            yield f"{{{ast.unparse(node)}}}"


@pytest.mark.parametrize(
    "name", sorted(file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py"))
)
def test_errors_have_one_form(name: str) -> None:
    source = (PACKAGE / name).read_text()
    wrong = [
        f"{name}:{line}: {text}"
        for line, text in messages(ast.parse(source))
        if not (FORM.fullmatch(text) or text.startswith(tuple(EXCEPTIONS)) or text.endswith(OWN_FAULT))
    ]
    assert not wrong, "expected WHAT: expected X; got Y; do Z; got:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "good"),
    [
        ("raise ValueError(f'{name}: expected one; got {n}; take one')", True),
        ("raise ValueError(f'{name}: expected one; got {n}')", False),
        ("raise ValueError(f'{name}: expected one, got {n}')", False),
        ("raise TypeError('no form')", False),
        ("msg = 'no form'\n raise ValueError(msg)", False),
        ("msg = 'a: expected b; got c; do d'\n raise ValueError(msg)", True),
        ("msg = 'a: expected b; got c' if f else 'bad'\n raise ValueError(msg)", False),
        ("raise ValueError(expected('a', 1, 'b', 'c'))", True),
        ("raise ValueError(expected('a', 1, 'b'))", False),
        ("raise ValueError(f())", False),
        ("return 'a: expected b; got c; do d'\n raise ValueError(f())", True),
        ("return ValueError('bad')", False),
    ],
)
def test_the_check_itself(source: str, *, good: bool) -> None:
    found = list(messages(ast.parse(f"def f():\n {source}")))
    assert found
    assert all(bool(FORM.fullmatch(text)) for _, text in found) is good


CORE = Path(__file__).parents[2] / "cpp"
# What C++ throws; `expected` of errors.hpp takes the four parts of the form, and the compiler counts them.
THROWN = re.compile(r"\bthrow\s+([\w:]+)\s*\(\s*(\w*)")
OTHERS = {"std::bad_alloc", "py::error_already_set"}  # which have no message of ours
MADE = {"expected", "fault"}  # a fault's text is made by `expected` where it is found


def strays(source: str) -> list[str]:
    """What a C++ source throws whose message is not made by `expected`."""
    return [
        f"{thrown[1]}({thrown[2]}"
        for thrown in THROWN.finditer(re.sub(r"//[^\n]*", "", source))
        if thrown[1] not in OTHERS and thrown[2] not in MADE
    ]


def test_errors_of_the_core_have_the_form() -> None:
    files = sorted(file for ending in ("*.cpp", "*.hpp") for file in CORE.rglob(ending))
    found = {file.name: strays(file.read_text()) for file in files}
    assert {name: thrown for name, thrown in found.items() if thrown} == {}
    assert sum("throw" in file.read_text() for file in files) > 10


@pytest.mark.parametrize(
    ("source", "good"),
    [
        ('throw py::value_error(expected("a", 1, "b", "c"));', True),
        ('throw std::invalid_argument(\n      expected("a", quoted(b), "c", "d"));', True),
        ("throw std::bad_alloc();", True),
        ('throw py::value_error("bad");', False),
        ('throw std::invalid_argument(what + ": bad");', False),
        ('throw py::type_error(std::string(name) + " is bad");', False),
    ],
)
def test_the_check_of_the_core(source: str, *, good: bool) -> None:
    assert bool(strays(source)) is not good


def test_a_message_of_the_core() -> None:
    array = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match=FORM) as caught:
        _core.threshold([array], 5)
    assert str(caught.value) == "k: expected 1 to 4, the elements; got 5; pass another"
    with pytest.raises(TypeError, match=FORM):
        _core.count_nonzero(array.astype(np.int64))
    array.flags.writeable = False
    with pytest.raises(ValueError, match=r"out: expected a writeable array; got one that is read-only; pass"):
        _core.threshold_masks([array], [2], [array])
