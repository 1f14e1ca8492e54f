"""The ways to multiply with a packed matrix, behind one call.

"bitmask", "panels" and "slots" are kernels of the core, each over the form of its name; int4 values
have "bitmask" and "slots", int8 values "slots" alone. "dense" is NumPy's BLAS over an unpacked copy.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sparsam._core import Packed
from sparsam.sparse.cost_model import Weight

Floats = NDArray[np.float32]

KERNELS = ("dense", "bitmask", "panels", "slots")
ROUNDED_KERNELS = {"int8": ("slots",), "int4": ("bitmask", "slots")}
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")

_UNIT = 64
_IDENTITY = Packed.pack(np.eye(_UNIT, dtype=np.float32))
_IDENTITY.add("panels")


def kernels_of(weight: Weight) -> tuple[str, ...]:
    """The kernels that can multiply with a weight."""
    return ROUNDED_KERNELS.get(weight.dtype, KERNELS)


def multiply(
    kernel: str,
    packed: Packed | None,
    dense: Floats | None,
    x: Floats,
    bias: Floats | None,
    activation: str,
    out: Floats,
) -> None:
    """Writes activation(x W^T + bias) into `out`, where a pruned weight multiplies nothing.

    Args:
        kernel: One of KERNELS.
        packed: W, with the form that the kernel reads; "dense" can do without.
        dense: W unpacked; only "dense" needs it.
        x: (n, in), in C order.
        bias: (out,), contiguous, or None.
        activation: One of ACTIVATIONS, or "".
        out: (n, out), in C order; overlaps no other argument.
    """
    if kernel != "dense":
        assert packed is not None
        packed.linear(kernel, x, bias, activation, out)
        return
    assert dense is not None
    if not math.isfinite(np.vdot(x, x)):
        # A dense product would multiply pruned weights by infinities and NaN in x, and 0 times those is NaN.
        # If only the sum of squares overflowed, the packed product is still right, just slower.
        packed = packed or Packed.pack(dense)
        packed.linear(packed.forms[-1], x, bias, activation, out)
        return
    with np.errstate(all="ignore"):  # as in the kernels, infinities and NaN are valid results
        np.dot(x, dense.T, out=out)
        if bias is not None:
            out += bias
    if activation:
        _activate(out.reshape(-1), activation)


def _activate(values: Floats, activation: str) -> None:
    """Applies the kernels' own activation in place: a product with the identity ends in it."""
    whole = values[: values.size // _UNIT * _UNIT].reshape(-1, _UNIT)
    _IDENTITY.linear("panels", whole.copy(), None, activation, whole)
    if rest := values.size - whole.size:
        line = np.zeros((2, _UNIT), np.float32)
        line[0, :rest] = values[whole.size :]
        _IDENTITY.linear("panels", line[:1], None, activation, line[1:])
        values[whole.size :] = line[1, :rest]
