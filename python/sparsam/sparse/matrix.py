"""SparseMatrix: a pruned weight matrix, packed, and products by the kernel that is fastest for the batch."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from sparsam import checkpoint
from sparsam._core import Packed
from sparsam.patterns import NM, Block, Unstructured
from sparsam.sparse import cost_model
from sparsam.sparse.dispatch import Explanation, KernelChoice, choose, unpack
from sparsam.sparse.matmul import ACTIVATIONS, KERNELS, Floats, multiply

__all__ = ["SparseMatrix", "recognise"]

Activation: TypeAlias = Literal["relu", "gelu", "gelu_tanh", "silu"]
StrPath: TypeAlias = "str | os.PathLike[str]"

_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_FLOAT32 = _DTYPES["float32"]
_MARK = {"sparsam": "SparseMatrix 1"}
_GROUPS = (2, 4, 8, 16, 32)
_MOST_EMPTY_ROWS = 1 << 24  # of a matrix without columns, which still takes memory for its rows


class SparseMatrix:
    """A matrix (out, in), as `torch.nn.Linear` has it, of which only the nonzero weights are stored.

    The stored form is one bit per weight and the nonzero values in order (docs/formats.md). What multiplies
    depends on the batch, by costs measured on this machine: a kernel that expands the bits, a kernel over
    panels derived from them, or, where that is faster, the dense product with a copy. `explain` tells which.
    Layouts and copies are built when a batch first needs them, or by `prepare`, and counted in `nbytes`.

    The first product on a machine takes some seconds longer: it calibrates (`cost_model.calibrate`,
    off with SPARSAM_CALIBRATION=off). The first product of a batch size may time its candidates. Kernels
    round differently, in the last bits; `prepare(batch, kernel=...)` fixes one.

    A pruned weight multiplies nothing: an infinity or a NaN in x reaches those outputs that have a nonzero
    weight for it. A matrix may be used by several threads at once.
    """

    __slots__ = ("_dense", "_lock", "_packed", "_pattern", "_plans", "_shape")
    __array_ufunc__ = None  # `array @ matrix` is an error, and not an attempt at arithmetic on objects

    def __init__(self, packed: Packed) -> None:
        """For this package; use `from_dense` or `load`."""
        self._packed = packed
        self._shape = (packed.rows, packed.cols)
        self._dense: Floats | None = None
        self._pattern: NM | Block | Unstructured | None = None
        self._plans: dict[int, KernelChoice] = {}
        self._lock = threading.RLock()

    @classmethod
    def from_dense(cls, w: ArrayLike, *, dtype: DTypeLike | None = None) -> SparseMatrix:
        """Pack a matrix; pruned is what is exactly 0, -0.0 included.

        Args:
            w: Two-dimensional, float16, bfloat16, float32 or float64, of any strides.
            dtype: What to store values as: float32, bfloat16 or float16; sums are float32 in any case. By
                default the dtype of `w`, and float32 for float64.

        Raises:
            ValueError: `w` is not two-dimensional.
            TypeError: Another dtype.
        """
        w = np.asarray(w)
        if w.ndim != 2:
            msg = f"w has shape {w.shape}: expected a matrix (out, in); reshape it to (shape[0], -1)"
            raise ValueError(msg)
        if not _is_float(w.dtype):
            msg = f"w has dtype {w.dtype}: expected float16, bfloat16, float32 or float64; use .astype"
            raise TypeError(msg)
        name = np.dtype(dtype).name if dtype is not None else w.dtype.name
        if dtype is None and name == "float64":
            name = "float32"
        if name not in _DTYPES:
            msg = f"dtype={dtype!r}: expected one of {', '.join(_DTYPES)}"
            raise TypeError(msg)
        return cls(Packed.pack(w.astype(_DTYPES[name], copy=False)))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self._shape

    @property
    def nnz(self) -> int:
        """The number of nonzero weights."""
        return self._packed.nnz

    @property
    def density(self) -> float:
        """The share of nonzero weights; 1.0 for a matrix without elements."""
        size = self._shape[0] * self._shape[1]
        return self.nnz / size if size else 1.0

    @property
    def sparsity(self) -> float:
        """1 - density."""
        return 1.0 - self.density

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the values."""
        return _DTYPES[self._packed.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form, the layouts derived so far, and the dense copy if one is kept."""
        dense = self._dense
        return self._packed.nbytes + (0 if dense is None else dense.nbytes)

    @property
    def pattern(self) -> NM | Block | Unstructured:
        """The regularity found: Block(4k, 1), NM(n, m) with m up to 32, or Unstructured()."""
        if self._pattern is None:
            self._pattern = recognise(self._packed)
        return self._pattern

    def linear(
        self,
        x: ArrayLike,
        bias: ArrayLike | None = None,
        activation: Activation | None = None,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """activation(x W^T + bias), as torch.nn.functional.linear and the activation after it compute it.

        Args:
            x: (..., in); float32 in C order is fast, other floats and strides are converted.
            bias: (out,), or None.
            activation: "relu", "gelu" (exact, with erf), "gelu_tanh", "silu" or None.
            out: (..., out), where the result goes: any float dtype and strides, no overlap with x or bias.

        Returns:
            `out`, or a new float32 array (..., out) in C order.

        Raises:
            ValueError: Shapes do not match, `out` overlaps an argument, or the activation is unknown.
            TypeError: An argument is not of floats.
        """
        rows, cols = self._shape
        if type(x) is np.ndarray and x.dtype == _FLOAT32 and x.flags.c_contiguous:
            rows_of_x = x
        else:
            rows_of_x = _floats("x", x)
        if rows_of_x.ndim < 1 or rows_of_x.shape[-1] != cols:
            msg = f"x has shape {rows_of_x.shape}: expected (..., {cols}) for a matrix of shape {self._shape}"
            raise ValueError(msg)
        addend = None if bias is None else _floats("bias", bias)
        if addend is not None and addend.shape != (rows,):
            msg = f"bias has shape {addend.shape}: expected ({rows},) for a matrix of shape {self._shape}"
            raise ValueError(msg)
        if activation is not None and activation not in ACTIVATIONS:
            msg = f"activation={activation!r}: expected None or one of {', '.join(ACTIVATIONS)}"
            raise ValueError(msg)
        shape = (*rows_of_x.shape[:-1], rows)
        y = out
        if y is not None:
            _check_out(y, shape, {"x": x, "bias": bias})
        if y is None or type(y) is not np.ndarray or y.dtype != _FLOAT32 or not y.flags.carray:
            y = np.empty(shape, np.float32)
        if y.size:
            batch = y.size // rows
            plan = self._plans.get(batch) or self._plan(batch)
            x2, y2 = rows_of_x, y
            if len(shape) != 2:
                x2, y2 = x2.reshape(batch, cols), y2.reshape(batch, rows)
            multiply(plan.kernel, self._packed, self._dense, x2, addend, activation or "", y2)
        if out is None or y is out:
            return y
        out[...] = y
        return out

    def __matmul__(self, x: ArrayLike) -> NDArray[Any]:
        """W @ x for x (in,) or (in, n); the transpose of an array in C order is fast."""
        x = np.asarray(x)
        if x.ndim not in {1, 2} or x.shape[0] != self._shape[1]:
            expected = f"({self._shape[1]},) or ({self._shape[1]}, n)"
            msg = f"x has shape {x.shape}: expected {expected} for a matrix of shape {self._shape}"
            raise ValueError(msg)
        product: NDArray[Any] = self.linear(x.T).T
        return product

    def to_dense(self) -> NDArray[Any]:
        """The matrix with its zeros, in its dtype and C order."""
        return self._packed.unpack()

    def prepare(self, batch: int, *, kernel: str | None = None) -> None:
        """Choose the kernel for a batch and build what it needs, so that the first product does not wait.

        Args:
            batch: The number of rows of x. What is chosen holds for batches of about this size.
            kernel: "dense", "bitmask" or "panels" to fix the choice.

        Raises:
            ValueError: `batch` is negative, or the kernel unknown.
        """
        batch = operator.index(batch)
        if batch < 0:
            msg = f"batch={batch!r}: expected at least 0"
            raise ValueError(msg)
        if kernel is None:
            self._plan(batch)
            return
        if kernel not in KERNELS:
            msg = f"kernel={kernel!r}: expected one of {', '.join(KERNELS)}"
            raise ValueError(msg)
        with self._lock:
            self._adopt(batch, KernelChoice(kernel, "as prepare() was told"))

    def explain(self, batch: int) -> Explanation:
        """Which kernel multiplies such a batch, what each would cost, and why; chooses as `prepare` does."""
        batch = operator.index(batch)
        self.prepare(batch)
        plan = self._plan(batch)
        return Explanation(repr(self), batch, plan.kernel, plan.reason, plan.candidates)

    def save(self, path: StrPath) -> None:
        """Write a safetensors file of the stored form (docs/formats.md), whole or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        packed = self._packed
        shape = np.array(self._shape, np.int64)
        checkpoint.save(path, {"shape": shape, "bits": packed.bits(), "values": packed.values()}, _MARK)

    @classmethod
    def load(cls, path: StrPath) -> SparseMatrix:
        """Read what `save` wrote; sizes, bits and counts are checked before anything multiplies.

        Raises:
            ValueError: The file is damaged, or holds something else.
            OSError: It cannot be read.
        """
        read = checkpoint.load(path)
        try:
            if read.metadata != _MARK:
                msg = f"expected the metadata {_MARK}, got {read.metadata}"
                raise ValueError(msg)
            return cls(_from_arrays(read.weights))
        except ValueError as error:
            msg = f"{os.fspath(path)}: expected a SparseMatrix as save() writes it: {error}; write it again"
            raise ValueError(msg) from error

    def __reduce__(self) -> tuple[Any, ...]:
        packed = self._packed
        return _rebuild, (*self._shape, packed.bits(), packed.values())

    def __repr__(self) -> str:
        rows, cols = self._shape
        share = f"{self.nnz:,} nonzero, density {self.density:.4g}"
        return f"SparseMatrix({rows}x{cols}, {self._packed.dtype}, {share})"

    def _plan(self, batch: int) -> KernelChoice:
        """The plan for a batch, made if there is none yet."""
        with self._lock:
            if plan := self._plans.get(cost_model.bucket(batch)):
                self._plans[batch] = plan  # found faster next time
                return plan
            packed = self._packed
            had = packed.forms
            plan, dense = choose(packed, self._dense, batch)
            if plan.kernel != "panels" and "panels" not in had:  # only the trial needed them
                packed.keep(had)
            self._adopt(batch, plan, dense)
            return plan

    def _adopt(self, batch: int, plan: KernelChoice, dense: Floats | None = None) -> None:
        """Builds what the plan needs, then publishes it: `linear` reads plans without the lock."""
        if plan.kernel != "dense":
            self._packed.add(plan.kernel)
        elif self._dense is None:
            self._dense = unpack(self._packed) if dense is None else dense
        bucket = cost_model.bucket(batch)
        self._plans = {n: known for n, known in self._plans.items() if cost_model.bucket(n) != bucket}
        self._plans[bucket] = self._plans[batch] = plan


def _rebuild(rows: int, cols: int, bits: NDArray[np.uint8], values: NDArray[Any]) -> SparseMatrix:
    return SparseMatrix(Packed.from_parts(rows, cols, bits, values))


def _is_float(dtype: np.dtype[Any]) -> bool:
    return (dtype.kind == "f" and dtype.itemsize in {2, 4, 8}) or dtype.name == "bfloat16"


def _floats(name: str, value: ArrayLike) -> Floats:
    """The argument as float32 in C order, itself if it is that already."""
    array = np.asarray(value)
    if not _is_float(array.dtype):
        expected = "float32 (bfloat16, float16 and float64 are converted)"
        msg = f"{name} has dtype {array.dtype}: expected {expected}; convert it with .astype"
        raise TypeError(msg)
    return np.asarray(array, np.float32, order="C")


def _check_out(out: NDArray[Any], shape: tuple[int, ...], others: Mapping[str, ArrayLike | None]) -> None:
    if not isinstance(out, np.ndarray) or not _is_float(out.dtype):
        msg = f"out is {getattr(out, 'dtype', type(out).__name__)}: expected an array of floats"
        raise TypeError(msg)
    if out.shape != shape:
        msg = f"out has shape {out.shape}: expected {shape}"
        raise ValueError(msg)
    if not out.flags.writeable:
        msg = "out is read-only: expected a writeable array; pass a copy"
        raise ValueError(msg)
    for name, other in others.items():
        if other is not None and np.shares_memory(out, np.asarray(other)):
            msg = f"out overlaps {name}: expected separate memory; leave out away, or pass a copy of {name}"
            raise ValueError(msg)


def _from_arrays(arrays: Mapping[str, NDArray[Any]]) -> Packed:
    """The core's object; whatever does not fit together is a ValueError."""
    if arrays.keys() != {"shape", "bits", "values"}:
        msg = f"expected the tensors shape, bits and values, got {', '.join(map(repr, arrays))}"
        raise ValueError(msg)
    shape, bits, values = arrays["shape"], arrays["bits"], arrays["values"]
    if shape.dtype != np.int64 or shape.shape != (2,) or shape.min() < 0:
        msg = f"shape is {shape.dtype} {shape.tolist()}: expected two sizes as int64"
        raise ValueError(msg)
    rows, cols = shape.tolist()
    if bits.dtype != np.uint8 or bits.shape != (rows, (cols + 7) // 8):
        msg = f"bits are {bits.dtype} {bits.shape}: expected uint8 {(rows, (cols + 7) // 8)}"
        raise ValueError(msg)
    if cols == 0 and rows > _MOST_EMPTY_ROWS:
        msg = f"{rows} rows without columns: expected at most {_MOST_EMPTY_ROWS}"
        raise ValueError(msg)
    if values.dtype.name not in _DTYPES or values.ndim != 1:
        msg = f"values are {values.dtype} {values.shape}: expected a vector of {', '.join(_DTYPES)}"
        raise ValueError(msg)
    return Packed.from_parts(rows, cols, bits, values)


def recognise(packed: Packed) -> NM | Block | Unstructured:
    """The pattern that the nonzero weights follow; a weight that was kept may happen to be 0."""
    rows, cols, nnz = packed.rows, packed.cols, packed.nnz
    if nnz in {0, rows * cols}:
        return Unstructured()
    bits = packed.bits()
    if height := packed.blocked:
        lines = bits[::height]
        while len(lines) % 2 == 0 and np.array_equal(lines[::2], lines[1::2]):
            height, lines = 2 * height, lines[::2]
        return Block(height, 1)
    keep = np.unpackbits(bits, axis=1, count=cols, bitorder="little")
    for size in _GROUPS:
        if cols % size == 0:
            groups = keep.reshape(-1, size).sum(axis=1, dtype=np.uint8)
            most = int(groups.max())
            if most < size and nnz > (most - 0.5) * len(groups):
                return NM(most, size)
    return Unstructured()
