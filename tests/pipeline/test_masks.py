from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from cases import DTYPES, SIZES, make
from sparsam import Mask

BOOLS = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=11))


@given(BOOLS)
def test_round_trips(keep: NDArray[np.bool_]) -> None:
    mask = Mask.from_array(keep)
    assert np.array_equal(mask.to_array(), keep)
    assert Mask.from_bytes(mask.to_bytes()) == mask
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert copy.deepcopy(mask) == mask
    assert mask.shape == keep.shape
    assert mask.count == keep.sum()
    assert hash(mask) == hash(Mask.from_array(keep.copy()))


@given(st.data())
def test_algebra(data: st.DataObject) -> None:
    a = data.draw(BOOLS)
    b = data.draw(hnp.arrays(np.bool_, a.shape))
    x, y = Mask.from_array(a), Mask.from_array(b)
    assert np.array_equal((x & y).to_array(), a & b)
    assert np.array_equal((x | y).to_array(), a | b)
    assert np.array_equal((~x).to_array(), ~a)
    assert ~~x == x
    assert (x == y) == np.array_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply(isa: str, threads: int, dtype: str) -> None:
    for n in (*SIZES, 300_001):
        x = make("normal", n, dtype)
        keep = np.random.default_rng(1).random(n) < 0.4
        expected = np.where(keep, x, np.zeros(1, x.dtype))
        mask = Mask.from_array(keep)
        assert np.array_equal(mask.apply(x), expected)
        strided = np.zeros(2 * n, x.dtype)[::2]
        assert mask.apply(x[::-1][::-1], out=strided) is strided
        assert np.array_equal(strided, expected)
        assert mask.apply(x, out=x) is x
        assert np.array_equal(x, expected)
        assert not np.signbit(x[~keep]).any()


def test_golden_bytes() -> None:
    keep = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 1, 1]], np.bool_)
    data = Mask.from_array(keep).to_bytes()
    assert data.hex() == "53504d41534b00010200000000000000020000000000000005000000000000000d03"
    assert Mask.from_bytes(data).to_array().tolist() == keep.tolist()
    assert Mask.from_array(np.array(True)).to_bytes().hex() == "53504d41534b0001000000000000000001"


def test_damaged_bytes_are_refused() -> None:
    data = Mask.from_array(np.ones((3, 5), np.bool_)).to_bytes()
    for end in range(len(data)):
        with pytest.raises(ValueError, match="mask"):
            Mask.from_bytes(data[:end])
    damaged = {
        "bytes: expected": data + b"\0",
        "starts with": b"PK" + data[2:],
        "header": data[:8] + b"\xff" * 8 + data[16:],
        "bits past the last": data[:-1] + b"\xff",
        "expected [0-9]{20,}": data[:16] + b"\xff" * 16 + data[32:],
    }
    for message, bad in damaged.items():
        with pytest.raises(ValueError, match=message):
            Mask.from_bytes(bad)


def test_immutable() -> None:
    keep = np.ones(10, np.bool_)
    mask = Mask.from_array(keep)
    keep[:] = False
    assert mask.count == 10
    with pytest.raises(ValueError, match="read-only"):
        mask.bits[0] = 0
    with pytest.raises(AttributeError):
        mask.shape = (5, 2)  # type: ignore[misc]


def test_numbers() -> None:
    mask = Mask.from_array(np.array([True, False, False, True]))
    assert (mask.size, mask.count, mask.density, mask.sparsity) == (4, 2, 0.5, 0.5)
    assert mask.bits.tolist() == [0b1001]
    assert repr(mask) == "Mask(shape=(4,), kept=2 of 4, density=0.5)"
    assert Mask.ones((0, 3)).density == 1.0
    assert Mask.ones((3, 3)).count == 9


def test_errors() -> None:
    mask = Mask.ones((2, 3))
    with pytest.raises(TypeError, match="expected bool"):
        Mask.from_array(np.ones(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(3, 2\): the mask has \(2, 3\)"):
        mask.apply(np.ones((3, 2), np.float32))
    with pytest.raises(TypeError, match="expected float16"):
        mask.apply(np.ones((2, 3), np.int64))
    with pytest.raises(ValueError, match="expected the same shape"):
        mask & Mask.ones((3, 2))
    with pytest.raises(TypeError):
        mask & np.ones((2, 3), np.bool_)  # type: ignore[operator]
    x: NDArray[Any] = np.zeros(7, np.float32)
    with pytest.raises(ValueError, match="overlaps"):
        mask.apply(x[:6].reshape(2, 3), out=x[1:].reshape(2, 3))
    with pytest.raises(ValueError, match="read-only"):
        mask.apply(np.ones((2, 3), np.float32), out=np.broadcast_to(np.float32(0), (2, 3)))


def test_ones_refuses_negative_lengths() -> None:
    for shape in ((-1,), (-2, -3)):
        with pytest.raises(ValueError, match="expected lengths of at least 0"):
            Mask.ones(shape)
