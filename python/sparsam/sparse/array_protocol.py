"""What NumPy, Python's comparisons and `if` see of a packed matrix: a base class of `SparseMatrix`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["ArrayProtocol"]


class ArrayProtocol:
    """A matrix that stands for its dense content in NumPy's functions and in comparisons, not in arithmetic.

    A class that derives from it has `shape` and `to_dense`.
    """

    __slots__ = ()

    __hash__: ClassVar[None]  # type: ignore[assignment]  # as NumPy's arrays, whose == is elementwise too

    if TYPE_CHECKING:

        @property
        def shape(self) -> tuple[int, int]:
            """(out, in)."""

        def to_dense(self) -> NDArray[Any]:
            """The dense content."""

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """The dense content, for NumPy's functions.

        Raises:
            ValueError: `copy` is False: packed weights cannot be viewed as an array without a copy.
        """
        if copy is False:
            msg = "copy: expected True or None, since the matrix is packed; got False; use to_dense()"
            raise ValueError(msg)
        return np.asarray(self.to_dense(), dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """`==` and `!=`; TypeError for others: NumPy's arithmetic would unpack the matrix every time."""
        if method == "__call__" and ufunc in {np.equal, np.not_equal} and not kwargs:
            return ufunc(*map(_dense, inputs))
        msg = f"np.{ufunc.__name__}: expected arrays; got a SparseMatrix; use .linear or .to_dense()"
        raise TypeError(msg)

    def __eq__(self, other: object) -> Any:
        """Elementwise, as NumPy's and SciPy's arrays compare; True or False with what is no array."""
        return self._compare(np.equal, other)

    def __ne__(self, other: object) -> Any:
        """Elementwise."""
        return self._compare(np.not_equal, other)

    def __bool__(self) -> bool:
        """Raises ValueError: the truth value of a matrix is ambiguous, as of an array."""
        msg = (
            f"SparseMatrix of shape {self.shape}: expected a single truth value; got bool(matrix), which is "
            "ambiguous; compare matrix.nnz, or use np.array_equal(a, b) or `matrix is None`"
        )
        raise ValueError(msg)

    def _compare(self, ufunc: np.ufunc, other: object) -> Any:
        if not (
            isinstance(other, (bool, int, float, list, tuple))
            or any(hasattr(other, name) for name in ("__array__", "toarray"))
        ):
            return NotImplemented
        return ufunc(self.to_dense(), np.asarray(_dense(other)))


def _dense(value: Any) -> Any:
    """A packed matrix, or one of SciPy, as an array; anything else as it is."""
    if isinstance(value, ArrayProtocol):
        return value.to_dense()
    return value.toarray() if hasattr(value, "toarray") else value
