"""The form of int4 values: the bitmask or slots, whichever is expected to multiply one row of x faster.

The layers of a model that decodes text take turns, so that small ones come from the outer cache and large
ones from memory. Slots then take as long as their bytes; the bitmask has fewer bytes, but a fixed cost for
each 64 weights. In seconds for a byte of slots from memory

    slots      bytes, or 0.7 bytes where these are up to 2 MiB
    bitmask    12 (weights / 64) + 0.52 bytes

fitted to times on one machine with AVX-512 and two threads: the constants of the bitmask to weights of
4096 x 4096 with 50 to 95 % zeros, the 0.7 to the products of SmolLM2-135M at 50 %, 80 % and 8:16. For batches
of 8 and 80 % zeros or more slots would be somewhat faster than the bitmask that one row has.
"""

from __future__ import annotations

from sparsam import _core
from sparsam._core import Packed

__all__ = ["faster_form", "in_faster_form"]

_PER_WORD = 12.0
_PER_BYTE = 0.52
_SMALL, _OF_SMALL = 2 << 20, 0.7


def in_faster_form(packed: Packed) -> Packed:
    """Returns the matrix with one of its forms alone; its others are gone."""
    form = faster_form(packed)
    packed.add(form)
    packed.keep((form,))
    return packed


def faster_form(packed: Packed) -> str:
    """The name of the form for int4 values under the current settings; it depends on their places alone.

    May leave either form in `packed`, so that it need not be built again.
    """
    if packed.nnz == 0 or "avx512vnni" not in _core.int8_isas():
        return "slots"  # nothing else expands bits fast
    packed.add("bitmask")
    bitmask = _PER_WORD * packed.rows * packed.cols / 64 + _PER_BYTE * len(packed.buffer("bitmask"))
    if _slots(packed.nnz) > bitmask:  # they have a byte for each weight, and more: no need to build them
        return "bitmask"
    packed.add("slots")
    return "bitmask" if _slots(len(packed.buffer("slots"))) > bitmask else "slots"


def _slots(size: int) -> float:
    return size if size > _SMALL else _OF_SMALL * size
