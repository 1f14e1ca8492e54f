"""The output of the command line, and its progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sparsam.inputs.display import printable


class Interrupted(Exception):
    """Ctrl-C, with what was kept of the work; not a KeyboardInterrupt, which typer would handle itself."""


@contextmanager
def kept(what: str) -> Iterator[None]:
    """Reports what is kept of the block's work if it is interrupted."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(what) from error


class _Description(ProgressColumn):
    """The current step; names in it come from files, and are shown literally."""

    def render(self, task: Task) -> Text:
        return Text(printable(task.description))


def progress(*, alive: bool = True) -> Progress:
    """A progress bar on stderr, if that is a terminal; it is removed at the end.

    Args:
        alive: Whether it updates the elapsed time by itself; otherwise it is drawn when `refresh` is called.
    """
    columns = (_Description(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    silent = not sys.stderr.isatty()
    console = Console(
        stderr=True, quiet=silent
    )  # rich before 14.3 ends even a disabled bar with an empty line
    return Progress(*columns, console=console, transient=True, disable=silent, auto_refresh=alive)


def note(text: str) -> None:
    """Prints a line on stderr."""
    Console(stderr=True).out("sparsam:", printable(text), highlight=False)


def print_text(text: str) -> None:
    """Prints the text as it is."""
    Console().out(text, highlight=False)


def print_json(value: object) -> None:
    """Prints a value as JSON."""
    print_text(json.dumps(value, indent=2))


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, texts: int = 0) -> None:
    """Prints a table, as wide as it must be: `texts` columns of text, then numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < texts else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    console = Console(highlight=False)
    console.width = Measurement.get(console, console.options.update(width=10_000), table).maximum
    console.print(table)
