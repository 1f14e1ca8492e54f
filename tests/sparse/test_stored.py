"""SparseMatrix in files and pickles."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from matmul_cases import VALUES, check, inputs, weights
from sparsam import SparseMatrix, checkpoint


def golden() -> SparseMatrix:
    """Two rows of nine columns: 1, -2 at 0 and 8; 0.5 at 3."""
    w = np.zeros((2, 9), np.float32)
    w[0, 0], w[0, 8], w[1, 3] = 1, -2, 0.5
    return SparseMatrix.from_dense(w)


GOLDEN = (
    b'{"__metadata__":{"sparsam":"SparseMatrix 1"},"shape":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
    b'"values":{"dtype":"F32","shape":[3],"data_offsets":[16,28]},'
    b'"bits":{"dtype":"U8","shape":[2,2],"data_offsets":[28,32]}}'
)
GOLDEN_DATA = bytes.fromhex(
    "0200000000000000 0900000000000000"  # shape
    "0000803f 000000c0 0000003f"  # values: 1, -2, 0.5
    "01 01 08 00"  # bits: columns 0 and 8; column 3
)


def test_golden_bytes(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    golden().save(file)
    header = GOLDEN + b" " * (-len(GOLDEN) % 8)
    assert file.read_bytes() == len(header).to_bytes(8, "little") + header + GOLDEN_DATA
    assert np.array_equal(SparseMatrix.load(file).to_dense(), golden().to_dense())


@pytest.fixture(params=["save", "pickle"])
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[SparseMatrix], SparseMatrix]:
    def through(matrix: SparseMatrix) -> SparseMatrix:
        if request.param == "pickle":
            again = pickle.loads(pickle.dumps(matrix))
            assert isinstance(again, SparseMatrix)
            return again
        matrix.save(tmp_path / "w.safetensors")
        return SparseMatrix.load(tmp_path / "w.safetensors")

    return through


@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (3, 9), (64, 64), (100, 77)])
def test_a_copy_is_equal(
    copy: Callable[[SparseMatrix], SparseMatrix], shape: tuple[int, int], dtype: str
) -> None:
    w = weights(*shape, 0.6, dtype=VALUES[dtype])
    again = copy(SparseMatrix.from_dense(w))
    assert (again.shape, again.dtype, again.nnz) == (shape, w.dtype, int(np.count_nonzero(w)))
    assert np.array_equal(again.to_dense(), w)
    x = inputs(3, shape[1])
    check(again.linear(x), w, x)


def parts() -> dict[str, NDArray[Any]]:
    return {
        "shape": np.array([2, 9]),
        "bits": np.array([[1, 1], [8, 0]], np.uint8),
        "values": np.array([1, -2, 0.5], np.float32),
    }


MUTATIONS: dict[str, tuple[dict[str, NDArray[Any] | None], str]] = {
    "a tensor is missing": ({"bits": None}, "tensors: expected shape, bits and values"),
    "a tensor too many": ({"more": np.zeros(1)}, "tensors: expected shape"),
    "shape of other dtype": ({"shape": np.array([2, 9], np.int32)}, "two sizes as int64"),
    "three sizes": ({"shape": np.array([2, 9, 1])}, "two sizes"),
    "no sizes": ({"shape": np.empty(0, np.int64)}, "two sizes"),
    "a negative size": ({"shape": np.array([2, -9])}, "two sizes"),
    "more rows than bits": ({"shape": np.array([3, 9])}, r"expected uint8 \(3, 2\); got"),
    "more columns than bits": ({"shape": np.array([2, 17])}, r"expected uint8 \(2, 3\)"),
    "huge sizes": ({"shape": np.array([1 << 62, 1 << 62])}, "expected uint8"),
    "huge without columns": (
        {"shape": np.array([1 << 40, 0]), "bits": np.empty((1 << 40, 0), np.uint8)},
        "rows without columns",
    ),
    "huge without rows": (
        {
            "shape": np.array([0, 1 << 50]),
            "bits": np.empty((0, 1 << 47), np.uint8),
            "values": np.empty(0, np.float32),
        },
        "at most 2.40 elements",
    ),
    "bits of other dtype": ({"bits": np.array([[1, 1], [8, 0]], np.int8)}, "expected uint8"),
    "flat bits": ({"bits": np.array([1, 1, 8, 0], np.uint8)}, "expected uint8"),
    "a bit past the last column": ({"bits": np.array([[1, 2], [8, 1]], np.uint8)}, "past the last column"),
    "a bit too many": ({"bits": np.array([[1, 1], [9, 0]], np.uint8)}, "values: expected 4, .*; got 3"),
    "a value too few": ({"values": np.ones(2, np.float32)}, "values: expected 3, .*; got 2"),
    "values of other dtype": ({"values": np.ones(3)}, "expected a vector of float32"),
    "integer values": ({"values": np.ones(3, np.int16)}, "expected a vector"),
    "a matrix of values": ({"values": np.ones((1, 3), np.float32)}, "expected a vector"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_files_are_refused(name: str, tmp_path: Path) -> None:
    changes, message = MUTATIONS[name]
    arrays = {key: array for key, array in (parts() | changes).items() if array is not None}
    file = tmp_path / "w.safetensors"
    checkpoint.save(file, arrays, {"sparsam": "SparseMatrix 1"})
    with pytest.raises(ValueError, match=rf"w.safetensors: expected a SparseMatrix .*{message}"):
        SparseMatrix.load(file)


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    checkpoint.save(file, parts())
    with pytest.raises(ValueError, match="metadata: expected"):
        SparseMatrix.load(file)
    checkpoint.save(file, parts(), {"sparsam": "SparseMatrix 2"})
    with pytest.raises(ValueError, match="metadata: expected"):
        SparseMatrix.load(file)
    file.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ValueError, match="zip archive"):
        SparseMatrix.load(file)
    with pytest.raises(FileNotFoundError):
        SparseMatrix.load(tmp_path / "none")


def test_repr() -> None:
    assert repr(golden()) == "SparseMatrix(2x9, float32, 3 nonzero, density 0.1667)"
