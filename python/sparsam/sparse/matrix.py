"""SparseMatrix: a pruned weight matrix, packed, and products by the kernel that is cheapest for the batch."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from sparsam import checkpoint
from sparsam._core import Packed, active_isa, num_threads
from sparsam.masks import Mask
from sparsam.patterns import NM, Block, Unstructured
from sparsam.sparse.arguments import DTYPES, Activation, check_activation, check_out, inputs, vector, weights
from sparsam.sparse.conversions import csr_of, dense_of, keep_of
from sparsam.sparse.cost_model import bucket, current_costs
from sparsam.sparse.dispatch import Explanation, KernelChoice, choose
from sparsam.sparse.forms import Forms
from sparsam.sparse.matmul import KERNELS, multiply
from sparsam.sparse.preparation import Preparation, measure
from sparsam.sparse.stored import from_arrays, recognise, to_arrays

__all__ = ["SparseMatrix"]

StrPath: TypeAlias = "str | os.PathLike[str]"

_FLOAT32 = DTYPES["float32"]
_MARK = {"sparsam": "SparseMatrix 1"}


@dataclass(frozen=True)
class _State:
    """What a product reads, published as a whole.

    Attributes:
        forms: What there is to multiply with.
        settings: Instruction set and number of threads; choices hold as long as these are active.
        preparation: None until `prepare` is called.
        choices: Batch -> its choice, for those used so far; at most _MAX_CHOICES.
    """

    forms: Forms
    settings: tuple[str, int]
    preparation: Preparation | None = None
    choices: dict[int, KernelChoice] = field(default_factory=dict)


_MAX_CHOICES = 256
_publishing = threading.Lock()  # held for a comparison and an assignment, never while anything is computed


def _after_fork() -> None:
    """Another thread of the parent may have held the lock, and is not here to let it go."""
    global _publishing  # noqa: PLW0603
    _publishing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class SparseMatrix:
    """A matrix (out, in), as `torch.nn.Linear` has it, of which only the nonzero weights are stored.

    It is held as one bit per weight and the values in order (docs/formats.md), until a batch is cheaper by
    another kernel: over panels of rows, or NumPy's dense product. The first such product builds that form, in
    about the time that packing took, and it stays. A cost model says which kernel is cheapest: defaults of
    this package, or what `sparsam calibrate` measured. Products measure nothing and write nothing.

    `prepare(batches)` measures the kernels on this matrix and keeps the forms that these batches need, one if
    one will do; products then use these and build none. `explain(batch)` tells what runs and why, `nbytes`
    counts all that is held. Kernels round differently, in the last bits; `prepare(batch, kernel=...)` fixes
    one.

    A pruned weight multiplies nothing: an infinity or a NaN in x reaches those outputs that have a stored
    weight for it. A matrix may be used by several threads at once, and after a fork.

    NumPy's functions get the dense content, `np.asarray(matrix)`; ufuncs and `array @ matrix` are errors.
    """

    __slots__ = ("_pattern", "_shape", "_state")

    def __init__(self, packed: Packed) -> None:
        """For this package; use `from_dense`, `from_mask`, `from_scipy` or `load`."""
        self._shape = (packed.rows, packed.cols)
        self._pattern: NM | Block | Unstructured | None = None
        self._state = _State(Forms.of(packed), _settings())

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
        return cls(Packed.pack(weights(w, dtype)))

    @classmethod
    def from_mask(
        cls, w: ArrayLike, mask: Mask | NDArray[np.bool_], *, dtype: DTypeLike | None = None
    ) -> SparseMatrix:
        """Pack what a mask keeps; a weight that is kept stays so, even if it is 0.

        Args:
            w: As for `from_dense`; what it holds where the mask prunes does not matter.
            mask: Of the shape of `w`; True where a weight is kept.
            dtype: As for `from_dense`.

        Raises:
            ValueError: `w` is not two-dimensional, or the mask has another shape.
            TypeError: Another dtype, or a mask that is not boolean.
        """
        kept_values = weights(w, dtype)
        kept = mask if isinstance(mask, Mask) else Mask.from_array(mask)
        if kept.shape != kept_values.shape:
            msg = f"mask: expected shape {kept_values.shape}, as w has; got {kept.shape}; pass the mask of w"
            raise ValueError(msg)
        return cls(Packed.from_mask(kept_values, kept._words))

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
        return DTYPES[self._state.forms.weight.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all forms that are held, a dense copy included."""
        return self._state.forms.nbytes

    @property
    def T(self) -> SparseMatrix:
        """The transpose, packed anew."""
        packed = self._state.forms.readable()
        keep = Mask.from_array(keep_of(packed).T)
        return SparseMatrix(Packed.from_mask(packed.unpack().T, keep._words))

    @property
    def pattern(self) -> NM | Block | Unstructured:
        """The regularity found: Block(4k, 1), NM(n, m) with m up to 32, or Unstructured()."""
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
        rows, cols = self._shape
        if type(x) is np.ndarray and x.dtype == _FLOAT32 and x.flags.c_contiguous and x.shape[-1:] == (cols,):
            rows_of_x = x  # nothing to check or convert: small products take no longer than this function
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
            state = self._state
            choice = state.choices.get(batch)
            if choice is None or state.settings != (active_isa(), num_threads()):
                state, choice = self._choose(batch)
            x2, y2 = rows_of_x, y
            if len(shape) != 2:
                x2, y2 = x2.reshape(batch, cols), y2.reshape(batch, rows)
            forms = state.forms
            multiply(choice.kernel, forms.packed, forms.dense, x2, addend, activation or "", y2)
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
        """The matrix with its zeros, in its dtype and C order."""
        return self._state.forms.readable().unpack()

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """The dense content, for NumPy's functions.

        Raises:
            ValueError: `copy` is False: what is packed cannot be seen without a copy.
        """
        if copy is False:
            msg = "copy: expected True or None, since the matrix is packed; got False; use to_dense()"
            raise ValueError(msg)
        return self.to_dense().astype(dtype or self.dtype, copy=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> NoReturn:
        """Arithmetic by NumPy would unpack the matrix for every operation: it is an error."""
        msg = f"np.{ufunc.__name__}: expected arrays; got a SparseMatrix; use .linear or .to_dense()"
        raise TypeError(msg)

    def to_scipy(self) -> Any:
        """The matrix as a `scipy.sparse.csr_array` of float32; bfloat16 and float16 values are widened.

        Raises:
            ImportError: SciPy is not installed.
        """
        return csr_of(self._state.forms.readable())

    @classmethod
    def from_scipy(cls, matrix: Any, *, dtype: DTypeLike | None = None) -> SparseMatrix:
        """Pack a SciPy sparse matrix or array of any format; what it stores stays stored, even zeros.

        Args:
            matrix: Two-dimensional, of floats; entries of one place are added up.
            dtype: As for `from_dense`.

        Raises:
            TypeError: It is no SciPy sparse matrix, or of another dtype.
            ValueError: It is not two-dimensional.
        """
        w, keep = dense_of(matrix)
        return cls.from_mask(w, keep, dtype=dtype)

    def prepare(self, batches: int | Sequence[int], *, kernel: str | None = None) -> None:
        """Measure the kernels on this matrix, and keep only the forms that the batches need.

        Takes some hundredths of a second per batch. One form is kept, unless a batch would be slower by more
        than a quarter. What earlier calls prepared stays prepared. Products build no forms from now on: other
        batches are multiplied with those that are held. What was measured holds for the instruction set and
        the number of threads that it was measured with; under others the cost model chooses.

        Args:
            batches: The numbers of rows of x. What is chosen holds for batches of about these sizes.
            kernel: "dense", "bitmask" or "panels" to fix the choice; nothing is measured then.

        Raises:
            ValueError: A batch is negative, or the kernel unknown.
        """
        wanted = [operator.index(n) for n in (batches if isinstance(batches, Sequence) else [batches])]
        for batch in wanted:
            if batch < 0:
                msg = f"batches: expected numbers of at least 0; got {batch}; pass numbers of input rows"
                raise ValueError(msg)
        if kernel is not None and kernel not in KERNELS:
            msg = (
                f"kernel: expected one of {', '.join(KERNELS)}; got {kernel!r}; pass one of them, or None "
                "for the fastest"
            )
            raise ValueError(msg)
        settings, forms, times = _settings(), self._state.forms, {}
        if kernel is None and self.nnz:
            costs = current_costs(forms.weight.dtype)
            for size in dict.fromkeys(bucket(batch) for batch in wanted if batch):
                forms, times[size] = measure(forms, size, costs)
        while True:
            before = self._state
            known = before.preparation or Preparation()
            if before.settings != settings:
                known = Preparation(known.told)
            known = known.with_times(times) if kernel is None else known.with_told(wanted, kernel)
            held = before.forms
            if needed := known.kernels if known.told or known.times else ():
                for name in needed:
                    held = forms.with_kernel(name) if name in forms.kernels else held.with_kernel(name)
                    forms = held
                held = held.keeping(needed)
            if self._publish(before, _State(held, settings, known)):
                return

    def explain(self, batch: int) -> Explanation:
        """Which kernel multiplies such a batch, what each is expected to take, and why; measures nothing."""
        batch = operator.index(batch)
        if batch < 0:
            msg = f"batch: expected a number of at least 0; got {batch}; pass the number of input rows"
            raise ValueError(msg)
        _, choice = self._current(batch)
        return Explanation(repr(self), batch, choice.kernel, choice.reason, choice.candidates)

    def save(self, path: StrPath) -> None:
        """Write a safetensors file of the stored form (docs/formats.md), whole or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        packed = self._state.forms.readable()
        checkpoint.save(path, to_arrays(packed), _MARK)

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
                msg = (
                    f"metadata: expected {_MARK}; got {read.metadata}; name a file that SparseMatrix.save "
                    "wrote"
                )
                raise ValueError(msg)
            return cls(from_arrays(read.weights))
        except ValueError as error:
            wanted = "a SparseMatrix as save() writes it"
            msg = f"{os.fspath(path)}: expected {wanted}; got another file ({error}); write it again"
            raise ValueError(msg) from error

    def __reduce__(self) -> tuple[Any, ...]:
        packed = self._state.forms.readable()
        return _rebuild, (*self._shape, packed.bits(), packed.values())

    def __repr__(self) -> str:
        rows, cols = self._shape
        share = f"{self.nnz:,} nonzero, density {self.density:.4g}"
        return f"SparseMatrix({rows}x{cols}, {self.dtype}, {share})"

    def _current(self, batch: int) -> tuple[_State, KernelChoice]:
        """The state as it is under the active settings, and the choice for a batch; builds nothing."""
        state, settings = self._state, _settings()
        if state.settings != settings:
            known = state.preparation and Preparation(state.preparation.told)
            state = _State(state.forms, settings, known)
        costs = current_costs(state.forms.weight.dtype)
        if state.preparation is not None:
            return state, state.preparation.choice(state.forms, batch, costs)
        return state, choose(state.forms.weight, batch, costs, held=state.forms.kernels[:1])

    def _choose(self, batch: int) -> tuple[_State, KernelChoice]:
        """The choice for a batch, with its form built, kept for the next product."""
        while True:
            before = self._state
            state, choice = self._current(batch)
            forms = state.forms.with_kernel(choice.kernel)
            if forms is not before.forms or state is not before:
                state = replace(state, forms=forms)
                if not self._publish(before, state):
                    continue
            if len(state.choices) >= _MAX_CHOICES:
                state.choices.clear()
            state.choices[batch] = choice
            return state, choice

    def _publish(self, before: _State, after: _State) -> bool:
        """Takes the new state unless another thread was faster."""
        with _publishing:
            if self._state is not before:
                return False
            self._state = after
            return True


def _settings() -> tuple[str, int]:
    return active_isa(), num_threads()


def _rebuild(rows: int, cols: int, bits: NDArray[np.uint8], values: NDArray[Any]) -> SparseMatrix:
    return SparseMatrix(Packed.from_parts(rows, cols, bits, values))
