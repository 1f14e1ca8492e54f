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
        "expected [0-9]+ bytes": data + b"\0",
        "starts with": b"PK" + data[2:],
        "header": data[:8] + b"\xff" * 8 + data[16:],
        "past the last": data[:-1] + b"\xff",
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
    with pytest.raises(TypeError, match="expected dtype bool"):
        Mask.from_array(np.ones(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected the mask's shape \(2, 3\); got \(3, 2\)"):
        mask.apply(np.ones((3, 2), np.float32))
    with pytest.raises(TypeError, match="expected float16"):
        mask.apply(np.ones((2, 3), np.int64))
    with pytest.raises(ValueError, match="expected the same shape"):
        mask & Mask.ones((3, 2))
    x: NDArray[Any] = np.zeros(7, np.float32)
    with pytest.raises(ValueError, match="got overlapping memory"):
        mask.apply(x[:6].reshape(2, 3), out=x[1:].reshape(2, 3))
    with pytest.raises(ValueError, match="read-only"):
        mask.apply(np.ones((2, 3), np.float32), out=np.broadcast_to(np.float32(0), (2, 3)))


def test_ones_refuses_negative_lengths() -> None:
    for shape in ((-1,), (-2, -3)):
        with pytest.raises(ValueError, match="expected a shape of lengths of at least 0"):
            Mask.ones(shape)


@pytest.mark.parametrize("shape", [(0, 2**63), (2**40, 2**40, 0), (0, 2**64 - 1), (5, 0, 2**62, 7)], ids=str)
def test_shapes_that_numpy_cannot_hold_are_refused(shape: tuple[int, ...]) -> None:
    empty = Mask.ones((0,)).to_bytes()[:8]
    data = empty + len(shape).to_bytes(8, "little") + b"".join(n.to_bytes(8, "little") for n in shape)
    with pytest.raises(ValueError, match="that NumPy can hold; got"):
        Mask.from_bytes(data)
    with pytest.raises(ValueError, match="that NumPy can hold; got"):
        Mask.ones(shape)


def test_the_most_dimensions_round_trip() -> None:
    mask = Mask.ones((1,) * 32)
    assert Mask.from_bytes(mask.to_bytes()) == mask
    assert mask.to_array().shape == (1,) * 32


kept = np.random.default_rng(0).random((5, 7)) < 0.4
packed = Mask.from_array(kept)
dense = np.random.default_rng(1).standard_normal((5, 7))
other = np.random.default_rng(2).random((5, 7)) < 0.5


@pytest.mark.parametrize(
    "function",
    [
        np.asarray,
        lambda m: np.array(m, np.float32),
        lambda m: np.where(m, dense, 0),
        lambda m: np.where(m, 0, dense),
        lambda m: dense.sum(where=m),
        lambda m: dense.mean(where=m),
        lambda m: dense.max(initial=-9, where=m),
        lambda m: np.add(dense, 1, where=m, out=np.zeros_like(dense)),
        lambda m: np.logical_and(m, other),
        lambda m: np.logical_or(other, m),
        np.logical_not,
        np.count_nonzero,
        lambda m: np.count_nonzero(m, axis=1),
        np.nonzero,
        np.flatnonzero,
        lambda m: np.any(m, axis=1),
        np.all,
        lambda m: np.sum(m, axis=0),
        lambda m: np.select([m], [dense], -1),
        lambda m: np.extract(m, dense),
        lambda m: np.compress(np.asarray(m)[0], dense, axis=1),
        lambda m: np.ma.masked_array(dense, m).sum(),
        lambda m: np.array_equal(m, other),
        np.packbits,
        lambda m: np.multiply(dense, m),
        lambda m: dense * m,
        lambda m: m * dense,
        lambda m: dense[m],
        lambda m: dense[~m],
        lambda m: m == other,
        lambda m: other == m,
        lambda m: m != other,
        lambda m: other != m,
        lambda m: m & other,
        lambda m: other & m,
        lambda m: m | other,
        lambda m: np.stack([m, m]),
        np.logical_xor.reduce,
    ],
)
def test_numpy_sees_the_booleans(function: Any) -> None:
    ours, expected = function(packed), function(kept)
    assert type(ours) is type(expected)
    assert np.array_equal(ours, expected)
    if isinstance(expected, np.ndarray):
        assert ours.dtype == expected.dtype


def test_numpy_writes_where_a_mask_says() -> None:
    ours, expected = np.zeros_like(dense), np.zeros_like(dense)
    np.copyto(ours, dense, where=packed)
    np.copyto(expected, dense, where=kept)
    assert np.array_equal(ours, expected)
    np.putmask(ours, packed, 3.0)
    np.putmask(expected, kept, 3.0)
    assert np.array_equal(ours, expected)
    ours[packed] = -1
    expected[kept] = -1
    assert np.array_equal(ours, expected)
    with pytest.raises(ValueError, match="shape"):
        np.where(packed, dense[:2], 0)


def test_a_mask_has_no_truth_value() -> None:
    for question in (
        lambda: bool(packed),
        lambda: not packed,
        lambda: packed or None,
        lambda: np.bool_(0) if packed else 1,
    ):
        with pytest.raises(ValueError, match=r"got bool\(mask\), which is ambiguous; compare mask.count"):
            question()
    with pytest.raises(ValueError, match="expected True or None"):
        packed.__array__(copy=False)


def test_masks_compare_with_masks_and_with_what_has_an_array() -> None:
    assert (packed == Mask.from_array(kept)) is True
    assert packed != ~packed
    assert packed != Mask.ones((7, 5))
    assert packed != "mask"
    assert (packed == None) is False  # noqa: E711
    assert np.array_equal(packed == True, kept)  # noqa: E712
    assert np.array_equal(packed == False, ~kept)  # noqa: E712 - an index, as in w[mask == False]
    assert np.array_equal(packed != 1, ~kept)
    assert np.array_equal(packed == kept.tolist(), np.ones_like(kept))
    with pytest.raises(ValueError, match=r"broadcast|shape"):
        assert packed == np.ones((2, 2), np.bool_)
    torch = pytest.importorskip("torch")
    assert np.array_equal(packed == torch.from_numpy(other), kept == other)
