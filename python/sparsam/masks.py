"""Mask: which weights are kept, one bit each."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sparsam import _core

Scalar = TypeVar("Scalar", bound=np.generic)

_MAGIC = b"SPMASK\x00\x01"
_MAX_DIMS = 64


class Mask:
    """An immutable boolean array, bit-packed: True where a weight is kept.

    Element i of the C order is bit i % 8 of byte i // 8; bits past the last element are 0. It takes one bit
    per weight, whatever the dtype of the weights.

    Build one with `select`, `Mask.from_array`, `Mask.ones` or `Mask.from_bytes`; combine masks with `&`, `|`,
    `~`, and compare them with `==`. In NumPy's functions and operators, and as an index, it is the boolean
    array `to_array()`: `np.where(mask, w, 0)`, `w[~mask]`, `mask == array`.
    """

    __slots__ = ("_count", "_shape", "_words")

    def __init__(self, words: NDArray[np.uint64], shape: tuple[int, ...], count: int | None = None) -> None:
        """For this package only: `words` hold 64 elements each, and the mask takes ownership of them.

        Words that come with their count are those of the selection kernels, which are read-only already.
        """
        if count is None:
            words.setflags(write=False)
        self._words = words
        self._shape = shape
        self._count = count  # of bits that are set, where that is known

    @classmethod
    def from_array(cls, keep: NDArray[np.bool_]) -> Mask:
        """Pack a boolean array of any shape; True means kept.

        Raises:
            TypeError: the array is not boolean.
        """
        keep = np.asarray(keep)
        if keep.dtype != np.bool_:
            msg = f"keep: expected dtype bool; got {keep.dtype}; compare first, as in `weights != 0`"
            raise TypeError(msg)
        return cls._from_packed(np.packbits(keep, axis=None, bitorder="little"), keep.shape)

    @classmethod
    def ones(cls, shape: tuple[int, ...]) -> Mask:
        """The mask of that shape that keeps everything; ValueError for one that NumPy cannot hold."""
        _check_shape(shape)
        n = math.prod(shape)
        packed = np.full((n + 7) // 8, 0xFF, np.uint8)
        if n % 8:
            packed[-1] = (1 << n % 8) - 1
        return cls._from_packed(packed, shape)

    @classmethod
    def _from_packed(cls, packed: NDArray[np.uint8], shape: tuple[int, ...]) -> Mask:
        words = np.zeros((packed.size + 7) // 8, np.dtype("<u8"))
        words.view(np.uint8)[: packed.size] = packed
        return cls(words, tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights."""
        return self._shape

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self._shape)

    @property
    def count(self) -> int:
        """The number of weights kept."""
        if self._count is None:
            self._count = _core.count_bits(self._words)
        return self._count

    @property
    def density(self) -> float:
        """The share of weights kept; 1.0 for a mask without elements."""
        return self.count / self.size if self.size else 1.0

    @property
    def sparsity(self) -> float:
        """The share of weights pruned, 1 - density."""
        return 1.0 - self.density

    @property
    def bits(self) -> NDArray[np.uint8]:
        """The packed bits, ceil(size / 8) bytes, read-only."""
        return self._words.view(np.uint8)[: (self.size + 7) // 8]

    def apply(self, weights: NDArray[Scalar], *, out: NDArray[Scalar] | None = None) -> NDArray[Scalar]:
        """Returns the weights with the pruned ones set to +0.

        Args:
            weights: the mask's shape; float16, bfloat16, float32 or float64; any strides.
            out: where to write, of the same shape and dtype; `weights` itself to prune in place. Another
                overlap with `weights` is an error.

        Returns:
            `out`, or a new array in C order.

        Raises:
            ValueError: the shape does not match, or `out` does not fit.
            TypeError: the dtype is not one of the four.
        """
        weights = np.asarray(weights)
        if weights.shape != self._shape:
            msg = (
                f"weights: expected the mask's shape {self._shape}; got {weights.shape}; pass the weights "
                "that it was made for"
            )
            raise ValueError(msg)
        if out is None:
            out = np.empty(weights.shape, weights.dtype)
        elif out.shape != weights.shape or out.dtype != weights.dtype:
            msg = (
                f"out: expected {weights.dtype} {weights.shape}, as the weights; got {out.dtype} "
                f"{out.shape}; pass np.empty_like(weights)"
            )
            raise ValueError(msg)
        self.write(weights, out)
        return out

    def write(self, weights: NDArray[Scalar], out: NDArray[Scalar]) -> int:
        """For this package only: `apply` with checked arguments; returns how many weights are not zero."""
        _check_overlap(weights, out)
        return _core.apply_mask(weights, self._words, out)

    def to_array(self) -> NDArray[np.bool_]:
        """A boolean array of the mask's shape, True where kept."""
        flat = np.unpackbits(self.bits, count=self.size, bitorder="little")
        return flat.view(np.bool_).reshape(self._shape)

    def to_bytes(self) -> bytes:
        """A self-contained form: magic, number of dimensions, shape, bits (docs/formats.md)."""
        header = struct.pack(f"<8sQ{len(self._shape)}Q", _MAGIC, len(self._shape), *self._shape)
        return header + self.bits.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Mask:
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: the data is not a mask, or is damaged.
        """
        data = bytes(data)
        if data[:8] != _MAGIC:
            msg = (
                f"data: expected a mask, which starts with {_MAGIC!r}; got {data[:8]!r}; pass what "
                "to_bytes() returned"
            )
            raise ValueError(msg)
        ndim = struct.unpack_from("<Q", data, 8)[0] if len(data) >= 16 else _MAX_DIMS + 1
        if ndim > _MAX_DIMS or len(data) < 16 + 8 * ndim:
            msg = (
                f"data: expected the header of a mask; got {len(data)} bytes in which it is damaged or cut; "
                "read the whole file, or write it again"
            )
            raise ValueError(msg)
        shape = struct.unpack_from(f"<{ndim}Q", data, 16)
        size = math.prod(shape)
        expected = 16 + 8 * ndim + (size + 7) // 8
        if len(data) != expected:
            msg = (
                f"data: expected {expected} bytes for a mask of shape {shape}; got {len(data)}; read the "
                "whole file, or write it again"
            )
            raise ValueError(msg)
        if size % 8 and data[-1] >> size % 8:
            msg = (
                "data: expected bits of 0 past the last element; got bits that are set; write the mask "
                "again, this one is damaged"
            )
            raise ValueError(msg)
        _check_shape(shape)
        return cls._from_packed(np.frombuffer(data, np.uint8, offset=16 + 8 * ndim), shape)

    def _combine(self, other: Mask, operation: np.ufunc) -> Mask:
        if self._shape != other._shape:
            msg = (
                f"masks: expected the same shape; got {self._shape} and {other._shape}; combine masks of one "
                "tensor"
            )
            raise ValueError(msg)
        return Mask(operation(self._words, other._words), self._shape)

    def __and__(self, other: Mask) -> Mask:
        return self._combine(other, np.bitwise_and) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return self._combine(other, np.bitwise_or) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return self._combine(Mask.ones(self._shape), np.bitwise_xor)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """The booleans, for NumPy's functions; ValueError for `copy=False`, since unpacking makes a copy."""
        if copy is False:
            msg = "copy: expected True or None, since a mask holds bits; got False; call to_array()"
            raise ValueError(msg)
        booleans = self.to_array()
        return booleans if dtype is None else booleans.astype(dtype, copy=False)

    def __bool__(self) -> bool:
        """Raises ValueError: the truth value of a mask is ambiguous, as of an array."""
        msg = (
            f"Mask of shape {self._shape}: expected a single truth value; got bool(mask), which is "
            "ambiguous; compare mask.count, or use mask.to_array().any() or .all()"
        )
        raise ValueError(msg)

    def __eq__(self, other: object) -> Any:
        """Whether two masks are equal; compared with an array, a list or a number, elementwise."""
        if isinstance(other, Mask):
            return self._shape == other._shape and bool(np.array_equal(self._words, other._words))
        if not (hasattr(other, "__array__") or isinstance(other, (bool, int, float, list, tuple))):
            return NotImplemented
        return np.equal(self.to_array(), np.asarray(other))  # which raises for other shapes, in old NumPy too

    def __ne__(self, other: object) -> Any:
        """The opposite of `==`."""
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else np.logical_not(equal)

    def __hash__(self) -> int:
        return hash((self._shape, self._words.tobytes()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Mask.from_bytes, (self.to_bytes(),)

    def __repr__(self) -> str:
        return f"Mask(shape={self._shape}, kept={self.count} of {self.size}, density={self.density:.4g})"


def _check_shape(shape: tuple[int, ...]) -> None:
    """Refuses lengths below 0, more dimensions than NumPy has, and empty shapes that overflow."""
    try:
        np.empty(shape if 0 in shape or min(shape, default=0) < 0 else (1,) * len(shape), np.bool_)
    except (ValueError, OverflowError) as error:
        msg = (
            f"mask: expected a shape of lengths of at least 0 that NumPy can hold; got {shape}: {error}; "
            "correct the shape"
        )
        raise ValueError(msg) from None


def _check_overlap(weights: NDArray[Any], out: NDArray[Any]) -> None:
    """Raise for an output that is a shifted view of the input: kernels read and write block by block."""
    if out is weights or not np.may_share_memory(weights, out):
        return
    same = weights.__array_interface__["data"][0] == out.__array_interface__["data"][0]
    if not (same and weights.strides == out.strides):
        msg = (
            "out: expected the weights themselves (in place) or separate memory; got overlapping memory; "
            "pass a separate array"
        )
        raise ValueError(msg)


def _check_separate_memory(arrays: Mapping[str, NDArray[Any]], outs: Mapping[str, NDArray[Any]]) -> None:
    """Raise for an output that shares memory with an array or output of another name.

    A sweep over byte ranges. Where two ranges overlap, NumPy says whether they share an element: two columns
    of one matrix do not.
    """
    others = [out for name, out in outs.items() if out is not arrays[name]]
    if len(arrays) < 2 or not _ranges_overlap([*arrays.values(), *others]):
        return
    ranges = sorted(
        (start, end, name, group is outs, array)
        for group in (arrays, outs)
        for (name, array), (start, end) in zip(
            group.items(), _core.byte_ranges(list(group.values())).tolist(), strict=True
        )
        if array.size
    )
    open_ranges: list[tuple[int, int, str, bool, NDArray[Any]]] = []
    for start, end, name, written, array in ranges:
        open_ranges = [other for other in open_ranges if other[1] > start]
        for _, _, other_name, other_written, other in open_ranges:
            if other_name == name or not (written or other_written):
                continue
            if np.may_share_memory(array, other, max_work=1000):  # type: ignore[arg-type]
                msg = (
                    f"tensors {other_name!r} and {name!r}: expected separate memory, since weights that "
                    "both hold would be pruned twice; got shared memory; pass copies"
                )
                raise ValueError(msg)
        open_ranges.append((start, end, name, written, array))


def _ranges_overlap(arrays: list[NDArray[Any]]) -> bool:
    if len(arrays) < 2:
        return False
    ranges = _core.byte_ranges([array for array in arrays if array.size])
    starts, ends = ranges[np.argsort(ranges[:, 0])].T
    return bool((starts[1:] < np.maximum.accumulate(ends)[:-1]).any())
