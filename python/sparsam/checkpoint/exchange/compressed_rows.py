"""One sparse matrix in a file: scipy.sparse's `.npz`, and the Deep Learning Matrix Collection's `.smtx`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam.checkpoint.exchange.bitmask import shape_of
from sparsam.checkpoint.locks import real_path
from sparsam.inputs.checks import expected

__all__ = ["is_scipy", "pattern_head", "read_pattern", "read_scipy", "write_pattern", "write_scipy"]

_AGAIN = "get the file again"


def is_scipy(content: Mapping[str, NDArray[Any]]) -> bool:
    """Returns whether arrays by name are what `scipy.sparse.save_npz` writes."""
    return {"format", "shape", "data"} <= content.keys() and content["format"].ndim == 0


def read_scipy(name: str, content: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Returns the dense matrix from SciPy's csr, csc, coo, bsr or dia; duplicate entries are summed.

    Raises:
        ValueError: Another format; parts that are missing, or do not fit together.
    """
    kind = content["format"].item()
    kind = kind.decode("ascii", "replace") if isinstance(kind, bytes) else str(kind)
    if kind not in _READERS:
        raise ValueError(
            expected(f"{name}: format", kind, f"one of {', '.join(_READERS)}", "convert it to csr")
        )
    shape, data = shape_of(name, content["shape"]), content["data"]
    if len(shape) != 2 or data.dtype.kind not in "fbiu":
        msg = f"{name}: expected a matrix of real numbers; got {data.dtype} {list(shape)}; {_AGAIN}"
        raise ValueError(msg)
    try:
        return _READERS[kind](shape, data, content)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        msg = f"{name}: expected the parts of a {kind} matrix; got others ({error}); {_AGAIN}"
        raise ValueError(msg) from error


def write_scipy(file: Path, array: NDArray[Any]) -> None:
    """Writes a matrix as `scipy.sparse.save_npz` writes a csr_matrix; TypeError for bfloat16."""
    if array.dtype.kind not in "fbiu":
        msg = f"{file}: expected a dtype of NumPy's own; got {array.dtype}; convert it with .astype()"
        raise TypeError(msg)
    pointers, columns = _compressed(array)
    with file.open("wb") as handle:
        np.savez_compressed(
            handle,
            indices=columns.astype(np.int32),
            indptr=pointers.astype(np.int32 if pointers[-1] < 1 << 31 else np.int64),
            format=np.array(b"csr"),
            shape=np.array(array.shape),
            data=array[array != 0],
        )


def pattern_head(file: Path) -> tuple[tuple[int, int], int]:
    """Returns the shape and number of entries in the first line of a `.smtx` file; ValueError if damaged."""
    real_path(file)
    if file.exists() and not file.is_file():
        msg = f"{file}: expected a regular file; got a folder, pipe or device; name another"
        raise ValueError(msg)
    with file.open(encoding="ascii", errors="replace") as lines:
        head = lines.readline(200)
    try:
        rows, cols, count = map(int, head.split(","))
        if min(rows, cols, count) < 0 or rows * cols >= 1 << 46:
            raise ValueError
    except ValueError:
        wanted = "a first line `rows, columns, nonzeros`"
        raise ValueError(expected(str(file), head[:80], wanted, _AGAIN)) from None
    return (rows, cols), count


def read_pattern(file: Path) -> NDArray[np.bool_]:
    """Returns where a `.smtx` file has entries; it holds no values.

    Raises:
        ValueError: It is damaged.
        OSError: It cannot be read.
    """
    shape, count = pattern_head(file)
    lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    try:
        pointers, columns = (np.array(line.split(), np.int64) for line in (*lines[1:], "", "")[:2])
    except (ValueError, OverflowError) as error:
        msg = f"{file}: expected integers in the second and third line; got others ({error}); {_AGAIN}"
        raise ValueError(msg) from None
    counts = np.diff(pointers)
    fits = len(counts) == shape[0] and (counts >= 0).all() and counts.sum() == len(columns) == count
    if not fits or ((columns < 0) | (columns >= shape[1])).any():
        msg = (
            f"{file}: expected {count} column numbers in {shape[0]} rows of {shape[1]}; got others; {_AGAIN}"
        )
        raise ValueError(msg)
    pattern = np.zeros(shape, np.bool_)
    pattern[np.repeat(np.arange(shape[0]), counts), columns] = True
    if np.count_nonzero(pattern) != count:
        msg = f"{file}: expected each column once in a row; got one twice; {_AGAIN}"
        raise ValueError(msg)
    return pattern


def write_pattern(file: Path, array: NDArray[Any]) -> None:
    """Writes where a matrix is not zero as a `.smtx` file."""
    pointers, columns = _compressed(array)
    head = f"{array.shape[0]}, {array.shape[1]}, {len(columns)}"
    lines = [head, *(" ".join(map(str, line.tolist())) for line in (pointers, columns))]
    file.write_text("\n".join(lines) + "\n", encoding="ascii")


def _compressed(array: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each row begins, and the columns of its entries."""
    rows, columns = np.nonzero(array)
    counts = np.bincount(rows, minlength=array.shape[0])
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), columns


Reader = Callable[[tuple[int, int], NDArray[Any], Mapping[str, NDArray[Any]]], NDArray[Any]]


def _coo(shape: tuple[int, int], data: NDArray[Any], content: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    row, col = (content["row"], content["col"]) if "row" in content else content["coords"]
    return _scattered(shape, data, row, col)


def _csr(shape: tuple[int, int], data: NDArray[Any], content: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    return _scattered(shape, data, _owners(content, shape[0]), content["indices"])


def _csc(shape: tuple[int, int], data: NDArray[Any], content: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    return _scattered(shape, data, content["indices"], _owners(content, shape[1]))


def _bsr(shape: tuple[int, int], data: NDArray[Any], content: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    _, height, width = data.shape
    if not height or not width or shape[0] % height or shape[1] % width:
        msg = f"blocks: expected some that divide {list(shape)}; got {[height, width]}; {_AGAIN}"
        raise ValueError(msg)
    row = _owners(content, shape[0] // height)[:, None, None] * height + np.arange(height)[:, None]
    col = content["indices"].astype(np.int64)[:, None, None] * width + np.arange(width)
    row, col, data = np.broadcast_arrays(row, col, data)
    return _scattered(shape, data.ravel(), row.ravel(), col.ravel())


def _dia(shape: tuple[int, int], data: NDArray[Any], content: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    offsets = content["offsets"].astype(np.int64)
    if data.ndim != 2 or offsets.shape != (len(data),):
        msg = f"diagonals: expected an offset for each; got {list(offsets.shape)}; {_AGAIN}"
        raise ValueError(msg)
    col = np.broadcast_to(np.arange(data.shape[1]), data.shape)
    row = col - offsets[:, None]
    inside = (row >= 0) & (row < shape[0]) & (col < shape[1])
    return _scattered(shape, data[inside], row[inside], col[inside])


_READERS: dict[str, Reader] = {"csr": _csr, "csc": _csc, "coo": _coo, "bsr": _bsr, "dia": _dia}


def _owners(content: Mapping[str, NDArray[Any]], lines: int) -> NDArray[np.int64]:
    """Of each entry, the row (csr) or column (csc) that holds it."""
    starts: NDArray[np.int64] = content["indptr"].astype(np.int64)
    counts: NDArray[np.int64] = starts[1:] - starts[:-1]
    if len(counts) != lines or (counts < 0).any() or counts.sum() != len(content["indices"]):
        msg = f"indptr: expected {lines + 1} rising numbers up to that of the entries; got others; {_AGAIN}"
        raise ValueError(msg)
    return np.repeat(np.arange(lines), counts)


def _scattered(
    shape: tuple[int, int], data: NDArray[Any], row: NDArray[Any], col: NDArray[Any]
) -> NDArray[Any]:
    if not data.shape == row.shape == col.shape:
        msg = f"entries: expected as many places as values; got {row.shape}, {data.shape}; {_AGAIN}"
        raise ValueError(msg)
    row, col = row.astype(np.int64), col.astype(np.int64)
    if ((row < 0) | (row >= shape[0]) | (col < 0) | (col >= shape[1])).any():
        msg = f"entries: expected places in {list(shape)}; got others; {_AGAIN}"
        raise ValueError(msg)
    array = np.zeros(shape, data.dtype)
    np.add.at(array, (row, col), data)
    return array
