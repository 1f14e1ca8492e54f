"""Cross moments with wanted outputs, and weights of rows."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cases import DTYPES
from sparsam import Mask
from sparsam.reconstruction import refit
from sparsam.statistics import InputStatistics

IN, OUT = 7, 5


def rows(n: int, width: int, seed: int = 0, dtype: Any = np.float64) -> NDArray[Any]:
    x: NDArray[Any] = np.random.default_rng(seed).standard_normal((n, width)).astype(dtype)
    return x


def check(s: InputStatistics, x: NDArray[Any], y: NDArray[Any], weights: NDArray[Any] | None = None) -> None:
    """Against sums in extended precision, within the documented bound."""
    w = np.ones(len(x), np.longdouble) if weights is None else weights.astype(np.longdouble)
    x, y = x.astype(np.longdouble), y.astype(np.longdouble)
    bound = (2.0**-16 if s.precision > 1e-10 else 2.0**-43) + 1e-15
    mean, target_mean = w @ x / w.sum(), w @ y / w.sum()
    np.testing.assert_allclose(s.mean, mean.astype(float), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(s.target_mean, target_mean.astype(float), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(s.target_squares, (w @ y**2).astype(float), rtol=1e-12)
    np.testing.assert_allclose(s.sum_squares, (w @ x**2).astype(float), rtol=1e-12)
    assert s.weight == pytest.approx(float(w.sum()), rel=1e-14)
    c = s.centred
    assert c.cross is not None
    assert c.target_squares is not None
    assert (c.count, c.weight, c.precision) == (s.count, s.weight, s.precision)
    for left, right, gram, cross in (
        (x, y, s.gram, s.cross),
        (x - mean, y - target_mean, c.gram, c.cross),
    ):
        sizes, target_sizes = np.sqrt(w @ left**2), np.sqrt(w @ right**2)
        assert (np.abs(gram - (left.T * w) @ left) <= bound * np.outer(sizes, sizes)).all()
        assert (np.abs(cross - (right.T * w) @ left) <= bound * np.outer(target_sizes, sizes)).all()
        assert np.array_equal(gram, gram.T)
    want = (w @ (y - target_mean) ** 2).astype(float)
    np.testing.assert_allclose(c.target_squares, want, rtol=1e-11)
    assert c.target_mean is not None
    np.testing.assert_allclose(c.target_mean, s.target_mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float16"), ("float32", "float64")])
def test_moments_with_targets_in_several_updates(dtypes: tuple[str, str], weighed: bool) -> None:
    x = rows(1300, IN, 1).astype(DTYPES[dtypes[0]])
    y = (rows(1300, OUT, 2) + 3).astype(DTYPES[dtypes[1]])
    weights = np.random.default_rng(3).exponential(size=1300) if weighed else None
    s = InputStatistics(IN, targets=OUT)
    for part in np.split(np.arange(1300), [1, 9, 800]):
        s.update(x[part], y[part], weights=None if weights is None else weights[part])
    check(s, x.astype(float), y.astype(float), weights)
    assert s.count == 1300
    assert s.precision == np.finfo(np.float64 if "float64" in dtypes else np.float32).eps
    assert str(s) == "InputStatistics(in_features=7, gram=True, targets=5, count=1300)"


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e30])
def test_columns_of_every_size_are_as_exact(size: float) -> None:
    x, y = rows(600, IN, 1, np.float32), rows(600, OUT, 2, np.float32)
    x[:, 1:3] *= np.float32(size)
    y[:, 2:4] /= np.float32(size)
    weights = np.where(np.arange(600) % 3, size, 1)
    s = InputStatistics(IN, targets=OUT).update(x, y, weights=weights)
    check(s, x, y, weights)
    assert s.precision == np.finfo(np.float32).eps


@given(st.lists(st.integers(0, 5), max_size=5), st.integers(0, 5), st.booleans())
def test_a_sum_is_one_object_updated_with_both(sizes: list[int], cut: int, weighed: bool) -> None:
    rng = np.random.default_rng(len(sizes))
    a, b, both = (InputStatistics(IN, targets=OUT) for _ in range(3))
    given = []
    for i, n in enumerate(sizes):
        x, y = rng.integers(-9, 9, (n, IN)).astype(np.float32), rng.integers(-9, 9, (n, OUT)).astype(float)
        weights = rng.integers(0, 3, n) if weighed else np.ones(n)
        for s in (a if i < cut else b, both):
            s.update(x, y, weights=weights if weighed else None)
        given.append((x, y, weights))
    merged = pickle.loads(pickle.dumps(a)) + b
    assert (merged.count, merged.weight) == (both.count, both.weight)
    if both.count:
        x, y, weights = (np.concatenate(parts) for parts in zip(*given, strict=True))
        for s in (merged, both):
            check(s, x, y, weights)


def test_rows_of_weight_zero_are_padding() -> None:
    x, y = rows(12, IN).reshape(3, 4, IN), rows(12, OUT).reshape(3, 4, OUT)
    mask = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    x[mask == 0], y[mask == 0] = np.nan, np.inf
    for weights in (mask, mask.astype(bool), mask.astype(np.float16)):
        s = InputStatistics(IN, targets=OUT).update(x, y, weights=weights)
        assert (s.count, s.weight) == (6, 6.0)
        check(s, x[mask == 1], y[mask == 1])
    x[2, 3, 4] = np.inf
    with pytest.raises(ValueError, match=r"inputs: expected finite numbers; got inf at index \(2, 3, 4\)"):
        s.update(x, y, weights=mask)
    none = InputStatistics(IN).update(x, weights=np.zeros((3, 4)))
    assert none.count == 0
    with pytest.raises(ValueError, match="expected at least one input"):
        none.mean  # noqa: B018


def test_a_whole_number_of_weight_is_that_many_rows() -> None:
    x, y = rows(40, IN), rows(40, OUT)
    times = np.random.default_rng(0).integers(0, 4, 40)
    weighed = InputStatistics(IN, targets=OUT).update(x, y, weights=times)
    repeated = InputStatistics(IN, targets=OUT).update(np.repeat(x, times, 0), np.repeat(y, times, 0))
    assert weighed.weight == repeated.count
    for what in ("mean", "rms", "gram", "cross", "target_mean", "target_squares"):
        np.testing.assert_allclose(getattr(weighed, what), getattr(repeated, what), rtol=1e-11, atol=1e-11)


def test_a_constant_input_has_no_moments() -> None:
    x, y = rows(90, IN, dtype=np.float32), rows(90, OUT)
    x[:, 3], y[:, 1] = 0.1, 0.1
    s = InputStatistics(IN, targets=OUT).update(x, y, weights=np.linspace(0.1, 7, 90))
    c = s.centred
    assert c.cross is not None
    assert c.target_mean is not None
    assert c.mean[3] == np.float32(0.1)
    assert c.target_mean[1] == 0.1
    assert not c.gram[3].any()
    assert not c.cross[:, 3].any()
    assert not c.cross[1].any()


def test_refit_with_these_moments_is_least_squares() -> None:
    x, y = rows(200, IN), rows(200, OUT)
    weights = np.random.default_rng(5).exponential(size=200)
    c = InputStatistics(IN, targets=OUT).update(x, y, weights=weights).centred
    keep = np.random.default_rng(6).random((OUT, IN)) < 0.6
    assert c.cross is not None
    assert c.target_mean is not None
    new = refit(np.zeros((OUT, IN)), c.gram, Mask.from_array(keep), cross=c.cross)
    bias = c.target_mean - new @ c.mean
    roots = np.sqrt(weights)[:, None]
    error = 0.0
    for i in range(OUT):
        columns = np.column_stack([x[:, keep[i]], np.ones(200)]) * roots
        best, rest, *_ = np.linalg.lstsq(columns, y[:, i] * roots[:, 0], rcond=None)
        np.testing.assert_allclose([*new[i, keep[i]], bias[i]], best, atol=1e-10)
        error += float(rest[0])
    assert c.squared_error(new) == pytest.approx(error, rel=1e-10)
    assert c.squared_error(new, bias) == pytest.approx(error, rel=1e-10)


def test_squared_error_is_that_of_the_rows() -> None:
    x, y = rows(50, IN), rows(50, OUT)
    weights = np.random.default_rng(5).exponential(size=50)
    c = InputStatistics(IN, targets=OUT).update(x, y, weights=weights).centred
    w, b = rows(2, IN, 7), rows(1, 2, 8)[0]
    want = float((weights[:, None] * (y[:, 1:3] - x @ w.T - b) ** 2).sum())
    assert c.squared_error(w, b, rows=slice(1, 3)) == pytest.approx(want, rel=1e-12)
    assert c.squared_error(w.reshape(2, IN, 1), b, rows=slice(1, 3)) == pytest.approx(want, rel=1e-12)
    with pytest.raises(ValueError, match=r"squared_error: expected w of shape \(5, 7\); got \(2, 7\)"):
        c.squared_error(w)
    with pytest.raises(ValueError, match=r"squared_error: expected bias of shape \(2,\); got \(7,\)"):
        c.squared_error(w, np.ones(7), rows=slice(1, 3))
    with pytest.raises(ValueError, match="squared_error: expected targets; got none"):
        InputStatistics(IN).update(x).centred.squared_error(w)


def test_errors_say_what_to_do() -> None:
    s, plain = InputStatistics(IN, targets=OUT), InputStatistics(IN)
    x, y = rows(4, IN), rows(4, OUT)
    with pytest.raises(ValueError, match="targets: expected none; got some"):
        plain.update(x, y)
    with pytest.raises(ValueError, match=r"targets: expected an array of shape \(..., 5\); got none"):
        s.update(x)
    with pytest.raises(ValueError, match=r"targets: expected shape \(\.\.\., 5\); got \(4, 7\)"):
        s.update(x, x)
    with pytest.raises(ValueError, match=r"targets: expected shape \(4, 5\); got \(3, 5\)"):
        s.update(x, y[:3])
    with pytest.raises(TypeError, match="targets: expected floating-point numbers; got dtype int64"):
        s.update(x, y.astype(np.int64))
    with pytest.raises(ValueError, match=r"targets: expected finite numbers; got nan at index \(2, 1\)"):
        s.update(x, np.where(np.arange(20).reshape(4, 5) == 11, np.nan, y))
    for weights, kind, message in (
        (np.ones(3), ValueError, r"weights: expected shape \(4,\), one for each row; got \(3,\)"),
        ([1, 1, -1, 1], ValueError, r"weights: expected finite .* at least 0; got -1.0 at index \(2,\)"),
        ([1, np.nan, 1, 1], ValueError, r"weights: expected finite .* at least 0; got nan at index \(1,\)"),
        (list("abcd"), TypeError, "weights: expected numbers; got dtype <U1"),
    ):
        with pytest.raises(kind, match=message):
            s.update(x, y, weights=weights)
    assert s.count == 0
    for what in ("cross", "target_mean", "target_squares"):
        with pytest.raises(ValueError, match="expected targets=; got None"):
            getattr(plain, what)
    with pytest.raises(ValueError, match="expected the same targets; got 5 and None"):
        s + plain
    with pytest.raises(ValueError, match="gram: expected True with targets; got False"):
        InputStatistics(IN, gram=False, targets=OUT)
    with pytest.raises(ValueError, match="targets: expected an integer of at least 1; got 0"):
        InputStatistics(IN, targets=0)
