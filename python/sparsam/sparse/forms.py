"""The forms in which one weight is held: packed ones of the core, a dense copy, or both."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from sparsam._core import Packed
from sparsam.inputs.float_mode import standard_floats
from sparsam.sparse.cost_model import BATCHES, Expectation, Weight
from sparsam.sparse.dispatch import needed_kernels
from sparsam.sparse.matmul import KERNELS, Floats, multiply

__all__ = ["Forms"]

_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclass(frozen=True, eq=False)
class Forms:
    """An immutable set of forms; methods that change it return a new one, which shares the memory.

    So a product in progress keeps the forms that it started with, without a lock, which a forked child could
    inherit while it is held.

    Attributes:
        weight: The properties of the weight.
        packed: The packed forms; None where the dense copy alone gives everything back.
        dense: The dense copy in float32, which "dense" multiplies with.
    """

    weight: Weight
    packed: Packed | None
    dense: Floats | None = None

    @classmethod
    def of(cls, packed: Packed) -> Forms:
        """The packed forms alone."""
        return cls(Weight.of(packed), packed)

    def needed(self, expected: Expectation) -> tuple[str, ...]:
        """The kernels with which no batch is expected to be slow: one, or two if one is not enough."""
        if self.weight.nnz == 0 or self.weight.rounded:
            return self.kernels
        return needed_kernels([expected.times(batch, KERNELS) for batch in BATCHES], most=2)

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels that can multiply with what is held."""
        packed = () if self.packed is None else self.packed.forms
        return packed if self.dense is None else (*packed, "dense")

    @property
    def nbytes(self) -> int:
        """Bytes of all forms."""
        packed = 0 if self.packed is None else self.packed.nbytes
        return packed if self.dense is None else packed + self.dense.nbytes

    @standard_floats
    def readable(self) -> Packed:
        """Packed forms from which the weight can be read; made on the spot if only the dense copy is held."""
        if self.packed is not None:
            return self.packed
        assert self.dense is not None
        with np.errstate(invalid="ignore"):
            return Packed.pack(self.dense.astype(_DTYPES[self.weight.dtype], copy=False))

    @standard_floats
    def with_kernel(self, kernel: str) -> Forms:
        """These forms, and the one that a kernel needs."""
        if kernel in self.kernels:
            return self
        if kernel == "dense":
            with np.errstate(invalid="ignore"):  # signalling NaNs
                dense = self.readable().unpack().astype(np.float32, copy=False)
            return Forms(self.weight, self.packed, dense)
        held = self.readable()
        packed = Packed.from_buffers([held.buffer(form) for form in held.forms], trusted=True)
        packed.add(kernel)
        return Forms(self.weight, packed, self.dense)

    @standard_floats
    def keeping(self, kernels: Collection[str]) -> Forms:
        """The forms that these kernels need, built where missing; a packed one too if dense loses something.

        The dense copy alone cannot tell which zeros were kept on purpose.
        """
        forms = self
        for kernel in kernels:
            forms = forms.with_kernel(kernel)
        dense = forms.dense if "dense" in kernels else None
        packed, kept = forms.packed, [form for form in forms.kernels if form in kernels and form != "dense"]
        if not kept and dense is not None and np.count_nonzero(dense) == self.weight.nnz:
            return Forms(self.weight, None, dense)
        if packed is not None and (kept := kept or [packed.forms[0]]) != [*packed.forms]:
            packed = Packed.from_buffers([packed.buffer(form) for form in kept], trusted=True)
        return Forms(self.weight, packed, dense)

    def multiply(self, kernel: str, x: Floats, bias: Floats | None, activation: str, out: Floats) -> None:
        """See `matmul.multiply`."""
        multiply(kernel, self.packed, self.dense, x, bias, activation, out)
