"""PackedWeight: what the weight of a layer became, and the choice of what multiplies with it."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import torch
from sparsam._core import Packed
from sparsam.patterns import NM, Block, Unstructured
from sparsam.sparse import calibration
from sparsam.sparse.stored import recognise
from torch import Tensor

__all__ = ["DTYPES", "PackedWeight", "find", "from_array", "to_array"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_ROUNDS = 3
_PROCESS = os.getpid()  # in a forked child, torch's own products wait for threads that are gone
_handles = itertools.count(1)
_living: WeakValueDictionary[int, PackedWeight] = WeakValueDictionary()


class PackedWeight:
    """A weight as one packed matrix for each group of its channels. Its content never changes.

    Deep copies are the object itself, and layers whose weights are tied share one.

    Attributes:
        parts: The packed matrices, each `rows` x `cols`.
        shape: The shape of the tensor that was packed.
        dtype: Its dtype, which `unpack` returns; `value_dtype` is what the values are stored as.
        transposed: Whether that tensor was (in, out).
        handle: A number that names this object to the registered operators for as long as it lives.
    """

    def __init__(
        self,
        parts: tuple[Packed, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        transposed: bool = False,
    ) -> None:
        """For this package; use `pack`."""
        self.parts = parts
        self.shape = shape
        self.dtype = dtype
        self.transposed = transposed
        self.rows, self.cols = parts[0].rows, parts[0].cols
        self.handle = next(_handles)
        _living[self.handle] = self
        self._dense: dict[torch.dtype, Tensor] = {}
        self._casts: WeakValueDictionary[torch.dtype, PackedWeight] = WeakValueDictionary()
        self._kernels: dict[Hashable, str] = {}
        self._lock = threading.RLock()

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        *,
        dtype: torch.dtype | None = None,
        groups: int = 1,
        transposed: bool = False,
    ) -> PackedWeight:
        """Packs a tensor (out, in / groups, ...); pruned is what is exactly 0.

        Args:
            weight: float32, bfloat16 or float16, on the CPU.
            dtype: What to store the values as, one of these too; by default as they are.
            groups: Output channels split into so many groups, each a matrix of its own.
            transposed: `weight` is (in, out), as in the Conv1D of Hugging Face's GPT-2.

        Raises:
            TypeError: Another dtype.
            ValueError: The tensor is not on the CPU.
        """
        values = dtype or weight.dtype
        for what, got in (("weight", weight.dtype), ("dtype", values)):
            if got not in DTYPES:
                msg = (
                    f"{what} is {got}: expected one of {', '.join(map(str, DTYPES))}; convert the model first"
                )
                raise TypeError(msg)
        if weight.device.type != "cpu":
            msg = f"weight is on {weight.device}: expected the CPU; move the model there first, with .cpu()"
            raise ValueError(msg)
        matrix = weight.detach().to(values)
        matrix = matrix.T if transposed else matrix.flatten(1)
        parts = tuple(Packed.pack(to_array(part)) for part in matrix.chunk(groups))
        return cls(parts, tuple(weight.shape), weight.dtype, transposed=transposed)

    @property
    def groups(self) -> int:
        """The number of parts."""
        return len(self.parts)

    @property
    def value_dtype(self) -> torch.dtype:
        """The dtype that the values are stored as."""
        return getattr(torch, self.parts[0].dtype)  # type: ignore[no-any-return]

    @property
    def nnz(self) -> int:
        """The number of nonzero weights."""
        return sum(part.nnz for part in self.parts)

    @property
    def density(self) -> float:
        """The share of nonzero weights; 1.0 where there are no weights."""
        return self.nnz / size if (size := math.prod(self.shape)) else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form, of the layouts derived from it and of dense copies that are kept."""
        dense = sum(tensor.nbytes for tensor in self._dense.values())
        return dense + sum(part.nbytes for part in self.parts)

    @property
    def pattern(self) -> NM | Block | Unstructured:
        """The regularity found in the first group."""
        return recognise(self.parts[0])

    def unpack(self) -> Tensor:
        """The tensor as it was; a pruned -0.0 comes back as 0.0, and narrower values as they are."""
        matrix = torch.cat([from_array(part.unpack()) for part in self.parts]).to(self.dtype)
        return matrix.T.contiguous() if self.transposed else matrix.reshape(self.shape)

    def astype(self, dtype: torch.dtype) -> PackedWeight:
        """This weight for a layer that computes in another dtype."""
        if dtype == self.dtype:
            return self
        with self._lock:
            if (known := self._casts.get(dtype)) is not None:  # for a layer whose weight is tied
                return known
            values = dtype if self.value_dtype == self.dtype else self.value_dtype
            self._casts[dtype] = cast = PackedWeight.pack(
                self.unpack().to(dtype), dtype=values, groups=self.groups, transposed=self.transposed
            )
            return cast

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The unpacked weight that dense products use: (out, in, ...), kept from now on."""
        with self._lock:
            if dtype not in self._dense:
                self._dense[dtype] = self._oriented(dtype)
            return self._dense[dtype]

    def _oriented(self, dtype: torch.dtype) -> Tensor:
        weight = self.unpack().to(dtype)
        return weight.T.contiguous() if self.transposed else weight

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels that were chosen so far, in the order of first use."""
        return tuple(dict.fromkeys(self._kernels.values()))

    def forget(self) -> None:
        """Drops all choices, and the dense copy made for them: the next product chooses again."""
        with self._lock:
            self._kernels.clear()
            self._dense.clear()

    def kernel(self, key: Hashable) -> str | None:
        """What was chosen for a key before."""
        return self._kernels.get(key)

    def choose(
        self,
        key: Hashable,
        bucket: Hashable,
        dtype: torch.dtype,
        runs: Mapping[str, Callable[[], object]],
        dense: Callable[[Tensor], object],
    ) -> str:
        """Times the ways to multiply and keeps the fastest.

        Args:
            key: What `kernel` will be asked for.
            bucket: Keys of one bucket share the choice.
            dtype: Of x.
            runs: Kernel -> a product with it.
            dense: The dense product, given the unpacked weight.
        """
        with self._lock:
            if bucket not in self._kernels:
                had = self.parts[0].forms
                for part, form in itertools.product(self.parts, runs):
                    part.add(form)
                chosen = self._kernels[bucket] = self._fastest(dtype, runs, dense)
                if chosen != "panels" and "panels" not in had:  # only the trial needed them
                    for part in self.parts:
                        part.keep(had)
            self._kernels[key] = self._kernels[bucket]
            return self._kernels[key]

    def _fastest(
        self,
        dtype: torch.dtype,
        runs: Mapping[str, Callable[[], object]],
        dense: Callable[[Tensor], object],
    ) -> str:
        if self.nnz == 0:
            return next(iter(runs))
        every = dict(runs)
        if os.getpid() == _PROCESS or torch.get_num_threads() == 1:
            weight = self._dense[dtype] if dtype in self._dense else self._oriented(dtype)
            every["dense"] = lambda: dense(weight)
        best = dict.fromkeys(every, math.inf)
        for _ in range(_ROUNDS):  # in turn, so that what disturbs one disturbs them all
            for name, run in every.items():
                best[name] = min(best[name], calibration.fastest(run, settle=0.0, seconds=2e-3))
        chosen = min(best, key=lambda name: best[name])
        if chosen == "dense":
            self._dense[dtype] = weight
        return chosen

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = [(part.rows, part.cols, part.bits(), part.values()) for part in self.parts]
        return _rebuild, (arrays, self.shape, self.dtype, self.transposed)

    def __repr__(self) -> str:
        values = "" if self.value_dtype == self.dtype else f", {self.value_dtype} values"
        return f"PackedWeight({'x'.join(map(str, self.shape))}, density {self.density:.4g}{values})"


def find(handle: int) -> PackedWeight:
    """The living weight of that handle.

    Raises:
        RuntimeError: There is none: its layer is gone, or lives in another process.
    """
    try:
        return _living[handle]
    except KeyError:
        msg = f"no packed weight {handle} in this process: its layer was deleted, or compiled elsewhere"
        raise RuntimeError(msg) from None


def _after_fork() -> None:
    """Frees the locks in a child, and lets no product wait for torch's threads, which it has not."""
    for weight in list(_living.values()):
        weight._lock = threading.RLock()
        weight._kernels = {key: kernel for key, kernel in weight._kernels.items() if kernel != "dense"}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def to_array(tensor: Tensor) -> NDArray[Any]:
    """A CPU tensor of floats as a NumPy array on the same memory where it is contiguous."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_array(array: NDArray[Any]) -> Tensor:
    """A NumPy array of floats as a tensor on the same memory."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _rebuild(
    arrays: list[tuple[int, int, NDArray[np.uint8], NDArray[Any]]],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    transposed: bool,
) -> PackedWeight:
    parts = tuple(Packed.from_parts(*part) for part in arrays)
    return PackedWeight(parts, shape, dtype, transposed=transposed)
