from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import reference
import sparsam
from cases import CASES, DTYPES, SIZES, layouts, make
from sparsam import NM, Block, Slices, Unstructured, select, select_many, threshold

SPARSITIES = (0.0, 0.001, 0.3, 0.5, 0.9, 0.99, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_threshold_and_mask_are_exact(isa: str, case: str, dtype: str) -> None:
    for n in SIZES:
        x = make(case, n, dtype)
        before = x.tobytes()
        for sparsity in SPARSITIES if n < 10_000 else (0.5, 0.99):
            assert threshold(x, sparsity) == reference.threshold([x], sparsity), (n, sparsity)
            mask = select(x, sparsity)
            assert np.array_equal(mask.to_array(), reference.select([x], sparsity)[0]), (n, sparsity)
            assert mask.count == n - round(sparsity * n)
        assert x.tobytes() == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["normal", "two values", "sorted", "small integers"])
def test_large_arrays_are_exact_for_every_thread_count(isa: str, threads: int, case: str, dtype: str) -> None:
    x = make(case, 600_011, dtype)
    for sparsity in (0.5, 0.97):
        assert threshold(x, sparsity) == reference.threshold([x], sparsity)
        out = np.empty_like(x)
        mask = select_many({"w": x}, sparsity, out={"w": out})["w"]
        keep = reference.select([x], sparsity)[0]
        assert np.array_equal(mask.to_array(), keep)
        assert np.array_equal(out, np.where(keep, x, x.dtype.type(0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 9), (64, 65), (700, 800)])
def test_layout_does_not_matter(isa: str, shape: tuple[int, int], dtype: str) -> None:
    x = make("small integers", shape[0] * shape[1], dtype).reshape(shape)
    expected, at = select(x, 0.6), threshold(x, 0.6)
    for name, view in layouts(x).items():
        assert np.array_equal(view, x), name
        assert select(view, 0.6) == expected, name
        assert threshold(view, 0.6) == at, name
        out = np.zeros_like(view)
        select_many({"w": view}, 0.6, out={"w": out})
        assert np.array_equal(out, expected.apply(x)), name
        for pattern in (Block(3, 4), Slices(1, 1), NM(1, shape[1])) if shape[1] < 256 else (Block(3, 4),):
            sparsity = pattern.sparsity if isinstance(pattern, NM) else 0.6
            assert select(view, sparsity, pattern) == select(x, sparsity, pattern), name


def test_broadcast_and_zero_size_dimensions() -> None:
    x = np.broadcast_to(np.array([1, 2, 3], np.float32), (4, 3))
    assert threshold(x, 0.5) == (2.0, 6, 4, 4)
    assert select(x, 0.5).to_array().tolist() == [[False, True, True]] * 2 + [[False, False, True]] * 2
    assert select(np.zeros((0, 5), np.float32), 0.5).shape == (0, 5)
    assert select(np.float64(3.0), 1.0).count == 0


@pytest.mark.parametrize(
    "dtypes", [("float32",) * 3, ("bfloat16", "float32", "float16"), ("float64", "bfloat16", "float32")]
)
@pytest.mark.parametrize("case", ["normal", "small integers", "99 % zeros"])
def test_one_pool_over_many_tensors(isa: str, threads: int, case: str, dtypes: tuple[str, ...]) -> None:
    sizes = [1, 0, 37, 4096, 3, 70_000, 513, 300_000]
    arrays = [make(case, n, dtypes[i % 3], seed=i) for i, n in enumerate(sizes)]
    weights = {str(i): a for i, a in enumerate(arrays)}
    for sparsity in (0.0, 0.4, 0.95, 1.0):
        assert threshold(arrays, sparsity) == reference.threshold(arrays, sparsity)
        out = {name: np.empty_like(a) for name, a in weights.items()}
        masks = select_many(weights, sparsity, out=out)
        for (name, mask), keep in zip(masks.items(), reference.select(arrays, sparsity), strict=True):
            assert np.array_equal(mask.to_array(), keep)
            assert np.array_equal(out[name], np.where(keep, weights[name], weights[name].dtype.type(0)))


def test_ties_go_to_the_earlier_tensor() -> None:
    ones = np.ones(4, np.float32)
    masks = select_many({"b": ones, "a": ones}, 0.5)
    assert masks["b"].count == 4
    assert masks["a"].count == 0


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        np.float32, hnp.array_shapes(max_dims=3, max_side=12), elements=st.floats(width=32, allow_nan=False)
    ),
    st.floats(0, 1),
)
def test_any_floats(x: NDArray[np.float32], sparsity: float) -> None:
    mask = select(x, sparsity)
    assert mask.count == x.size - round(sparsity * x.size)
    assert np.array_equal(mask.to_array(), reference.select([x], sparsity)[0])
    assert threshold(x, sparsity) == reference.threshold([x], sparsity)


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.uint16, st.integers(1, 3000)),
    st.floats(0, 1),
    st.sampled_from([np.float16, ml_dtypes.bfloat16]),
)
def test_any_half_bit_patterns(bits: NDArray[np.uint16], sparsity: float, dtype: Any) -> None:
    x = bits.view(dtype)
    with np.errstate(invalid="ignore"):  # ml_dtypes signals on a signalling NaN
        x = np.where(np.isnan(x), np.zeros(1, dtype), x)
    assert threshold(x, sparsity) == reference.threshold([x], sparsity)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(2, 2), Slices(0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_refused_with_its_place(isa: str, pattern: Any, dtype: str) -> None:
    for shape, at in (((4, 8), (2, 3)), ((1000, 800), (999, 799)), ((1000, 800), (0, 0))):
        x = make("normal", shape[0] * shape[1], dtype).reshape(shape)
        x[at] = np.nan
        x[-1, -1] = -np.nan
        for sparsity in (0.0, 0.5):
            with pytest.raises(
                ValueError,
                match=rf"tensor 'fc': expected numbers to rank; got NaN at index \({at[0]}, {at[1]}\)",
            ):
                select_many({"ok": np.ones(shape, np.float32), "fc": x}, sparsity, pattern)


def test_errors_say_what_to_do() -> None:
    x = np.ones((4, 6), np.float32)
    with pytest.raises(
        ValueError, match=r"tensor 'fc': pattern 2:4: expected a multiple of 4 .*; got 6 in shape \(4, 6\)"
    ):
        select_many({"fc": x}, 0.5, NM(2, 4))
    with pytest.raises(ValueError, match=r"tensor 'fc': expected an axis of a multiple of 4"):
        select_many({"fc": x}, 0.5, Slices(1, 4))
    with pytest.raises(ValueError, match=r"expected an axis for .*choose one that it has"):
        select(x, 0.5, Slices(2))
    with pytest.raises(ValueError, match=r"expected 0\.5 .or 0., as .* keeps 2 of every 4"):
        select(np.ones((4, 8), np.float32), 0.7, NM(2, 4))
    nonsense: list[Any] = [-0.1, 1.1, float("nan"), "0.5", None]
    for sparsity in nonsense:
        with pytest.raises(ValueError, match="sparsity: expected a number from 0"):
            select(x, sparsity)
        with pytest.raises(ValueError, match="sparsity: expected a number from 0"):
            threshold(x, sparsity)
    for bad in (np.ones(3, np.int32), np.ones(3, np.complex64), np.ones(3, ">f4")):
        with pytest.raises(TypeError, match="expected float16, bfloat16, float32 or float64"):
            select_many({"fc": bad}, 0.5)
        with pytest.raises(TypeError, match="expected float16, bfloat16, float32 or float64"):
            threshold(bad, 0.5)
    with pytest.raises(TypeError, match="expected Unstructured"):
        select(x, 0.5, "2:4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm: expected 1"):
        select(x, 0.5, norm=3)


def test_out_is_checked() -> None:
    x = np.arange(8, dtype=np.float32)
    frozen = np.zeros(8, np.float32)
    frozen.flags.writeable = False
    for out, message in (
        (np.zeros(7, np.float32), "expected float32"),
        (np.zeros(8, np.float64), "expected float32"),
        (frozen, "read-only"),
        (x[::-1], "got overlapping memory"),
    ):
        with pytest.raises(ValueError, match=message):
            select_many({"w": x}, 0.5, out={"w": out})
    for wrong in ({}, {"w": [0.0] * 8}):
        with pytest.raises(TypeError, match=r"out for tensor 'w': expected an array of float32 \(8,\)"):
            select_many({"w": x}, 0.5, out=wrong)  # type: ignore[arg-type]


def test_lists_are_scores_too() -> None:
    mask = select_many({"a": [1.0, -3.0], "b": [[2.0]]}, 1 / 3)["a"]
    assert mask.to_array().tolist() == [False, True]
    with pytest.raises(TypeError, match=r"tensor 'a': expected float16, .*; got int64"):
        select_many({"a": [1, 2]}, 0.5)


def test_outputs_share_no_memory_with_other_tensors() -> None:
    x, y = np.arange(16.0), np.arange(8.0)
    apart = {"a": x[::2], "b": x[1::2]}
    refused = [
        ({"a": x, "b": x}, {"a": x, "b": x}),
        ({"a": x[:8], "b": x[4:12]}, {"a": x[:8], "b": x[4:12]}),
        ({"a": y, "b": x[:8]}, {"a": x[:8], "b": x[8:]}),
        ({"a": y, "b": y}, {"a": x[:8], "b": x[7:15]}),
    ]
    for scores, out in refused:
        with pytest.raises(ValueError, match=r"tensors '[ab]' and '[ab]': expected separate memory"):
            select_many(scores, 0.5, out=out)
    assert x.tolist() == np.arange(16.0).tolist()
    assert select_many({"a": y, "b": y}, 0.5)["a"].count == 4
    select_many({"a": y, "b": y}, 0.5, out={"a": x[:8], "b": x[8:]})
    assert x.tolist() == [0, 0, 0, 0, 4, 5, 6, 7] * 2
    select_many(apart, 0.75, out=apart)
    assert np.count_nonzero(x) == 4


def test_in_place(isa: str, threads: int) -> None:
    for pattern, sparsity in (
        (Unstructured(), 0.8),
        (NM(1, 4), 0.75),
        (Block(4, 4), 0.5),
        (Unstructured(), 0.0),
    ):
        x = make("small integers", 400 * 1000, "float32").reshape(400, 1000)
        expected = select(x, sparsity, pattern).apply(x)
        select_many({"w": x}, sparsity, pattern, out={"w": x})
        assert np.array_equal(x, expected)
        assert not np.signbit(x[x == 0]).any() or sparsity == 0


SCRATCH = """
import resource, sys, ml_dtypes, numpy as np, sparsam
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
rng = np.random.default_rng(0)
x = {arrays}
sparsam.threshold([np.ones(1_000_000, np.float32)], 0.5)  # the thread pool
before = peak()
for s in (0.5, 0.9):
    sparsam.threshold(x, s)
used, size = peak() - before, sum(a.nbytes for a in x)
assert used <= 0.05 * size + 300_000, (used, used / size)
"""


@pytest.mark.parametrize(
    "arrays",
    [
        "[rng.standard_normal(20_000_000, dtype=np.float32)]",
        "[rng.standard_normal(20_000_000, dtype=np.float32)[::-2]]",
        "[rng.standard_normal((4000, 5000), dtype=np.float32).T]",
        "[rng.standard_normal((10_000, 2000), dtype=np.float32)[:, :1999]]",
        "[rng.standard_normal(6_000_000)]",
        "[rng.standard_normal(20_000_000, dtype=np.float32).astype(np.float16), rng.standard_normal(9)]",
        "[rng.standard_normal(20_000_000, dtype=np.float32).astype(ml_dtypes.bfloat16)]",
        "[np.round(rng.standard_normal(20_000_000, dtype=np.float32), 2)]",
        "[a for a in rng.standard_normal((300, 40_000), dtype=np.float32)]",
    ],
)
def test_scratch_is_at_most_5_percent(arrays: str) -> None:
    """Beyond what the pages and the allocator round up to."""
    subprocess.run([sys.executable, "-c", SCRATCH.replace("{arrays}", arrays)], check=True)


def test_changing_the_thread_count_during_a_call_is_safe() -> None:
    x = np.asfortranarray(make("normal", 700 * 1000, "float32").reshape(700, 1000))
    expected = select(x, 0.5)
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            sparsam.set_num_threads(64)
            sparsam.set_num_threads(1)

    other = threading.Thread(target=flip)
    other.start()
    try:
        assert all(select(x, 0.5) == expected for _ in range(50))
    finally:
        stop.set()
        other.join()
        sparsam.set_num_threads(None)
