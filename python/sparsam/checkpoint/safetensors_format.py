"""One safetensors file, through the library that validates it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - the library asks NumPy for "bfloat16", which this import makes known
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

# The dtypes that every supported version of the library reads and writes: the format's name and NumPy's.
DTYPES = {
    "BOOL": "bool",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}

_SAVE = "convert it with safetensors.torch.save_file"

# The first bytes of files that are mistaken for checkpoints, what the files are, and what to do.
_FOREIGN = {
    b"\x93NUMPY": ("a NumPy file", "convert it with safetensors.numpy.save_file"),
    b"\x89HDF": ("an HDF5 file", "export the model as safetensors"),
    b"GGUF": ("a GGUF file", "take the safetensors that it was made from"),
    b"version https://git-lfs": (
        "a Git LFS pointer, not the file itself",
        "fetch the file with git lfs pull",
    ),
}


_MAX_TENSORS = 200_000
_MANY_BYTES = 40 * _MAX_TENSORS  # No header that is shorter names so many.


def check_regular(file: Path) -> None:
    """Raises ValueError for an existing path that is not a file: a folder, pipe or endless device."""
    if file.exists() and not file.is_file():
        msg = f"{file}: expected a safetensors file; got a folder, pipe or device; name a regular file"
        raise ValueError(msg)


def check_number(file: Path, header: bytes) -> None:
    """Raises ValueError for a header with more tensors than any model has, which takes minutes to parse."""
    number = header.count(b'"data_offsets"')
    if number > _MAX_TENSORS:
        msg = f"{file}: expected at most {_MAX_TENSORS} tensors; got {number}; split the file"
        raise ValueError(msg)


def misfit(file: Path, head: bytes, size: int, problem: str) -> ValueError:
    """Returns the error for a file that is not safetensors, which says what the file is.

    Args:
        file: The file.
        head: Its first 32 bytes, or fewer.
        size: Its size in bytes.
        problem: What is wrong if it is damaged.
    """
    damaged = (f"{size} bytes, truncated or damaged ({problem})" if size else "an empty file"), "get it again"
    came, todo = next((what for start, what in _FOREIGN.items() if head.startswith(start)), damaged)
    if head.startswith(b"PK\x03\x04"):
        came, todo = _archive(file)
    elif _is_pickle(head):
        came, todo = "a Python pickle", _SAVE
    return ValueError(f"{file}: expected a safetensors file; got {came}; {todo}")


def _archive(file: Path) -> tuple[str, str]:
    """What a zip archive is, and what to do."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a damaged zip archive", "get it again"
    if any(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)", "convert it with safetensors.numpy.save_file"
    if any(name.endswith("data.pkl") for name in names):
        return "a zip archive, as torch.save writes it", _SAVE
    return "a zip archive", "unpack it, and name a safetensors file"


def _is_pickle(head: bytes) -> bool:
    """Whether a file is a pickle of protocol 2 to 5, not safetensors whose header length begins alike."""
    if head[:1] != b"\x80" or head[1:2] not in (b"\2", b"\3", b"\4", b"\5") or head[8:9] == b"{":
        return False
    return head[2:3] == b"\x95" or any(head[4:8]) or len(head) < 16


@contextmanager
def open_file(file: Path, framework: str = "np") -> Iterator[Any]:
    """Opens a file for `tensors` and for the library's keys() and metadata(), its header validated.

    Args:
        file: The file.
        framework: What tensors to give, "np" or "pt".

    Raises:
        ValueError: The file is truncated, damaged or of another kind.
        OSError: It cannot be read.
    """
    check_regular(file)
    with file.open("rb") as raw:
        head, size = raw.read(32), os.fstat(raw.fileno()).st_size
        length = int.from_bytes(head[:8], "little")
        if _MANY_BYTES < length < size:
            raw.seek(8)
            check_number(file, raw.read(length))
    try:
        handle = safe_open(file, framework=framework)
    except SafetensorError as error:
        raise misfit(file, head, size, str(error)) from error
    with handle:
        yield handle


def tensors(file: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yields the tensors of a file by name, each read only when it is needed."""
    with open_file(file) as handle:
        for name in sorted(handle.keys()):
            part = handle.get_slice(name)
            dtype = part.get_dtype()
            if dtype not in DTYPES:
                msg = (
                    f"{file}: tensor {name!r}: expected one of {', '.join(DTYPES)}; got {dtype}; "
                    "convert it, or leave it out of the file"
                )
                raise ValueError(msg)
            try:
                array = handle.get_tensor(name)
            except (ValueError, OverflowError, SafetensorError) as error:
                msg = (
                    f"{file}: tensor {name!r}: expected a shape that NumPy can hold; got {part.get_shape()} "
                    f"({error}); get the file again"
                )
                raise ValueError(msg) from error
            yield name, array


def storable(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """The array in C order, which is what `write` needs.

    Raises:
        TypeError: A dtype that the format lacks.
        ValueError: The name is `__metadata__`, which the format reserves.
    """
    array = np.asarray(array, order="C")
    if name == "__metadata__":
        msg = "tensor name: expected any but '__metadata__', which the format reserves; got that; rename it"
        raise ValueError(msg)
    if array.dtype.name not in DTYPES.values():
        expected = ", ".join(DTYPES.values())
        msg = f"tensor {name!r}: expected one of {expected}; got {array.dtype}; convert it with .astype"
        raise TypeError(msg)
    return array


def write(file: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Writes arrays that are `storable`.

    Raises:
        TypeError: Names or metadata that are not text.
        OSError: The file cannot be written.
    """
    try:
        save_file(dict(arrays), file, dict(metadata) or None)
    except SafetensorError as error:
        msg = (
            f"{file.parent}: expected to write {len(arrays)} tensors there; got {error}; make room there, or "
            "choose another place"
        )
        raise OSError(msg) from error
    except TypeError as error:
        msg = f"names, metadata: expected text only; got {metadata!r} ({error}); write numbers as text"
        raise TypeError(msg) from error
