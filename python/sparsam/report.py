"""What was pruned, tensor by tensor: as text, Markdown, JSON or plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam import _core
from sparsam.inputs.display import as_html, as_markdown, html_table, printable
from sparsam.inputs.dtypes import is_weight_dtype

_COLUMNS = ("tensor", "shape", "dtype", "pattern", "params", "pruned", "sparsity", "dense", "packed")
_TEXT_COLUMNS = ("tensor", "shape", "dtype", "pattern", "note")


@dataclass(frozen=True)
class LayerStats:
    """The statistics of one tensor.

    Attributes:
        name: The tensor's name.
        total_params: How many weights it has.
        pruned_params: How many of them were pruned; of a file that is inspected, how many are zero.
        sparsity: pruned_params / total_params; 0.0 for an empty tensor.
        shape: Its shape.
        dtype: Its dtype by name.
        pattern: The pattern as text, `str(pattern)`; "dense" for a tensor that was not pruned, "" where only
            the values are known.
        dense_bytes: Its size with every weight stored.
        packed_bytes: Its size as a bitmask and its nonzero weights, `ceil(n / 8) + nonzero * itemsize`, or
            dense_bytes where that is less.
    """

    name: str
    total_params: int
    pruned_params: int
    sparsity: float
    shape: tuple[int, ...] = ()
    dtype: str = ""
    pattern: str = ""
    dense_bytes: int = 0
    packed_bytes: int = 0


def measure(
    name: str,
    array: NDArray[Any],
    *,
    pruned: int | None = None,
    nonzero: int | None = None,
    pattern: str = "",
) -> LayerStats:
    """Returns the statistics of a tensor.

    Args:
        name: The tensor's name.
        array: The tensor; read only if `nonzero` is not given.
        pruned: How many weights were pruned; all zeros if left out.
        nonzero: How many weights are not zero, if already counted.
        pattern: The pattern as text.
    """
    if nonzero is None:
        nonzero = count_nonzero(array)
    if pruned is None:
        pruned = array.size - nonzero
    return row_of(name, array.shape, array.dtype, pruned, nonzero, pattern)


def count_nonzero(array: NDArray[Any]) -> int:
    """Returns how many elements are not zero."""
    count = _core.count_nonzero if is_weight_dtype(array.dtype) else np.count_nonzero
    return int(count(array))


def row_of(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], pruned: int, nonzero: int, pattern: str
) -> LayerStats:
    """Returns the statistics of a tensor whose weights were counted already."""
    size = math.prod(shape)
    dense = size * dtype.itemsize
    packed = min(dense, (size + 7) // 8 + nonzero * dtype.itemsize)
    share = pruned / size if size else 0.0
    return LayerStats(name, size, pruned, share, shape, dtype.name, pattern, dense, packed)


class Readable:
    """The base class of reports: dataclasses that `print` as text, and show the same in a notebook."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the attributes, in their order, as values that JSON can hold."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]

    def to_json(self, *, indent: int | None = 2) -> str:
        """Returns `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def _repr_html_(self) -> str:
        text = "\n".join(map(as_html, str(self).splitlines()))
        return f"<pre>{text}</pre>"


def plain(value: Any) -> Any:
    """Tuples as lists, dataclasses and named tuples as dicts, at every depth."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Report(Readable):
    """The statistics of all tensors, including those left dense. `print(report)` shows an aligned table."""

    layers: tuple[LayerStats, ...]

    def __init__(self, layers: Iterable[LayerStats]) -> None:
        object.__setattr__(self, "layers", tuple(layers))

    @classmethod
    def deferred(cls, layers: Callable[[], Iterable[LayerStats]]) -> Report:
        """Returns a report whose rows are made when they are first needed.

        To make 10,000 of them takes as long as to prune as many small tensors.
        """
        report = cls.__new__(cls)
        object.__setattr__(report, "_make_layers", layers)
        return report

    def __getattr__(self, name: str) -> Any:
        """The rows of a deferred report, which become an attribute."""
        make = self.__dict__.get("_make_layers")
        if name != "layers" or make is None:
            msg = f"{type(self).__name__!r} object has no attribute {name!r}"
            raise AttributeError(msg)
        layers = tuple(make())
        object.__setattr__(self, name, layers)
        object.__delattr__(self, "_make_layers")
        return layers

    @property
    def total(self) -> LayerStats:
        """The sums over all tensors, under the name "total"."""
        params = sum(layer.total_params for layer in self.layers)
        pruned = sum(layer.pruned_params for layer in self.layers)
        return LayerStats(
            "total",
            params,
            pruned,
            pruned / params if params else 0.0,
            dense_bytes=sum(layer.dense_bytes for layer in self.layers),
            packed_bytes=sum(layer.packed_bytes for layer in self.layers),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns `{"layers": [...], "total": {...}}` in plain types; keys in the order of `LayerStats`."""
        total = asdict(self.total)
        for absent in ("shape", "dtype", "pattern"):
            del total[absent]
        return {
            "layers": [asdict(layer) | {"shape": list(layer.shape)} for layer in self.layers],
            "total": total,
        }

    def to_markdown(self) -> str:
        """Returns a Markdown table whose last row is the total."""
        rows = [
            self._columns(),
            tuple("---" if _is_text(column) else "---:" for column in self._columns()),
            *(tuple(map(as_markdown, row)) for row in self._rows()),
        ]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def _repr_html_(self) -> str:
        """The table, as notebooks show it."""
        columns = self._columns()
        texts = tuple(i for i, column in enumerate(columns) if _is_text(column))
        return html_table(columns, self._rows(), texts)

    def __str__(self) -> str:
        columns = self._columns()
        rows = [columns, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if _is_text(column) else cell.rjust(width)
                for column, cell, width in zip(columns, row, widths, strict=True)
            ).rstrip()
            for row in rows
        ]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])

    def _columns(self) -> tuple[str, ...]:
        return _COLUMNS

    def _rows(self) -> list[tuple[str, ...]]:
        return [_cells(layer) for layer in (*self.layers, self.total)]


def _cells(layer: LayerStats) -> tuple[str, ...]:
    return (
        printable(layer.name),
        "x".join(map(str, layer.shape)),
        layer.dtype,
        layer.pattern,
        f"{layer.total_params:,}",
        f"{layer.pruned_params:,}",
        f"{100 * layer.sparsity:.2f} %",
        readable_size(layer.dense_bytes),
        readable_size(layer.packed_bytes),
    )


def _is_text(column: str) -> bool:
    return column in _TEXT_COLUMNS


def readable_size(num_bytes: int) -> str:
    """Returns a number of bytes as text in a suitable unit."""
    if num_bytes < 1024:
        return f"{num_bytes} B"
    size, unit = num_bytes / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f} {unit}"
