"""What the library says: through its logger where a program listens, else on stdout, never unasked."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import sparsam
from sparsam import checkpoint
from sparsam.inputs.messages import LOGGER, say


@pytest.fixture
def untouched() -> Iterator[None]:
    """Logging as a fresh process has it; pytest's own handlers come back afterwards."""
    handlers, level = logging.root.handlers[:], logging.root.level
    logging.root.handlers.clear()
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def test_without_logging_it_is_written(untouched: None, capsys: pytest.CaptureFixture[str]) -> None:
    say("one\ntwo")
    assert capsys.readouterr() == ("one\ntwo\n", "")


@pytest.mark.parametrize(("level", "written"), [(logging.INFO, ""), (logging.WARNING, "100 %\n")])
def test_with_logging_it_is_logged_if_that_is_wanted(
    level: int, written: str, untouched: None, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign, assignment]
    logging.root.addHandler(handler)
    logging.root.setLevel(level)
    say("100 %")
    assert capsys.readouterr() == (written, "")
    assert [(record.name, record.getMessage()) for record in seen] == (
        [] if written else [("sparsam", "100 %")]
    )


def test_what_killed_processes_left_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left = tmp_path / ".m.safetensors.0123abcd.tmp"
    left.mkdir()
    (left / "lock").touch()
    with caplog.at_level(logging.INFO, "sparsam"):
        checkpoint.save(tmp_path / "m.safetensors", {"a": np.ones(2)})
    assert f"removing {str(left)!r}, which a process that ended left" in caplog.text


def test_the_logger_of_a_library_has_no_handler_that_writes() -> None:
    assert [type(handler) for handler in LOGGER.handlers] == [logging.NullHandler]
    assert LOGGER.level == logging.NOTSET


def test_nothing_prints() -> None:
    for file in Path(sparsam.__file__).parent.rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), file
