"""SparseMatrix: a pruned weight matrix, packed, and products by the kernel that is cheapest for the batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from sparsam import checkpoint
from sparsam._core import Packed
from sparsam.masks import Mask
from sparsam.patterns import NM, Block, Unstructured
from sparsam.sparse.arguments import (
    DTYPES,
    STORED,
    Activation,
    check_activation,
    check_kernel,
    check_out,
    inputs,
    numbers,
    vector,
)
from sparsam.sparse.array_protocol import ArrayProtocol
from sparsam.sparse.choices import Choices, expect
from sparsam.sparse.conversions import csr_of, dense_of, keep_of
from sparsam.sparse.cost_model import Expectation
from sparsam.sparse.dispatch import Explanation
from sparsam.sparse.forms import Forms
from sparsam.sparse.matmul import multiply
from sparsam.sparse.packing import pack, pack_kept
from sparsam.sparse.preparation import Preparation, measure_all
from sparsam.sparse.stored import from_arrays, recognise, to_arrays

__all__ = ["SparseMatrix"]

StrPath: TypeAlias = "str | os.PathLike[str]"

_FLOAT32 = DTYPES["float32"]
_MARK = {"sparsam": "SparseMatrix 1"}


@dataclass(frozen=True)
class _State:
    """The state that a product reads, replaced as a whole: the forms, and which kernel each batch uses."""

    forms: Forms
    choices: Choices

    @classmethod
    def of(cls, forms: Forms, expected: Expectation, preparation: Preparation | None = None) -> _State:
        return cls(forms, Choices(forms.weight, forms.kernels, expected, preparation))


_publishing = threading.Lock()  # held for a comparison and an assignment, never while anything is computed


def _after_fork() -> None:
    """Another thread of the parent may have held the lock, and cannot release it in the child."""
    global _publishing  # noqa: PLW0603
    _publishing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class SparseMatrix(ArrayProtocol):
    """A matrix (out, in), like that of `torch.nn.Linear`, of which only the nonzero weights are stored.

    It is held in the forms that batches of 1 to 512 rows need: bits and values, panels of rows or slots
    (docs/formats.md), or a dense copy. One form is held, or two if some batch would be more than a quarter
    slower with one. A cost model chooses them, and the kernel for each batch, from the defaults of this
    package or the results of `sparsam calibrate`. Products build nothing, measure nothing and write nothing.

    int8 values have one form, slots, for all batches; int4 values slots or the bitmask, whichever is expected
    to be faster. Each row of x is rounded to int8 too. Sums are
    exact (with int4: those within a group of columns), so results are the same to the last bit on every
    machine. An infinity or a NaN in a row of x gives NaN in all of its outputs; a row whose largest magnitude
    is below 2^-96 is treated as 0.

    `prepare(batches)` measures the kernels on this matrix and keeps only the forms that these batches need.
    `explain(batch)` says which kernel runs and why, `nbytes` counts all memory that is held. Kernels differ
    in the last bits of their results; `prepare(batch, kernel=...)` fixes one.

    A pruned weight multiplies nothing: an infinity or a NaN in x reaches those outputs that have a stored
    weight for it. A matrix may be used by several threads at once, and after a fork.

    NumPy's functions get the dense content, `np.asarray(matrix)`. `==` and `!=` compare element by element,
    as of arrays. Arithmetic, ufuncs, `array @ matrix`, `bool(matrix)` and `hash(matrix)` are errors.
    """

    __slots__ = ("_pattern", "_shape", "_state")

    def __init__(
        self, packed: Packed, kernels: Sequence[str] = (), preparation: Preparation | None = None
    ) -> None:
        """For this package; use `from_dense`, `from_mask`, `from_scipy` or `load`.

        Args:
            packed: The weights.
            kernels: Those for which forms are held; by default the cost model decides.
            preparation: The results of earlier calls of `prepare`.
        """
        self._shape = (packed.rows, packed.cols)
        self._pattern: NM | Block | Unstructured | None = None
        forms = Forms.of(packed)
        expected = expect(forms.weight)
        told = preparation is not None and preparation.told
        if forms.weight.rounded and not told:  # what is faster here, whatever was held elsewhere
            kernels = ()
        held = forms.keeping(kernels or forms.needed(expected))
        self._state = _State.of(held, expected, preparation)

    @classmethod
    def from_dense(
        cls,
        w: ArrayLike,
        *,
        dtype: DTypeLike | None = None,
        scales: ArrayLike | None = None,
        group: int | None = None,
    ) -> SparseMatrix:
        """Pack a matrix; weights that are exactly 0, -0.0 included, are pruned.

        Args:
            w: Two-dimensional, float16, bfloat16, float32 or float64, of any strides.
            dtype: The dtype of the stored values: float32, bfloat16 or float16; sums are always float32. By
                default the dtype of `w`, or float32 for float64. Or int8, integers with a scale for each row
                (docs/quantization.md), where weights that round to 0 are pruned. Or int4, 16 levels with a
                scale for each `group` columns of a row, meant for batches of 1 to 8.
            scales: For int8, (out,): the scale of each row, as `quantize` returns it. By default max |w| /
                64, or the exact scale of a row that is integers times a scale already.
            group: For int4, how many columns share a scale: 64 or 128. By default 64, or 128 if all groups of
                128 are integers from -7 to 7 times a scale already.

        Raises:
            ValueError: `w` is not two-dimensional; for int8 and int4, it is not finite, too wide, or too
                large for its scales; `scales` or `group` do not go with the dtype.
            TypeError: Another dtype.
        """
        return cls(pack(w, dtype, scales, group))

    @classmethod
    def from_mask(
        cls, w: ArrayLike, mask: Mask | NDArray[np.bool_], *, dtype: DTypeLike | None = None
    ) -> SparseMatrix:
        """Pack the weights that a mask keeps, zeros among them included (except with int8 and int4).

        Args:
            w: As for `from_dense`; its values where the mask prunes are not used.
            mask: Of the shape of `w`; True where a weight is kept.
            dtype: As for `from_dense`.

        Raises:
            ValueError: `w` is not two-dimensional, or the mask has another shape.
            TypeError: Another dtype, or a mask that is not boolean.
        """
        return cls(pack_kept(w, mask, dtype))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self._shape

    @property
    def nnz(self) -> int:
        """The number of stored weights."""
        return self._state.forms.weight.nnz

    @property
    def density(self) -> float:
        """The share of stored weights; 1.0 for a matrix without elements."""
        size = self._shape[0] * self._shape[1]
        return self.nnz / size if size else 1.0

    @property
    def sparsity(self) -> float:
        """1 - density."""
        return 1.0 - self.density

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the values."""
        stored: np.dtype[Any] = STORED[self._state.forms.weight.dtype]
        return stored

    @property
    def nbytes(self) -> int:
        """Bytes of all forms that are held, a dense copy included."""
        return self._state.forms.nbytes

    @property
    def T(self) -> SparseMatrix:
        """The transpose, packed again; of int8 and int4 values, whose scales belong to rows, in float32."""
        packed = self._state.forms.readable()
        keep = Mask.from_array(keep_of(packed).T)
        return SparseMatrix(Packed.from_mask(packed.unpack().T, keep._words))

    @property
    def pattern(self) -> NM | Block | Unstructured:
        """The recognised pattern: Block(4k, 1), NM(n, m) with m up to 32, or Unstructured()."""
        if self._pattern is None:
            self._pattern = recognise(self._state.forms.readable())
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
        if bias is None and activation is None and out is None and type(x) is np.ndarray and x.ndim == 2:
            packed, kernel = (state := self._state).forms.packed, state.choices.kernel(len(x))
            if packed is not None and kernel != "dense" and (fast := packed.product(kernel, x)) is not None:
                return fast  # a small product takes less time than the checks below
        rows, cols = self._shape
        if type(x) is np.ndarray and x.dtype == _FLOAT32 and x.flags.c_contiguous and x.shape[-1:] == (cols,):
            rows_of_x = x  # nothing to check or convert, which would take as long as a small product
        else:
            rows_of_x = inputs(x, self._shape)
        addend = None if bias is None else vector(bias, self._shape)
        if activation is not None:
            check_activation(activation)
        shape = (*rows_of_x.shape[:-1], rows)
        y = out
        if y is not None:
            check_out(y, shape, x, bias)
        if y is None or type(y) is not np.ndarray or y.dtype != _FLOAT32 or not y.flags.carray:
            y = np.empty(shape, np.float32)
        if y.size:
            batch = y.size // rows
            x2, y2 = rows_of_x.reshape(batch, cols), y.reshape(batch, rows)
            forms, kernel = (state := self._state).forms, state.choices.kernel(batch)
            multiply(kernel, forms.packed, forms.dense, x2, addend, activation or "", y2)
        if out is None or y is out:
            return y
        out[...] = y
        return out

    def __matmul__(self, x: ArrayLike) -> NDArray[Any]:
        """W @ x for x (in,) or (in, n); the transpose of an array in C order is fast."""
        x = np.asarray(x)
        if x.ndim not in {1, 2} or x.shape[0] != self._shape[1]:
            expected = f"({self._shape[1]},) or ({self._shape[1]}, n)"
            msg = (
                f"x: expected shape {expected} for a matrix of shape {self._shape}; got {x.shape}; transpose "
                "it, or use another matrix"
            )
            raise ValueError(msg)
        product: NDArray[Any] = self.linear(x.T).T
        return product

    def to_dense(self) -> NDArray[Any]:
        """The matrix with its zeros, in C order and its dtype; of int8 and int4 in float32, with scales."""
        return self._state.forms.readable().unpack()

    def to_scipy(self) -> Any:
        """The matrix as a `scipy.sparse.csr_array` of float32; bfloat16 and float16 values are widened.

        Raises:
            ImportError: SciPy is not installed.
        """
        return csr_of(self._state.forms.readable())

    @classmethod
    def from_scipy(cls, matrix: Any, *, dtype: DTypeLike | None = None) -> SparseMatrix:
        """Pack a SciPy sparse matrix or array of any format, explicitly stored zeros included.

        Args:
            matrix: Two-dimensional, of floats; duplicate entries are summed.
            dtype: As for `from_dense`.

        Raises:
            ImportError: SciPy is not installed.
            TypeError: It is not a SciPy sparse matrix, or has another dtype.
            ValueError: It is not two-dimensional.
        """
        w, keep = dense_of(matrix)
        return cls.from_mask(w, keep, dtype=dtype)

    def prepare(self, batches: int | Sequence[int], *, kernel: str | None = None) -> None:
        """Measure the kernels on this matrix, and keep only the forms that the batches need.

        Takes a quarter of a second, and a tenth per batch. One form is kept, unless a batch would be over a
        quarter slower with it. Batches of earlier calls stay prepared; others use the forms that are held.
        Under other instruction sets or numbers of threads than were measured, the cost model chooses.

        Args:
            batches: The numbers of rows of x. The choice holds for batches of about these sizes.
            kernel: "dense", "bitmask", "panels" or "slots", without measuring; of int4 values "bitmask" or
                "slots", which nothing else changes, of int8 values "slots" alone.

        Raises:
            ValueError: A batch is negative, or the kernel unknown.
        """
        wanted = numbers("batches", batches, at_least=0)
        forms = self._state.forms
        check_kernel(kernel, forms.weight)
        expected = expect(forms.weight)
        times: dict[int, dict[str, float]] = {}
        if kernel is None and self.nnz and not forms.weight.rounded:
            forms, times = measure_all(forms, wanted, expected)
        while True:
            before = self._state
            known = before.choices.preparation
            if kernel is None:
                known = known.with_times(times, expected.settings)
            else:
                known = known.with_told(wanted, kernel)
            held = forms.keeping(known.kernels) if known.kernels else before.forms
            if self._publish(before, _State.of(held, expected, known)):
                return

    def explain(self, batch: int) -> Explanation:
        """Which kernel multiplies such a batch, what each is expected to take, and why; measures nothing."""
        (batch,) = numbers("batch", [batch], at_least=0)
        choice = self._state.choices.choice(batch)
        return Explanation(repr(self), batch, choice.kernel, choice.reason, choice.candidates)

    def save(self, path: StrPath) -> None:
        """Write a safetensors file of the stored form (docs/formats.md), atomically.

        Raises:
            OSError: The file cannot be written.
        """
        packed = self._state.forms.readable()
        checkpoint.save(path, to_arrays(packed), _MARK)

    @classmethod
    def load(cls, path: StrPath) -> SparseMatrix:
        """Read a file that `save` wrote; sizes, bits and counts are checked first.

        Raises:
            ValueError: The file is damaged, or holds something else.
            OSError: It cannot be read.
        """
        read = checkpoint.load(path)
        try:
            if read.metadata != _MARK:
                msg = f"metadata: expected {_MARK}; got {read.metadata}; name a file of SparseMatrix.save"
                raise ValueError(msg)
            return cls(from_arrays(read.weights))
        except ValueError as error:
            wanted = "a SparseMatrix as save() writes it"
            msg = f"{os.fspath(path)}: expected {wanted}; got another file ({error}); write it again"
            raise ValueError(msg) from error

    def __reduce__(self) -> tuple[Any, ...]:
        state = self._state
        packed, choices = state.forms.readable(), state.choices
        return _rebuild, (to_arrays(packed), choices.held, choices.preparation)

    def __repr__(self) -> str:
        rows, cols = self._shape
        share = f"{self.nnz:,} nonzero, density {self.density:.4g}"
        return f"SparseMatrix({rows}x{cols}, {self.dtype}, {share})"

    def _publish(self, before: _State, after: _State) -> bool:
        """Takes the new state unless another thread was faster."""
        with _publishing:
            if self._state is not before:
                return False
            self._state = after
            return True


def _rebuild(arrays: Mapping[str, NDArray[Any]], *rest: Any) -> SparseMatrix:
    return SparseMatrix(from_arrays(arrays), *rest)
