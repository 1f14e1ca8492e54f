"""Where the tensors of a safetensors file lie: its header, read and checked without the data.

Tensors of dtypes that this package does not know can still be located and copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from sparsam.checkpoint.safetensors_format import DTYPES, check_number, check_regular, misfit

__all__ = ["Entry", "Layout", "read_layout"]

_LONGEST_HEADER = 100_000_000
"""Bytes of the longest header that the safetensors library accepts."""

_WIDTHS = {name: np.dtype(kind).itemsize for name, kind in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a file; `begin` and `end` count bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """How many bytes the tensor has."""
        return self.end - self.begin

    @property
    def numpy_dtype(self) -> np.dtype[Any] | None:
        """Its dtype in NumPy; None if NumPy lacks it."""
        return np.dtype(DTYPES[self.dtype]) if self.dtype in DTYPES else None


@dataclass(frozen=True)
class Layout:
    """A file's header.

    Attributes:
        file: The file.
        head: Its first bytes, up to the data: the length of the header and the header.
        entries: The tensors in the order of their data.
        metadata: The text stored beside them.
        mtime_ns: When the file was changed last.
    """

    file: Path
    head: bytes
    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    mtime_ns: int

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.entries[-1].end if self.entries else len(self.head)


def read_layout(file: Path) -> Layout:
    """Reads the header of a file.

    Raises:
        ValueError: The file is truncated, damaged, hostile or of another kind.
        OSError: It cannot be read.
    """
    check_regular(file)
    with file.open("rb") as raw:
        start = raw.read(32)
        raw.seek(0, 2)
        size = raw.tell()
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise misfit(file, start, size, f"a header of {length} bytes")
        raw.seek(0)
        head = raw.read(8 + length)
    check_number(file, head)
    try:
        content = msgspec.json.decode(head[8:], type=dict[str, dict[str, Any]])
        metadata = msgspec.convert(content.pop("__metadata__", {}), dict[str, str])
        entries = sorted(
            (_entry(name, fields, len(head)) for name, fields in content.items()), key=lambda e: (e[3], e[4])
        )
        _check_gaps(entries, len(head), size)
    except (msgspec.MsgspecError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise misfit(file, start, size, str(error)) from error
    return Layout(file, head, tuple(entries), metadata, file.stat().st_mtime_ns)


def _entry(name: str, fields: dict[str, Any], offset: int) -> Entry:
    dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    integers = (*shape, begin, end)
    if type(dtype) is not str or not all(type(i) is int and 0 <= i < 1 << 63 for i in integers):
        msg = f"tensor {name!r}: expected a dtype, a shape and offsets; got {fields!r}; get it again"
        raise ValueError(msg)
    width = _WIDTHS.get(dtype)
    if begin > end or (width is not None and math.prod(shape) * width != end - begin):
        msg = f"tensor {name!r}: expected the bytes of {dtype} {shape}; got {end - begin}; get it again"
        raise ValueError(msg)
    return Entry(name, dtype, tuple(shape), offset + begin, offset + end)


def _check_gaps(entries: list[Entry], start: int, size: int) -> None:
    at = start
    for entry in entries:
        if entry.begin != at:
            msg = f"tensor {entry.name!r}: expected it to begin at {at}; got {entry.begin}; get it again"
            raise ValueError(msg)
        at = entry.end
    if at != size:
        msg = f"data: expected the file to end at {at}; got {size}; get it again"
        raise ValueError(msg)
