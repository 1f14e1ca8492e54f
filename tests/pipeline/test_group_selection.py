from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import reference
import sparsam
from cases import CASES, DTYPES, layouts, make
from sparsam import NM, Block, Slices, select, select_many


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 7), NM(0 + 1, 2), NM(5, 16), NM(10, 60), NM(4, 4)]
)
def test_nm(isa: str, threads: int, pattern: NM, dtype: str) -> None:
    for case in ("normal", "small integers", "constant"):
        for rows in (1, 5, 333):
            x = make(case, rows * pattern.m * 6, dtype).reshape(rows, -1)
            mask = select(x, pattern.sparsity, pattern)
            assert np.array_equal(mask.to_array(), reference.select_nm(x, pattern)), (case, rows)


def test_nm_of_a_large_tensor_and_of_a_convolution(isa: str, threads: int) -> None:
    x = make("normal", 512 * 1024, "float32").reshape(512, 1024)
    out = np.empty_like(x)
    mask = select_many({"w": x}, 0.5, NM(2, 4), out={"w": out})["w"]
    keep = reference.select_nm(x, NM(2, 4))
    assert np.array_equal(mask.to_array(), keep)
    assert np.array_equal(out, np.where(keep, x, x.dtype.type(0)))
    conv = x[:, :36].reshape(512, 4, 3, 3)
    assert np.array_equal(select(conv, 0.5, NM(2, 4)).to_array().reshape(512, 36), keep_rows(x[:, :36]))


def keep_rows(x: NDArray[Any]) -> NDArray[np.bool_]:
    return reference.select_nm(np.ascontiguousarray(x), NM(2, 4))


ROWS = [(1, 9), (3, 1), (5, 63), (7, 64), (9, 65), (130, 33), (4, 511), (3, 513), (70, 1000), (3, 4097)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_rows_are_exact(isa: str, case: str, dtype: str) -> None:
    for shape in ROWS:
        x = make(case, shape[0] * shape[1], dtype).reshape(shape)
        before = x.tobytes()
        for sparsity in (0.0, 0.001, 0.3, 0.5, 0.99, 1.0) if x.size < 10_000 else (0.5, 0.9):
            mask = select(x, sparsity, scope="row")
            assert np.array_equal(mask.to_array(), reference.select_rows(x, sparsity)), (shape, sparsity)
            assert mask.bits.tobytes() == np.packbits(mask.to_array(), bitorder="little").tobytes()
        assert x.tobytes() == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_exact_for_every_thread_count_and_layout(isa: str, threads: int, dtype: str) -> None:
    for shape in ((900, 400), (300, 1037), (2, 300_001)):
        x = make("small integers" if dtype == "float64" else "normal", shape[0] * shape[1], dtype)
        x = x.reshape(shape)
        expected = reference.select_rows(x, 0.6)
        assert np.array_equal(select(x, 0.6, scope="row").to_array(), expected)
        if shape[1] < 1000:
            for name, view in layouts(x).items():
                assert np.array_equal(select(view, 0.6, scope="row").to_array(), expected), name


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(max_dims=3, max_side=12, min_side=0),
        elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, np.inf]),
    ),
    st.floats(0, 1),
)
def test_rows_of_any_shape(x: NDArray[np.float32], sparsity: float) -> None:
    assert np.array_equal(select(x, sparsity, scope="row").to_array(), reference.select_rows(x, sparsity))


def test_rows_of_many_tensors() -> None:
    x = make("normal", 60, "float32").reshape(5, 12)
    conv = make("normal", 288, "float64").reshape(8, 4, 3, 3)
    weights = {"a": x, "conv": conv, "vector": x[0]}
    before = {name: array.copy() for name, array in weights.items()}
    out = {name: np.empty_like(array) for name, array in weights.items()}
    masks = select_many(weights, 0.7, scope="row", out=out)
    for name, array in weights.items():
        keep = reference.select_rows(array, 0.7)
        assert np.array_equal(masks[name].to_array(), keep)
        assert np.array_equal(out[name], np.where(keep, array, array.dtype.type(0)))
        assert np.array_equal(array, before[name])
    select_many({"a": x}, 0.7, scope="row", out={"a": x})
    assert np.array_equal(x, out["a"])
    nm = select(conv.reshape(8, 36), 0.5, NM(2, 4))
    assert select(conv.reshape(8, 36), 0.5, NM(2, 4), scope="row") == nm


def test_rows_refuse_what_they_cannot_do() -> None:
    x = np.ones((4, 6), np.float32)
    for pattern in (Block(1, 2), Slices(1)):
        with pytest.raises(ValueError, match=r"expected Unstructured\(\) or NM with scope 'row', .*; got"):
            select(x, 0.5, pattern, scope="row")
    with pytest.raises(ValueError, match=r"scope: expected 'layer' .* or 'row' .*; got 'global'"):
        select(x, 0.5, scope="global")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scope: expected 'layer', 'row' or 'global'; got 'model'"):
        select_many({"x": x}, 0.5, scope="model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sparsity: expected a number from 0"):
        select(x, 1.5, scope="row")


def test_a_nan_in_a_row_leaves_the_weights_as_they_were(isa: str, threads: int) -> None:
    x = make("normal", 900 * 400, "float32").reshape(900, 400)
    x[899, 399] = np.nan
    before = x.tobytes()
    for sparsity in (0.0, 0.5):
        with pytest.raises(
            ValueError, match=r"tensor 'w': expected numbers to rank; got NaN at index \(899, 399\)"
        ):
            select_many({"w": x}, sparsity, scope="row", out={"w": x})
    assert x.tobytes() == before


TILES = [
    Block(4, 1),
    Block(1, 16),
    Block(3, 5),
    Block(100, 100),
    Block(1, 1),
    Slices(0),
    Slices(1),
    Slices(-1, 3),
    Slices(0, 2),
]


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("pattern", TILES, ids=str)
def test_groups(isa: str, threads: int, pattern: Block | Slices, norm: int) -> None:
    for shape in ((10, 12), (66, 129), (900, 600)):
        if isinstance(pattern, Slices) and shape[pattern.axis] % pattern.size:
            continue
        x = make("small integers", shape[0] * shape[1], "float32").reshape(
            shape
        )  # sums of integers are exact
        scores = reference.group_scores(x, pattern, norm)
        keep = reference.prune_lowest(scores, round(0.7 * scores.size))
        mask = select(x, 0.7, pattern, norm=norm)
        assert np.array_equal(mask.to_array(), keep[reference.labels(x, pattern)]), shape


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_slices_of_any_axis(isa: str, axis: int) -> None:
    x = make("normal", 8 * 6 * 4 * 10, "float64").reshape(8, 6, 4, 10)
    scores = reference.group_scores(x, Slices(axis, 2), 1)
    keep = reference.prune_lowest(scores, round(0.5 * scores.size))
    assert np.array_equal(
        select(x, 0.5, Slices(axis, 2)).to_array(), keep[reference.labels(x, Slices(axis, 2))]
    )


def test_group_scores_are_the_same_for_every_isa_thread_count_and_layout() -> None:
    x = make("normal", 700 * 5000, "float32").reshape(700, 5000)
    masks = []
    for name in sparsam.available_isas():
        for n in (1, 3):
            with sparsam.use_isa(name):
                sparsam.set_num_threads(n)
                masks += [
                    select(v, 0.5, p) for p in (Slices(0), Block(8, 8)) for v in (x, np.asfortranarray(x))
                ]
    sparsam.set_num_threads(None)
    assert all(mask in (masks[0], masks[2]) for mask in masks)


def test_pooled_groups_compare_by_weight() -> None:
    few, many = np.full((2, 2), 3.0, np.float32), np.full((2, 100), 1.0, np.float32)
    masks = select_many({"many": many, "few": few}, 0.5, Slices(0))
    assert masks["few"].count == 4
    assert masks["many"].count == 0


@pytest.mark.parametrize(
    "pattern", [Block(10**30, 1), Block(1, 2**70), Block(2**70, 1), Block(2**70, 2**70), Slices(0, 64)]
)
def test_groups_larger_than_the_tensor(pattern: Block | Slices) -> None:
    x = make("normal", 64 * 64, "float32").reshape(64, 64)
    scores = reference.group_scores(x, pattern, 1)
    keep = reference.prune_lowest(scores, round(0.5 * scores.size))
    assert np.array_equal(select(x, 0.5, pattern).to_array(), keep[reference.labels(x, pattern)])
