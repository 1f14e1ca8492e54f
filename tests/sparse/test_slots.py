"""The form in slots: byte by byte, checked, and multiplied under every instruction set, whichever made it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sparsam
from packed_forms import only, weights
from sparsam._core import Packed

EIGHT = (  # slots for 8 lanes
    "73706172 73616d00 02000000 03020000 0200000000000000 0900000000000000 0300000000000000"
    "0800000000000000 0300000000000000 0200000000000000"
    "8000000000000000 c000000000000000 0001000000000000 4001000000000000"
    "4001000000000000 8001000000000000 0002000000000000 0000000000000000"
    "0000000000000000 0000000000000000 0200000000000000 0300000000000000"
    + 32 * "00"
    + "404040404040 0100"
    + 56 * "00"
    + "00000cc0 0000e080"
    + 56 * "00"
    + "0001"
    + 62 * "00"
    + "0000003f 0000803f 000000c0"
    + 116 * "00"
)
SIXTEEN = (  # slots for 16 lanes
    "73706172 73616d00 02000000 03020000 0200000000000000 0900000000000000 0300000000000000"
    "1000000000000000 0300000000000000 0200000000000000"
    "8000000000000000 c000000000000000 0001000000000000 4001000000000000"
    "8001000000000000 c001000000000000 4002000000000000 0000000000000000"
    "0000000000000000 0000000000000000 0200000000000000 0300000000000000"
    + 32 * "00"
    + "4040404040404040 4040404040400100"
    + 48 * "00"
    + "0000003000000000 0000000000000080"
    + 48 * "00"
    + "00c0 0080"
    + 60 * "00"
    + "0000"
    + 62 * "00"
    + "0000003f 0000803f 000000c0"
    + 116 * "00"
)
LANES = {"generic": 8, "neon": 8, "avx2": 8, "avx512": 16}


def slots_of(w: NDArray[Any], lanes: int) -> NDArray[np.uint8]:
    """The slots of a weight as an instruction set with so many lanes makes them."""
    isa = next((isa for isa in sparsam.available_isas() if LANES[isa] == lanes), None)
    if isa is None:
        pytest.skip(f"this machine has no instruction set with {lanes} lanes")
    with sparsam.use_isa(isa):
        return only(Packed.pack(w), "slots").buffer("slots")


def small() -> NDArray[np.float32]:
    """1, -2 at columns 0 and 8 of the first row; 0.5 at column 3 of the second."""
    w = np.zeros((2, 9), np.float32)
    w[0, 0], w[0, 8], w[1, 3] = 1, -2, 0.5
    return w


@pytest.mark.parametrize(("lanes", "golden"), [(8, EIGHT), (16, SIXTEEN)])
def test_golden_bytes(lanes: int, golden: str) -> None:
    assert slots_of(small(), lanes).tobytes() == bytes.fromhex(golden)


Change = tuple[int, int] | tuple[int, int, int]  # offset, value, bytes: 8 by default
DAMAGED: dict[str, tuple[Change, str]] = {
    "slots depth": ((40, 4), "slots: 8 or 16"),
    "slots steps": ((56, 1 << 62), "units and steps that fit"),
    "slots units": ((48, 1), "units and steps that fit"),
    "a group": ((128, 1), "groups from the first step"),
    "values of a group": ((152, 2), "groups from the first step"),
    "a row of a block twice": ((198, 0, 1), "rows that it cannot have"),
    "a row beyond the block": ((198, 2, 1), "rows that it cannot have"),
    "a row fewer": ((198, 64, 1), "a row is missing"),
    "a slot without a row": ((259, 0xA0, 1), "has a column|no row"),
    "an unused column": ((256, 7, 1), "not used has a column"),
    "columns not in order": ((256, 0x80000000_C0EC0000), "not in order"),
    "a start beyond": ((321, 2, 1), "past the last column"),
    "fewer slots than values": ((259, 0x80, 1), "not used has a column|other values"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_buffers_are_refused(name: str) -> None:
    (at, value, *size), message = DAMAGED[name]
    buffer = slots_of(small(), 8).copy()
    length = size[0] if size else 8
    buffer[at : at + length] = np.frombuffer(value.to_bytes(length, "little"), np.uint8)
    with pytest.raises(ValueError, match=f"buffer: .*({message}).*; pack the weight again"):
        Packed.from_buffers([buffer])


@pytest.mark.parametrize("lanes", [8, 16])
def test_slots_multiply_under_every_instruction_set(isa: str, lanes: int) -> None:
    """Whichever made them; long gaps, rows of all lengths and windows at both ends included."""
    rng = np.random.default_rng(0)
    for rows, cols in ((1, 1), (3, 7), (130, 15), (77, 16), (64, 1000), (9, 70_001)):
        w = weights(rows, cols, 0.0)
        w[rng.random(w.shape) < rng.random((rows, 1)) ** (1 if cols < 9000 else 1e-4)] = 0
        w[:, -1] = 1
        packed = Packed.from_buffers([slots_of(w, lanes)])
        assert packed.unpack().tobytes() == w.tobytes()
        for batch in (1, 2, 3, 5, 8, 19):
            x, y = rng.standard_normal((batch, cols), np.float32), np.empty((batch, rows), np.float32)
            packed.linear("slots", x, None, "", y)
            exact, size = x.astype(np.float64) @ w.T, np.abs(x).astype(np.float64) @ np.abs(w.T)
            assert (np.abs(y - exact) <= 6e-8 * ((w != 0).sum(axis=1) + 2) * size + 1e-37).all()


@pytest.mark.parametrize("lanes", [8, 16])
def test_slots_have_all_values_where_most_are_used_and_caches_hold_them(lanes: int) -> None:
    """As many as slots, or as nonzero weights; a damaged one is refused."""
    for (rows, cols), sparsity, full in (
        ((64, 100), 0.3, True),
        ((64, 100), 0.97, False),
        ((2048, 2048), 0.4, False),
    ):
        w = weights(rows, cols, sparsity)
        buffer = slots_of(w, lanes).copy()
        units, steps = buffer[48:64].view(np.uint64)
        assert units == (steps * lanes if full else np.count_nonzero(w))
        assert Packed.from_buffers([buffer]).unpack().tobytes() == w.tobytes()
        if full:
            values = buffer[int(buffer[104:112].view(np.uint64)[0]) :].view(np.float32)[: int(units)]
            values[np.flatnonzero(values == 0)[0]] = 1
            with pytest.raises(ValueError, match="a slot that is not used has a value"):
                Packed.from_buffers([buffer])
