"""The application: the commands of all groups, and how errors and warnings are reported."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import typer
from rich.console import Console

from sparsam.cli import analysis, benchmarks, compression, demos, machine, pruning
from sparsam.report import printable

__all__ = ["run"]

# The base of all errors in arguments: click's class, or the copy of it that newer versions of typer carry.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Prune neural-network weights exactly.", add_completion=False, pretty_exceptions_enable=False
)
for group in (demos, pruning, compression, analysis, benchmarks, machine):
    group.register(app)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code: 2, and a line on stderr, for whatever the user can correct."""
    command = typer.main.get_command(app)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        try:
            code = command.main(arguments, prog_name="sparsam", standalone_mode=False)
        except _UsageError as error:
            context = getattr(error, "ctx", None)
            where = context.command_path if context else "sparsam"
            text: str = error.format_message().rstrip(".")  # type: ignore[attr-defined]
            return _complain(f"{text}; see {where} --help")
        except (ValueError, TypeError, OSError, MemoryError) as error:
            return _complain(str(error) or type(error).__name__)
        except (typer.Abort, KeyboardInterrupt):
            return 130
    return code if isinstance(code, int) else 0


def _complain(message: str) -> int:
    """Prints the message as one line on stderr and returns the exit code."""
    Console(stderr=True).out("sparsam:", printable(" ".join(message.split())), highlight=False)
    return 2


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _complain(f"warning: {message}")
