"""Small checkpoints, whole and damaged, that the tests of reading and writing share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sparsam import checkpoint

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES = ["bool", *INTEGERS, "float16", "float32", "float64"]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

GOLDEN_HEADER = (
    b'{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[8,16]}}'
)
GOLDEN_DATA = bytes.fromhex("0000803f 000000c0 803f 00c0 0000 003f")
GOLDEN = len(GOLDEN_HEADER).to_bytes(8, "little") + GOLDEN_HEADER + GOLDEN_DATA


def golden_weights() -> dict[str, NDArray[Any]]:
    return {
        "a": np.array([[1, -2], [0, 0.5]], BFLOAT16),
        "b": np.array([1, -2], np.float32),
    }


def assert_same(left: dict[str, NDArray[Any]], right: dict[str, NDArray[Any]]) -> None:
    assert list(left) == sorted(right)
    for name, array in left.items():
        assert (array.dtype, array.shape) == (right[name].dtype, right[name].shape), name
        assert array.tobytes() == right[name].tobytes(), name


def listing(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def write_raw(file: Path, header: bytes, data: int = 0) -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data))
    return file


def edit_index(folder: Path, **changes: Any) -> None:
    file = folder / checkpoint.INDEX_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
