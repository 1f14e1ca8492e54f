from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cases import DTYPES
from sparsam import moments, statistics
from sparsam.statistics import InputStatistics


def check_moments(s: InputStatistics, x: NDArray[Any]) -> None:
    """Within the documented bound of sums in extended precision, for the precision that the products had."""
    bound = (2.0**-16 if s.precision > 1e-10 else 2.0**-43) + 1e-15
    wide = x.astype(np.longdouble)
    centre = wide - wide.mean(axis=0)
    for got, rows in ((s.centred.gram, centre), (s.gram, wide)):
        want = rows.T @ rows
        sizes = np.sqrt(want.diagonal())
        assert (np.abs(got - want) <= bound * np.outer(sizes, sizes)).all()
        assert np.array_equal(got, got.T)
        assert (got.diagonal() >= 0).all()


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
    check_moments(s, flat)
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
        check_moments(s, x)
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
        np.testing.assert_allclose(merged.gram, both.gram, rtol=1e-13, atol=1e-11)
        if both.count:
            check_moments(merged, np.concatenate(batches))
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
    with pytest.raises(ValueError, match=rf"inputs: expected finite numbers; got {bad} at index \(3, 1, 2\)"):
        s.update(x)
    with pytest.raises(ValueError, match=rf"inputs: expected finite numbers; got {bad} at index \(2,\)"):
        s.update(x[3, 1])
    assert (s.count, s.sum_squares.tolist()) == (2, [2.0] * 4)


def test_squares_beyond_float64_are_refused() -> None:
    s = InputStatistics(2)
    with pytest.raises(
        ValueError, match=r"inputs: expected squares within float64; got values up to 1e\+200"
    ):
        s.update([[1e200, 1.0]])
    assert s.count == 0


def test_errors_say_what_to_do() -> None:
    s = InputStatistics(3, gram=False)
    for shape in ((), (4,), (3, 4)):
        with pytest.raises(ValueError, match=r"inputs: expected shape \(\.\.\., 3\); got "):
            s.update(np.ones(shape))
    with pytest.raises(TypeError, match="inputs: expected floating-point numbers; got dtype int64"):
        s.update(np.ones((2, 3), np.int64))
    for name in ("mean", "rms"):
        with pytest.raises(ValueError, match="expected at least one input; got none"):
            getattr(s, name)
    with pytest.raises(ValueError, match="expected gram=True; got gram=False"):
        s.gram  # noqa: B018
    with pytest.raises(ValueError, match="expected the same in_features; got 3 and 4"):
        s + InputStatistics(4, gram=False)
    with pytest.raises(ValueError, match="expected the same gram=; got True and False"):
        s + InputStatistics(3)
    with pytest.raises(TypeError, match="unsupported operand"):
        s + 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="in_features: expected an integer of at least 1; got 0"):
        InputStatistics(0)


@pytest.mark.parametrize("mean", [0.0, 100.0, -8e3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_centred_moments_of_inputs_far_from_zero(mean: float, dtype: Any) -> None:
    x = (inputs(1300, 20) + mean).astype(dtype)
    x[:, 3] = 0.1
    x[0, 5] += 1000  # the first token of a language model
    s = InputStatistics(20)
    for part in np.split(x, [1, 7, 700]):
        s.update(part)
    check_moments(s, x)
    assert not s.centred.gram[3].any()
    assert s.centred.mean[3] == dtype(0.1)
    assert (s.centred.count, s.precision) == (1300, np.finfo(dtype).eps)
    halves = InputStatistics(20).update(x[:650]) + InputStatistics(20).update(x[650:])
    check_moments(halves, x)
    assert not halves.centred.gram[3].any()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_products_that_float32_cannot_hold(size: float) -> None:
    x = inputs(100, 4)
    x[:, :2] *= size
    s = InputStatistics(4).update(x.astype(np.float32))
    check_moments(s, x.astype(np.float32))
    assert (s.gram.diagonal() > 0).all()


def test_an_interrupted_update_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    s = InputStatistics(4).update(inputs(5, 4))

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(moments, "_centre", interrupted)
    with pytest.raises(KeyboardInterrupt):
        s.update(inputs(5, 4))
    with pytest.raises(ValueError, match="expected complete updates; got an interrupted one"):
        s.gram  # noqa: B018


def test_centred_moments_stay_what_they_were() -> None:
    s = InputStatistics(4).update(inputs(5, 4))
    before = s.centred.gram
    copy = before.copy()
    s.update(inputs(5, 4, seed=1))
    assert np.array_equal(before, copy)
    assert not np.array_equal(s.centred.gram, copy)
