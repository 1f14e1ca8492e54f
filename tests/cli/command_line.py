"""Commands, run in this process, and what they print."""

from __future__ import annotations

import re

import pytest

from sparsam.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Standard output, less colours, of a command that must succeed in silence."""
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return re.sub(r"\x1b\[[0-9;]*m", "", captured.out)


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on standard error of a command that must fail."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sparsam: ")
    assert captured.err.count("\n") == 1
    return captured.err
