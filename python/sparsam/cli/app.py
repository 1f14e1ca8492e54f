"""The application: the commands of all groups, and how errors and warnings are reported."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from sparsam import __version__
from sparsam.cli import analysis, benchmarks, compression, conversion, demos, machine, pruning
from sparsam.cli.console import Interrupted, print_text
from sparsam.inputs.display import printable

__all__ = ["run"]

# The base of all errors in arguments: click's class, or the copy of it that newer versions of typer carry.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

# The errors of a wrong path, which the user can correct, as opposed to failures of the system.
_WRONG_PATHS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)

app = typer.Typer(
    help="Prune neural-network weights exactly.",
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed (disk full, no memory), 2 something to correct, 130 interrupted.",
)


@app.callback()
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Prune neural-network weights exactly."""
    if version:
        print_text(f"sparsam {__version__}")
    elif context.invoked_subcommand is None:
        print_text(context.get_help())


for group in (demos, pruning, conversion, compression, analysis, benchmarks, machine):
    group.register(app)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code, with a line on stderr unless that is 0.

    2 is for errors that the user can correct in the command or its files, 1 for other failures (a full disk,
    too little memory), 130 for Ctrl-C.
    """
    command = typer.main.get_command(app)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the locale lacks are then escaped
            stream.reconfigure(errors="backslashreplace")
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
        except (ValueError, TypeError, *_WRONG_PATHS) as error:
            return _complain(str(error))
        except (OSError, MemoryError) as error:
            _complain(str(error) or type(error).__name__)
            return 1
        except Interrupted as error:
            _complain(f"interrupted; kept: {error}")
            return 130
        except (typer.Abort, KeyboardInterrupt):
            code = 130
    if code == 130:  # what some versions of typer return for Ctrl-C
        _complain("interrupted; kept: nothing new")
    return code if isinstance(code, int) else 0


def _complain(message: str) -> int:
    """Prints the message as one line on stderr and returns the exit code."""
    Console(stderr=True).out("sparsam:", printable(" ".join(message.split())), highlight=False)
    return 2


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _complain(f"warning: {message}")
