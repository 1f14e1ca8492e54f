from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cases import DTYPES
from sparsam import statistics
from sparsam.statistics import InputStatistics


def inputs(*shape: int, seed: int = 0, dtype: Any = np.float64) -> NDArray[Any]:
    x: NDArray[Any] = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return x


@pytest.mark.parametrize("dtype", [*DTYPES.values(), np.dtype(">f4")], ids=str)
def test_sums_are_those_of_the_inputs(dtype: Any) -> None:
    x = inputs(3, 50, 7, dtype=dtype) + np.ones(7).astype(dtype)
    before = x.tobytes()
    s = InputStatistics(7).update(x)
    flat = x.astype(np.float64).reshape(-1, 7)
    assert s.count == 150
    np.testing.assert_allclose(s.mean, flat.sum(0) / 150, rtol=1e-13)
    np.testing.assert_allclose(s.sum_squares, (flat**2).sum(0), rtol=1e-13)
    np.testing.assert_allclose(s.rms, np.linalg.norm(flat, axis=0) / np.sqrt(150), rtol=1e-13)
    np.testing.assert_allclose(s.gram, sum(np.outer(row, row) for row in flat), rtol=1e-12, atol=1e-12)
    assert np.array_equal(s.gram, s.gram.T)
    assert x.tobytes() == before


def test_half_precision_does_not_overflow() -> None:
    s = InputStatistics(1).update(np.full((1000, 1), 60000, np.float16))
    size = float(np.float16(60000))
    assert s.sum_squares == [1000 * size**2]
    assert s.rms == [size]
    assert s.gram == [[1000 * size**2]]


def test_strides_and_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).integers(-9, 9, (20, 6)).astype(np.float32)  # sums are exact
    whole = InputStatistics(6).update(x)
    monkeypatch.setattr(statistics, "_PIECE", 13)
    for view in (x, np.asfortranarray(x), x[::-1], np.repeat(x, 2, axis=1)[:, ::2], x.reshape(4, 5, 6)):
        s = InputStatistics(6).update(view)
        assert s.count == 20
        assert np.array_equal(s.gram, whole.gram)
        assert np.array_equal(s.mean, whole.mean)
        assert np.array_equal(s.sum_squares, whole.sum_squares)


@given(st.lists(st.integers(0, 5), max_size=5), st.integers(0, 5), st.booleans())
def test_a_sum_is_one_object_updated_with_both(sizes: list[int], cut: int, gram: bool) -> None:
    rng = np.random.default_rng(len(sizes))
    batches = [rng.integers(-9, 9, (n, 3)).astype(np.float64) for n in sizes]
    a, b, both = (InputStatistics(3, gram=gram) for _ in range(3))
    for i, batch in enumerate(batches):
        (a if i < cut else b).update(batch)
        both.update(batch)
    merged = pickle.loads(pickle.dumps(a)) + b
    assert merged.count == both.count == sum(sizes)
    assert np.array_equal(merged.sum_squares, both.sum_squares)
    if gram:
        assert np.array_equal(merged.gram, both.gram)
    if both.count:
        assert np.array_equal(merged.mean, both.mean)


def test_merging_and_updating_leave_what_was_handed_out() -> None:
    a, b = InputStatistics(2).update(np.ones((3, 2))), InputStatistics(2).update([5.0, 6.0])
    gram, squares = a.gram, a.sum_squares
    merged = a + b
    merged.update(np.ones((1, 2)))
    a.update(np.ones((1, 2)))
    assert gram.tolist() == [[3, 3], [3, 3]]
    assert squares.tolist() == [3, 3]
    assert (a.count, b.count, merged.count) == (4, 1, 5)
    for array in (a.gram, a.sum_squares, a.mean, a.rms):
        assert not array.flags.writeable
    assert str(merged) == "InputStatistics(in_features=2, gram=True, count=5)"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_refused_and_changes_nothing(
    bad: float, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_PIECE", 16)
    s = InputStatistics(4).update(np.ones((2, 4)))
    x = np.ones((5, 3, 4)).astype(DTYPES[dtype])
    x[3, 1, 2] = bad
    with pytest.raises(ValueError, match=rf"inputs are {bad} at index \(3, 1, 2\): expected finite"):
        s.update(x)
    with pytest.raises(ValueError, match=rf"inputs are {bad} at index \(2,\)"):
        s.update(x[3, 1])
    assert (s.count, s.sum_squares.tolist()) == (2, [2.0] * 4)


def test_squares_beyond_float64_are_refused() -> None:
    s = InputStatistics(2)
    with pytest.raises(ValueError, match=r"inputs reach 1e\+200: their squares exceed float64"):
        s.update([[1e200, 1.0]])
    assert s.count == 0


def test_errors_say_what_to_do() -> None:
    s = InputStatistics(3, gram=False)
    for shape in ((), (4,), (3, 4)):
        with pytest.raises(ValueError, match=r"inputs have shape .*: expected \(\.\.\., 3\)"):
            s.update(np.ones(shape))
    with pytest.raises(TypeError, match="inputs have dtype int64: expected floating-point"):
        s.update(np.ones((2, 3), np.int64))
    for name in ("mean", "rms"):
        with pytest.raises(ValueError, match="seen no input"):
            getattr(s, name)
    with pytest.raises(ValueError, match="made with gram=False"):
        s.gram  # noqa: B018
    with pytest.raises(ValueError, match="of 3 and 4 inputs: expected the same"):
        s + InputStatistics(4, gram=False)
    with pytest.raises(ValueError, match="gram=True and gram=False"):
        s + InputStatistics(3)
    with pytest.raises(TypeError, match="unsupported operand"):
        s + 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="in_features: expected an integer of at least 1; got 0"):
        InputStatistics(0)
