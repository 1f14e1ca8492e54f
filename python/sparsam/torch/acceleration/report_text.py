"""A report as text of at most 100 columns and as HTML, with similar layers in one line."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence

from sparsam.inputs.display import as_html, printable
from sparsam.torch.acceleration.layer_row import LayerRow

__all__ = ["fold", "folded_name", "paragraphs", "table", "to_html"]

WIDTH = 100
_LAST, _LEAST = 20, 12  # characters for what was done: if columns can be left out for it, and in any case
_NAME = 24  # characters for the name, of which the end is shown
_SHOWN = 2  # shapes of inputs in a row of text
_LISTED = 4  # numbers in a name that are not a range
_NUMBER = re.compile(r"\d+")

Group = Sequence[LayerRow]

# The columns of a line of similar layers; below, the order in which they are left out if it gets too long.
_COLUMNS: dict[str, Callable[[Group], str]] = {
    "layer": lambda rows: folded_name([row.name for row in rows]),
    "kind": lambda rows: rows[0].kind,
    "shape": lambda rows: "x".join(map(str, rows[0].shape)),
    "input x calls": lambda rows: _inputs(rows[0]),
    "density": lambda rows: _number(_mean(row.density for row in rows), ".3f"),
    "pattern": lambda rows: "/".join(dict.fromkeys(row.pattern for row in rows)),
    "kernel": lambda rows: "/".join(dict.fromkeys(row.kernel for row in rows)),
    "dense ms": lambda rows: _number(_sum(row.dense_ms for row in rows), ".3f"),
    "sparse ms": lambda rows: _number(_sum(row.sparse_ms for row in rows), ".3f"),
    "gain": lambda rows: _number(_gain(rows), ".2f"),
    "what was done": lambda rows: _done(rows[0]),
}
_DISPENSABLE = ("pattern", "input x calls", "kind", "kernel", "density")
_RIGHT = {"density", "dense ms", "sparse ms", "gain"}


def fold(rows: Iterable[LayerRow]) -> list[Group]:
    """Groups similar layers: those that differ only in their times and in numbers in their names."""
    groups: dict[object, list[LayerRow]] = {}
    for row in rows:
        name, reason = (_NUMBER.sub("0", text) for text in (row.name, row.reason))
        key = (name, row.kind, row.shape, row.inputs, row.activation, row.swapped, reason)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def folded_name(names: Sequence[str]) -> str:
    """Names that differ only in numbers, as one: `layer.{0-5}.query  x6`; control characters are escaped."""
    if len(names) == 1:
        return printable(names[0])
    texts = _NUMBER.split(names[0])
    columns = zip(*(_NUMBER.findall(name) for name in names), strict=True)
    parts = [texts[0]]
    for numbers, text in zip(columns, texts[1:], strict=True):
        parts += [_several(sorted(set(map(int, numbers)))), text]
    return f"{printable(''.join(parts))}  x{len(names)}"


def table(rows: Iterable[LayerRow]) -> list[str]:
    """The lines of an aligned table, at most `WIDTH` columns wide."""
    groups = fold(rows)
    cells = {title: [title, *(show(group) for group in groups)] for title, show in _COLUMNS.items()}
    *_, last = cells
    for title in _DISPENSABLE:
        if _room(cells, last) >= min(_width(cells[last]), _LAST):
            break
        del cells[title]
    missing = _LEAST - _room(cells, last)
    if missing > 0:
        width = max(_NAME, _width(cells["layer"]) - missing)
        cells["layer"] = [_shortened(name, width) for name in cells["layer"]]
    done = [textwrap.wrap(text, max(_LEAST, _room(cells, last))) or [""] for text in cells.pop(last)]
    columns = [
        [cell.rjust(_width(column)) if title in _RIGHT else cell.ljust(_width(column)) for cell in column]
        for title, column in cells.items()
    ]
    lines = []
    for start, (first, *more) in zip(map("  ".join, zip(*columns, strict=True)), done, strict=True):
        lines += [f"{start}  {first}".rstrip(), *(f"{' ' * len(start)}  {text}" for text in more)]
    rule = "-" * max(map(len, lines))
    return [lines[0], rule, *lines[1:], rule]


def paragraphs(lines: Iterable[str]) -> list[str]:
    """The lines, wrapped where they are too long."""
    return [
        part for line in lines for part in textwrap.wrap(printable(line), WIDTH, subsequent_indent=" " * 9)
    ]


def to_html(rows: Iterable[LayerRow], lines: Iterable[str]) -> str:
    """A table with all columns, and lines under it."""
    head = "".join(f"<th>{as_html(title)}</th>" for title in _COLUMNS)
    body = ""
    for group in fold(rows):
        cells = "".join(f"<td>{as_html(show(group))}</td>" for show in _COLUMNS.values())
        body += f"<tr>{cells}</tr>\n"
    text = "<br/>\n".join(as_html(line) for line in lines)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n<p>{text}</p>"


def _room(cells: dict[str, list[str]], last: str) -> int:
    """Columns that are left for the last cells."""
    return WIDTH - sum(_width(column) + 2 for title, column in cells.items() if title != last)


def _width(column: Iterable[str]) -> int:
    return max(map(len, column))


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else f"...{name[len(name) - width + 3 :]}"


def _several(numbers: Sequence[int]) -> str:
    """Numbers as they are shown in a name: a single one, a range, or a list."""
    first, final = numbers[0], numbers[-1]
    if first == final:
        return str(first)
    if final - first + 1 == len(numbers):
        return f"{{{first}-{final}}}"
    listed = [*map(str, numbers[: _LISTED - 1]), "..", str(final)]
    return f"{{{','.join(map(str, numbers) if len(numbers) <= _LISTED else listed)}}}"


def _inputs(row: LayerRow) -> str:
    shown = [f"{'x'.join(map(str, shape))} x {calls}" for shape, calls in row.inputs[:_SHOWN]]
    more = len(row.inputs) - _SHOWN
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _done(row: LayerRow) -> str:
    if not row.swapped:
        return printable(row.reason)
    return f"swapped, {row.activation} fused" if row.activation else "swapped"


def _gain(rows: Group) -> float | None:
    dense, packed = _sum(row.dense_ms for row in rows), _sum(row.sparse_ms for row in rows)
    return dense / packed if dense is not None and packed else None


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
