"""`quantize` against a sweep with explicit inverses, and what holds of every grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import sparsam
from cases import DTYPES
from layer_cases import Matrix, moments, weights
from messages import FORM
from sparsam import NM, Block, Mask, SparseMatrix, obs, quantize, select
from sparsam.reconstruction import Quantization, reconstruction_error
from sparsam.sparse import int8

LARGEST_CODES = {8: 64, 4: 7}
DIGITS = {"float64": 24, "float32": 24, "float16": 11, "bfloat16": 8}
F32 = np.float32


def columns_of(scales: NDArray[Any], group: int | None, inputs: int) -> Matrix:
    """The scale of each weight."""
    wide = scales[:, None] if group is None else scales
    return np.repeat(wide, group or max(inputs, 1), axis=1)[:, :inputs].astype(np.float64)


def up_to_digits(x: float, digits: int) -> float:
    """The next number of so many binary digits."""
    step = 2.0 ** (np.floor(np.log2(x)) + 1 - digits)
    return float(np.ceil(x / step) * step)


def rounding_surgery(w: Matrix, h: Matrix, keep: NDArray[np.bool_], steps: Matrix, most: int) -> Matrix:
    """Rounds and prunes from left to right, with the inverse of H of the remaining columns each time."""
    w, inputs = w.copy(), w.shape[1]
    h = h + 0.01 * np.diag(h).mean() * np.eye(inputs)
    for j in range(inputs):
        inverse = np.linalg.inv(h[j:, j:])
        codes = np.where(keep[:, j], np.clip(np.rint(w[:, j] / steps[:, j]), -most, most), 0)
        error = (w[:, j] - codes * steps[:, j]) / inverse[0, 0]
        w[:, j:] -= np.outer(error, inverse[0])
        w[:, j] = codes * steps[:, j]
    return w


def expected_scales(w: Matrix, keep: NDArray[np.bool_], bits: int, group: int, costs: Matrix) -> Matrix:
    """One row, one group, one share of the largest weight after the other."""
    most = LARGEST_CODES[bits]
    found = np.ones((len(w), -(-w.shape[1] // group)))
    for row, g in np.ndindex(*found.shape):
        part = slice(g * group, (g + 1) * group)
        kept = np.where(keep[row, part], w[row, part], 0)
        if not kept.any():
            continue
        best = np.inf
        for share in (1.0,) if bits == 8 else (1.0, 0.95, 0.9, 0.85, 0.8):
            step = up_to_digits(np.abs(kept).max() * share / most, {8: 18, 4: 8}[bits])
            codes = np.clip(np.rint(kept / step), -most, most)
            error = ((kept - codes * step) ** 2 * costs[part]).sum()
            if error < best:
                best, found[row, g] = error, step
    return found


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (4, 32), (8, 64)])
@pytest.mark.parametrize(
    "how", [{"sparsity": 0.6}, {"sparsity": 0.0}, {"pattern": NM(2, 4)}, {"sparsity": 0.5, "scope": "row"}]
)
def test_equals_surgery_with_explicit_inverses(
    isa: str, bits: int, group: int | None, how: dict[str, Any]
) -> None:
    _, h = moments(72, 300)
    w = weights(19, 72)
    found, fitted = quantize(w, h, bits=bits, group=group, block=20, **how), obs(w, h, block=20, **how)
    keep = fitted.mask.to_array()
    damped = h + 0.01 * np.diag(h).mean() * np.eye(72)
    costs = np.array([1 / np.linalg.inv(damped[j:, j:])[0, 0] for j in range(72)])
    wanted = expected_scales(fitted.weights, keep, bits, group or 72, costs)
    assert np.array_equal(found.scales.reshape(wanted.shape), wanted)
    steps = columns_of(found.scales, group, 72)
    exact = rounding_surgery(w, h, keep, steps, LARGEST_CODES[bits])
    assert np.array_equal(found.weights, exact)
    assert np.array_equal(found.codes, np.rint(exact / steps))
    assert np.array_equal(found.mask.to_array(), found.codes != 0)
    assert not (found.mask.to_array() & ~keep).any()
    assert found.damping == fitted.damping


def test_a_mask_that_is_given(isa: str) -> None:
    _, h = moments(70, 300)
    w = weights(33, 70)
    mask = select(w, 0.5, Block(3, 5))
    found = quantize(w, h, mask, block=32)
    exact = rounding_surgery(w, h, mask.to_array(), columns_of(found.scales, None, 70), 64)
    assert np.array_equal(found.weights, exact)
    w32 = w.astype(F32)
    single = quantize(w32, h.astype(F32), mask)
    assert single.weights.dtype == F32
    # A rounding to another side in float32 shifts what follows, but the layer stays as good.
    errors = [reconstruction_error(w, one.weights, h) for one in (found, single)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
@pytest.mark.parametrize("size", [1.0, 1e-4, 300.0])
def test_products_are_exact_in_every_dtype(dtype: Any, bits: int, group: int | None, size: float) -> None:
    _, h = moments(50, 200)
    w = (weights(20, 50) * size).astype(dtype)
    found = quantize(w, h, sparsity=0.5, bits=bits, group=group)
    assert found.weights.dtype == w.dtype
    assert found.scales.dtype == F32
    steps = columns_of(found.scales, group, 50)
    assert np.array_equal(found.weights.astype(np.float64), found.codes * steps)
    assert np.array_equal(found.weights != 0, found.mask.to_array())
    mantissas = np.frexp(found.scales.astype(np.float64))[0] * 2.0 ** (
        DIGITS[np.dtype(dtype).name] - {8: 6, 4: 3}[bits]
    )
    assert np.array_equal(mantissas, np.rint(mantissas))


def test_subnormal_weights_of_float16_stay_on_the_grid() -> None:
    _, h = moments(16, 60)
    w = (weights(8, 16) * 2e-6).astype(np.float16)
    found = quantize(w, h, sparsity=0.5)
    assert np.array_equal(found.weights.astype(np.float64), found.codes * found.scales[:, None].astype(float))
    assert (found.scales >= 2.0**-24).all()


@pytest.mark.parametrize("dtype", [F32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.97, 1.0])
def test_packing_rounds_nothing(isa: str, dtype: Any, sparsity: float) -> None:
    """The codes are what multiplies, whether the scales are given or read off the weights."""
    _, h = moments(130, 400)
    w = weights(37, 130).astype(dtype)
    found = quantize(w, h, sparsity=sparsity)
    x = np.random.default_rng(0).standard_normal((5, 130)).astype(F32)
    for matrix in (
        SparseMatrix.from_dense(found.weights, dtype="int8"),
        SparseMatrix.from_dense(found.weights, dtype="int8", scales=found.scales),
    ):
        assert np.array_equal(matrix.to_dense(), found.weights.astype(F32))
        packed = matrix._state.forms.readable()
        codes = np.zeros(w.shape, np.int8)
        codes[found.mask.to_array()] = packed.values()
        assert np.array_equal(codes * packed.scales()[:, None], found.codes * found.scales[:, None])
        largest = np.abs(x).max(axis=1)
        sums = np.rint(x * (F32(127) / largest)[:, None]).astype(np.int64) @ codes.T.astype(np.int64)
        y = sums.astype(F32) * (packed.scales()[None, :] * (largest / F32(127))[:, None])
        assert np.array_equal(matrix.linear(x), y)
    given = SparseMatrix.from_dense(found.weights, dtype="int8", scales=found.scales)._state.forms.readable()
    assert np.array_equal(given.scales(), found.scales)
    assert np.array_equal(given.values(), found.codes[found.mask.to_array()])


def test_equal_bits_for_any_number_of_threads(isa: str) -> None:
    _, h = moments(140, 200)
    w = weights(200, 140).astype(F32)
    runs = []
    for threads in (1, 2, 5):
        sparsam.set_num_threads(threads)
        runs += [quantize(w, h, sparsity=0.7), quantize(w, h, sparsity=0.5, bits=4, group=64)]
    sparsam.set_num_threads(None)
    for run, first in zip(runs[2:], runs[:2] * 2, strict=True):
        assert np.array_equal(run.weights, first.weights)
        assert np.array_equal(run.codes, first.codes)
        assert np.array_equal(run.scales, first.scales)


def test_the_sweep_is_better_than_rounding_afterwards() -> None:
    """Of random layers with correlated inputs; no rule for each and every one."""
    _, h = moments(96, 400)
    w = weights(128, 96)
    for bits, group in ((8, None), (4, 32)):
        for sparsity in (0.0, 0.5):
            fitted = obs(w, h, sparsity=sparsity)
            found = quantize(w, h, sparsity=sparsity, bits=bits, group=group)
            steps = columns_of(found.scales, group, 96)
            most = LARGEST_CODES[bits]
            after = np.clip(np.rint(fitted.weights / steps), -most, most) * steps
            assert reconstruction_error(w, found.weights, h) < reconstruction_error(w, after, h)


def test_dead_inputs_are_rounded_to_nearest() -> None:
    x, _ = moments(12, 50)
    x[:, ::3] = 0
    w = weights(7, 12)
    found = quantize(w, x.T @ x, sparsity=0.1)
    dead = found.weights[:, ::3]
    kept = obs(w, x.T @ x, sparsity=0.1).mask.to_array()[:, ::3]
    nearest = np.rint(w[:, ::3] / found.scales[:, None]) * found.scales[:, None]
    assert np.array_equal(dead, np.where(kept, nearest, 0))
    assert kept.any()
    assert not kept.all()
    every = quantize(w, np.zeros((12, 12)), sparsity=0.0)
    assert (np.abs(every.weights - w) <= every.scales[:, None] / 2 * (1 + 1e-6)).all()


def test_shapes_of_several_axes_and_none(isa: str) -> None:
    _, h = moments(18, 60)
    w = weights(5, 18).reshape(5, 2, 3, 3)
    found = quantize(w, h, sparsity=0.5, bits=4, group=32, bias=np.ones(5), mean=np.ones(18))
    assert found.weights.shape == found.codes.shape == found.mask.shape == w.shape
    assert found.scales.shape == (5, 1)
    assert found.bias is not None
    np.testing.assert_allclose(found.bias, 1 + (w - found.weights).reshape(5, 18).sum(axis=1))
    flat = quantize(w.reshape(5, 18), h, sparsity=0.5, bits=4, group=32)
    assert np.array_equal(flat.codes.reshape(w.shape), found.codes)
    for shape in ((0, 18), (4, 0)):
        empty = quantize(np.zeros(shape), h[: shape[1], : shape[1]], sparsity=0.5)
        assert empty.codes.shape == shape
        assert empty.scales.shape == shape[:1]
    groups = quantize(np.zeros((4, 0)), np.zeros((0, 0)), sparsity=0.5, group=32)
    assert groups.scales.shape == (4, 0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 70),
    bits=st.sampled_from([8, 4]),
    group=st.sampled_from([None, 32, 64]),
    sparsity=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 1000),
    special=st.sampled_from(["", "zeros", "outlier", "equal", "single", "rank one"]),
)
def test_what_holds_of_every_result(
    rows: int, cols: int, bits: int, group: int | None, sparsity: float, seed: int, special: str
) -> None:
    x, h = moments(cols, 3 * cols, seed)
    w = weights(rows, cols, seed).astype(F32)
    if special == "zeros":
        w[:] = 0
    elif special == "outlier":
        w[0, 0] = 1e6
    elif special == "equal":
        w[:] = -0.7
    elif special == "single":
        h = h.astype(F32).astype(np.float64) * 1e-12
    elif special == "rank one":
        h = np.outer(x[0], x[0])
    before, fitted = w.copy(), obs(w, h, sparsity=sparsity)
    found = quantize(w, h, sparsity=sparsity, bits=bits, group=group)
    assert np.array_equal(w, before)
    assert (np.abs(found.codes) <= LARGEST_CODES[bits]).all()
    assert (found.scales >= np.finfo(F32).tiny).all()
    assert np.array_equal(found.weights, found.codes * columns_of(found.scales, group, cols))
    keep = found.mask.to_array()
    assert np.array_equal(keep, found.codes != 0)
    assert not (keep & ~fitted.mask.to_array()).any()
    if bits == 8:
        packed = SparseMatrix.from_dense(found.weights, dtype="int8") if group is None else None
        assert packed is None or np.array_equal(packed.to_dense(), found.weights)
        # A row whose scales are found again is on its grid, and so stays as it is: all errors are 0.
        again = quantize(found.weights, h, found.mask, group=group)
        same = (columns_of(again.scales, group, cols) == columns_of(found.scales, group, cols)).all(axis=1)
        assert np.array_equal(again.weights[same], found.weights[same])
        full = (np.abs(found.codes) == LARGEST_CODES[8]).any(axis=1)
        assert same[full].all() or group is not None


def test_the_kernel_takes_the_same_integers() -> None:
    assert LARGEST_CODES[8] == int8.LARGEST_CODE
    assert sparsam.reconstruction.quantize is sparsam.quantize
    assert issubclass(Quantization, sparsam.reconstruction.Reconstruction)


W, H = weights(3, 4), np.eye(4)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (
            ValueError,
            "bits for tensor 'fc': expected 8 or 4; got 3",
            lambda: quantize(W, H, bits=3, name="fc"),
        ),
        (ValueError, "bits for .* got True", lambda: quantize(W, H, sparsity=0.5, bits=True)),
        (ValueError, "bits for .* got 8.0", lambda: quantize(W, H, sparsity=0.5, bits=8.0)),  # type: ignore[arg-type]
        (ValueError, "group for .* None, 32, 64 or 128", lambda: quantize(W, H, sparsity=0.5, group=16)),
        (ValueError, "got neither", lambda: quantize(W, H)),
        (ValueError, "it says what is kept", lambda: quantize(W, H, Mask.ones((3, 4)), sparsity=0.5)),
        (TypeError, "expected a Mask", lambda: quantize(W, H, W > 0)),  # type: ignore[arg-type]
        (ValueError, "1 to 256", lambda: quantize(W, H, sparsity=0.5, block=257)),
        (TypeError, "got int64", lambda: quantize(np.ones((3, 4), np.int64), H, sparsity=0.5)),
        (ValueError, r"'weights': .* got nan at index \(0, 0\)", lambda: quantize(W * np.nan, H, sparsity=0)),
        (ValueError, "the mean of the inputs", lambda: quantize(W, H, sparsity=0.5, bias=np.zeros(3))),
        (
            ValueError,
            "the range of float32, .* got 1e.60",
            lambda: quantize(np.full((1, 4), 1e60), H, sparsity=0),
        ),
        (
            ValueError,
            "within the range of float16",
            lambda: quantize(np.full((1, 4), 65504, np.float16), H, sparsity=0),
        ),
    ],
)
def test_errors_say_what_to_do(error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=match) as caught:
        call()
    assert FORM.fullmatch(str(caught.value)), caught.value
