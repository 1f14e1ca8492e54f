"""int4 values: levels, exact sums on every instruction set, grids found again, files, what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import sparsam
from matmul_cases import ORACLES, inputs, weights
from messages import FORM
from rounded_matmul import F32, grid_of
from rounded_matmul import int4_product as product
from sparsam import SparseMatrix, checkpoint
from sparsam._core import Packed
from sparsam.sparse.int4 import SYMMETRIC
from sparsam.sparse.stored import to_arrays

SHAPES = [(1, 1), (3, 7), (8, 16), (17, 100), (64, 64), (40, 200), (100, 300), (7, 0), (0, 7)]
NAMES: tuple[Any, ...] = (None, *ORACLES)
WIDEST = np.array([0, -64, *range(-6, 0), *range(1, 8), 64], np.int8)


def of_levels(
    q: NDArray[np.int8], scales: NDArray[np.float32], width: int, levels: NDArray[np.int8]
) -> SparseMatrix:
    packed = Packed.pack_int4(q, width, scales, levels)
    packed.add("slots")
    packed.keep(["slots"])
    return SparseMatrix(packed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("group", [64, 128])
def test_products_are_exact(isa: str, shape: tuple[int, int], sparsity: float, group: int) -> None:
    w, bias = weights(*shape, sparsity), inputs(shape[0], seed=3)
    matrix = SparseMatrix.from_dense(w, dtype="int4", group=group)
    q, scales, width = grid_of(matrix)
    assert width == group
    assert matrix.nnz == np.count_nonzero(q)
    assert matrix.dtype == np.dtype(ml_dtypes.int4)
    for batch in (1, 2, 3, 4, 5, 6, 7, 8, 9, 20):
        x = inputs(batch, shape[1], seed=batch)
        assert np.array_equal(matrix.linear(x, bias), product(q, scales, width, x, bias)), batch
    exact = product(q, scales, width, x, bias)
    assert np.array_equal(matrix.linear(x, bias, "relu"), np.maximum(exact, 0))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_saturates(isa: str, sparsity: float, sign: int) -> None:
    """Bytes of 255 (and 1) times levels of 64, of one sign in every third row."""
    rng = np.random.default_rng(3)
    signs = np.where(np.arange(33)[:, None] % 3, rng.choice([-64, 64], (33, 1000)), 64)
    q = np.where(rng.random((33, 1000)) < sparsity, 0, signs).astype(np.int8)
    scales = np.full((33, 8), 0.5, F32)
    matrix = of_levels(q, scales, 128, WIDEST)
    for batch in (1, 8, 11):
        x = np.full((batch, 1000), 2.0 * sign, F32)
        assert np.array_equal(matrix.linear(x), product(q, scales, 128, x))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16), (4, 16), (1, 4), (12, 16), (2, 16), (1, 16)])
@pytest.mark.parametrize("columns", [256, 112, 80])
def test_patterns_have_steps_in_the_same_places(isa: str, n: int, m: int, columns: int) -> None:
    """The last group of columns may be shorter, and have an odd number of steps."""
    w = inputs(40, columns)
    w *= sparsam.select(w, 1 - n / m, sparsam.NM(n, m)).to_array()
    for group in (64, 128):
        matrix = SparseMatrix.from_dense(w, dtype="int4", group=group)
        q, scales, width = grid_of(matrix)
        for batch in (1, 5):
            x = inputs(batch, columns)
            assert np.array_equal(matrix.linear(x), product(q, scales, width, x))


@pytest.mark.parametrize(("n", "most"), [(8, 4.15), (4, 2.15)])
def test_bits_of_a_weight(n: int, most: float) -> None:
    """In slots, of n:16: a byte for each stored weight, a scale of 16 bits a group, and little else."""
    w = inputs(256, 4096)
    w *= sparsam.select(w, 1 - n / 16, sparsam.NM(n, 16)).to_array()
    matrix = SparseMatrix.from_dense(w, dtype="int4", group=128)
    matrix.prepare(1, kernel="slots")
    data = matrix._state.forms.packed
    assert data is not None
    assert data.forms == ("slots",)
    assert matrix.nbytes == len(data.buffer("slots"))
    assert 8 * matrix.nbytes <= most * w.size


def test_bits_of_a_weight_in_a_file(tmp_path: Path) -> None:
    w = weights(256, 4096, 0.5)
    SparseMatrix.from_dense(w, dtype="int4", group=128).save(tmp_path / "w.safetensors")
    assert 8 * (tmp_path / "w.safetensors").stat().st_size <= 3.14 * w.size


def test_every_machine_gives_the_same_bits(threads: int) -> None:
    """A form that was built under one instruction set is multiplied under all; activations included."""
    w, x, bias = weights(600, 500, 0.7), inputs(21, 500), inputs(600, seed=2)
    found = []
    for built in sparsam.available_isas():
        with sparsam.use_isa(built):
            matrix = SparseMatrix.from_dense(w, dtype="int4")
        for isa in sparsam.available_isas():
            with sparsam.use_isa(isa):
                found.append([matrix.linear(x, bias, name) for name in NAMES])
    for other in found[1:]:
        for y, expected in zip(other, found[0], strict=True):
            assert np.array_equal(y, expected)
    exact = product(*grid_of(matrix), x, bias)
    for name, y in zip(ORACLES, found[0][1:], strict=True):
        z = ORACLES[name](exact.astype(np.float64))
        assert np.abs(y - z).max() < 2e-6 * (1 + np.abs(exact).max()), name


def test_the_widest_sums(isa: str) -> None:
    """The largest levels, scales, columns and bytes that there are: nothing leaves float32 before x_scale."""
    q, scales = np.full((1, 65536), -64, np.int8), np.full((1, 512), 2.0**96, F32)
    x = np.full((2, 65536), 3e-5, F32)
    y = of_levels(q, scales, 128, WIDEST).linear(x)
    assert np.array_equal(y, product(q, scales, 128, x))
    assert np.isfinite(y).all()


@pytest.mark.parametrize("bits_group", [None, 64, 128])
@pytest.mark.parametrize("dtype", [F32, ml_dtypes.bfloat16, np.float16, np.float64])
def test_grids_of_quantize_are_found_again(bits_group: int | None, dtype: Any) -> None:
    """To the bit, without being told what the grid is."""
    w, x = inputs(24, 320), inputs(400, 320, seed=2)
    found = sparsam.quantize(w.astype(dtype), x.T @ x, sparsity=0.5, bits=4, group=bits_group)
    matrix = SparseMatrix.from_dense(found.weights, dtype="int4")
    assert np.array_equal(matrix.to_dense(), found.weights.astype(F32))
    packed = matrix._state.forms.readable()
    assert packed.width == (bits_group or 128)
    assert np.array_equal(packed.levels(), SYMMETRIC)
    assert matrix.nnz == np.count_nonzero(found.codes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F32, ml_dtypes.bfloat16])
def test_rounding_twice_changes_nothing(shape: tuple[int, int], dtype: Any) -> None:
    w = weights(*shape, 0.6, dtype=dtype)
    once = SparseMatrix.from_dense(w, dtype="int4").to_dense()
    assert np.array_equal(SparseMatrix.from_dense(once, dtype="int4").to_dense(), once)


def test_levels_are_the_best() -> None:
    """No integer in the place of a level, and no other nearest level, makes the squared error smaller."""
    w = weights(30, 256, 0.7)
    matrix = SparseMatrix.from_dense(w, dtype="int4")
    packed = matrix._state.forms.readable()
    relative = w / np.repeat(packed.scales(), 64, axis=1)
    share = np.repeat(packed.scales(), 64, axis=1).astype(np.float64) ** 2
    levels = packed.levels().astype(np.float64)

    def error(of: NDArray[np.float64]) -> float:
        return float((np.abs(relative[:, :, None] - of).min(axis=2) ** 2 * share).sum())

    least = float(((matrix.to_dense() - w).astype(np.float64) ** 2).sum())
    assert least <= error(levels) * (1 + 1e-6)
    for place in range(2, 15):
        for step in (-1, 1):
            other = levels.copy()
            other[place] += step
            assert error(other) >= least * (1 - 2e-3)  # places of weights are rounded to eighths of a level


def test_levels_lie_where_kept_weights_are() -> None:
    """Less error than levels of equal steps through 0 have, as QUANT's table says of normal weights."""
    w = inputs(128, 1024)
    w[np.abs(w) < np.quantile(np.abs(w), 0.5)] = 0
    error = ((SparseMatrix.from_dense(w, dtype="int4").to_dense() - w) ** 2).sum() / (w**2).sum()
    steps = np.repeat(np.abs(w).reshape(128, 16, 64).max(axis=2) / 7, 64, axis=1)
    assert error < 0.7 * ((np.rint(w / steps) * steps - w) ** 2).sum() / (w**2).sum()


def test_what_a_mask_keeps() -> None:
    w = np.array([[1, 1e-4, 0.5, 0], [0, 0, 0, 0]], F32)
    kept = SparseMatrix.from_mask(w, np.array([[False, True, True, True], [True] * 4]), dtype="int4")
    assert np.array_equal(kept.to_dense(), np.array([[0, 0, 0.5, 0], [0, 0, 0, 0]]))
    assert kept.nnz == 1  # 1e-4 is rounded to 0, and so is pruned
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 4\), as w has; got \(2, 3\); pass"):
        SparseMatrix.from_mask(w, np.ones((2, 3), bool), dtype="int4")


def test_what_can_be_asked_of_it() -> None:
    w = weights(40, 96, 0.75)
    matrix = SparseMatrix.from_dense(w, dtype="int4")
    assert repr(matrix).startswith("SparseMatrix(40x96, int4, ")
    assert str(matrix.explain(3)).endswith(f"{matrix.explain(3).kernel}, the form of int4 values")
    matrix.prepare([1, 64])
    matrix.prepare(1, kernel="slots")
    with pytest.raises(ValueError, match="kernel: expected one of bitmask, slots; got 'panels'; pass"):
        matrix.prepare(1, kernel="panels")
    assert np.array_equal(np.asarray(matrix), matrix.to_dense())
    assert np.array_equal(matrix.T.to_dense(), matrix.to_dense().T)
    assert matrix.T.dtype == np.float32
    assert np.array_equal(matrix @ inputs(96), matrix.linear(inputs(96)))


@pytest.mark.parametrize("shape", SHAPES)
def test_copies_are_equal(tmp_path: Path, shape: tuple[int, int]) -> None:
    for group in (64, 128):
        matrix = SparseMatrix.from_dense(weights(*shape, 0.6), dtype="int4", group=group)
        x = inputs(3, shape[1])
        matrix.save(tmp_path / "w.safetensors")
        for copy in (SparseMatrix.load(tmp_path / "w.safetensors"), pickle.loads(pickle.dumps(matrix))):
            assert copy.dtype == matrix.dtype
            assert np.array_equal(copy.to_dense(), matrix.to_dense())
            assert np.array_equal(copy.linear(x), matrix.linear(x))


GOLDEN = (
    b'{"__metadata__":{"sparsam":"SparseMatrix 1"},"shape":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
    b'"scales":{"dtype":"BF16","shape":[2,1],"data_offsets":[16,20]},'
    b'"levels":{"dtype":"I8","shape":[16],"data_offsets":[20,36]},'
    b'"bits":{"dtype":"U8","shape":[2,2],"data_offsets":[36,40]},'
    b'"values":{"dtype":"U8","shape":[2],"data_offsets":[40,42]}}'
)
GOLDEN_DATA = bytes.fromhex(
    "0200000000000000 0900000000000000"  # shape
    "803d 003e"  # scales: 1/16, 1/8
    "00 f9fafbfcfdfeff 0102030405060708"  # levels: 0, -7 to -1, 1 to 8
    "01 01 08 00"  # bits: columns 0 and 8; column 3
    "c1 0e"  # values: codes 1 and 12; 14
)


def test_golden_bytes(tmp_path: Path) -> None:
    w = np.zeros((2, 9), F32)
    w[0, 0], w[0, 8], w[1, 3] = -7 / 16, 5 / 16, 7 / 8
    file = tmp_path / "w.safetensors"
    SparseMatrix.from_dense(w, dtype="int4").save(file)
    header = GOLDEN + b" " * (-len(GOLDEN) % 8)
    assert file.read_bytes() == len(header).to_bytes(8, "little") + header + GOLDEN_DATA
    assert np.array_equal(SparseMatrix.load(file).to_dense(), w)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            {"scales": np.ones((2, 2), ml_dtypes.bfloat16)},
            "scales: expected bfloat16, one for each 64 or 128",
        ),
        ({"scales": np.ones((2, 1), F32)}, "scales: expected bfloat16, one for each 64 or 128"),
        ({"scales": np.ones(2, ml_dtypes.bfloat16)}, "scales: expected bfloat16, one for each 64 or 128"),
        (
            {"scales": np.array([[1], [0]], ml_dtypes.bfloat16)},
            "scales: expected positive, normal numbers up",
        ),
        (
            {"scales": np.array([[1], [1e30]], ml_dtypes.bfloat16)},
            "scales: expected positive, normal numbers",
        ),
        ({"scales": np.array([[1], [np.nan]], ml_dtypes.bfloat16)}, "scales: expected positive, normal num"),
        ({"values": np.array([0x10, 1], np.uint8)}, "values: expected levels but 0"),
        ({"values": np.array([0x11, 0x11], np.uint8)}, "values: expected 0 past the last value"),
        ({"values": np.ones(3, np.uint8)}, "values: expected 2 bytes.*; got 3"),
        ({"values": np.ones(2, np.int8)}, "values: expected a vector of uint8"),
        ({"levels": np.zeros(16, np.int8)}, "levels: expected 0, then 15 that rise"),
        ({"levels": SYMMETRIC[::-1].copy()}, "levels: expected 0, then 15 that rise"),
        ({"levels": np.array([*SYMMETRIC[:15], 65], np.int8)}, "levels: expected 0, then 15 that rise"),
        ({"levels": SYMMETRIC[:15]}, r"levels: expected int8 \(16,\)"),
        ({"levels": SYMMETRIC.astype(np.int16)}, r"levels: expected int8 \(16,\)"),
        ({"scales": None}, "tensors: expected shape, bits and values"),
    ],
)
def test_damaged_files(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    w = np.zeros((2, 9), F32)
    w[0, 0], w[0, 8], w[1, 3] = 1, -2, 3
    arrays = to_arrays(SparseMatrix.from_dense(w, dtype="int4")._state.forms.readable()) | change
    file = tmp_path / "w.safetensors"
    kept = {name: array for name, array in arrays.items() if array is not None}
    checkpoint.save(file, kept, {"sparsam": "SparseMatrix 1"})
    with pytest.raises(ValueError, match=what):
        SparseMatrix.load(file)


@pytest.mark.parametrize(("shape", "keep"), [((19, 100), 0), ((40, 300), 0), ((40, 144), 4), ((16, 256), 8)])
def test_a_damaged_form_is_refused_or_reads_within_bounds(
    isa: str, shape: tuple[int, int], keep: int
) -> None:
    """Whatever byte of a form is changed: it is refused, unless it makes another weight that is as good."""
    w = weights(*shape, 0.0 if keep else 0.7)
    if keep:
        w *= sparsam.select(w, 1 - keep / 16, sparsam.NM(keep, 16)).to_array()
    packed = SparseMatrix.from_dense(w, dtype="int4")._state.forms.packed
    assert packed is not None
    packed.add("slots")
    good = packed.buffer("slots")
    assert Packed.from_buffers([good]).nnz == packed.nnz
    rng = np.random.default_rng(0)
    refused = 0
    for at in (*range(128), *rng.integers(128, len(good), 400).tolist()):
        bad = good.copy()
        bad[at] ^= 1 << int(rng.integers(8))
        try:
            found = Packed.from_buffers([bad])
        except ValueError:
            refused += 1
            continue
        y = np.empty((2, found.rows), F32)
        found.linear("slots", inputs(2, found.cols), None, "", y)
    assert refused >= 120


def test_what_is_refused() -> None:
    some = np.ones((2, 3), F32)
    for w, group, what in (
        (
            np.array([[1, 2], [np.inf, 0]], F32),
            None,
            "w: expected weights up to 2.102 for int4; got inf in row 1",
        ),
        (
            np.array([[np.nan, 2]], F32),
            None,
            "w: expected weights up to 2.102 for int4; got nan in row 0; use",
        ),
        (np.full((1, 2), 1e31, F32), None, "w: expected weights up to 2.102 for int4; got 9.99.*; use"),
        (np.zeros((1, 65537), F32), None, "w: expected at most 65536 columns for int4; got 65537; use float"),
        (some, 32, "group: expected None, 64 or 128 columns; got 32; pass"),
        (some, True, "group: expected None, 64 or 128 columns; got True; pass"),
    ):
        with pytest.raises(ValueError, match=what) as caught:
            SparseMatrix.from_dense(w, dtype="int4", group=group)
        assert FORM.fullmatch(str(caught.value))
    for dtype in (None, "int8", F32):
        with pytest.raises(ValueError, match=r"group: expected None for dtype .*; got 64; pass") as caught:
            SparseMatrix.from_dense(some, dtype=dtype, group=64)
        assert FORM.fullmatch(str(caught.value))
    with pytest.raises(ValueError, match=r"scales: expected none for dtype 'int4'; got some; pass"):
        SparseMatrix.from_dense(some, dtype="int4", scales=np.ones(2))
    levels, scales = SYMMETRIC, np.ones((2, 1), F32)
    packed = Packed.pack_int4(np.ones((2, 3), np.int8), 64, scales, levels)
    for refuse, what in (
        (lambda: packed.add("panels"), "expected bitmask or slots, for int4 values"),
        (lambda: Packed.pack_int4(np.ones((2, 3), np.int8), 32, scales, levels), "width: expected 64 or 128"),
        (
            lambda: Packed.pack_int4(np.ones((2, 3), np.int8), 64, scales[:1], levels),
            "scales: expected 2 x 1",
        ),
        (lambda: Packed.pack_int4(np.ones((2, 3), np.int8), 64, scales, levels[:3]), "levels: expected 16"),
        (
            lambda: Packed.pack_int4(np.ones((2, 3), np.int8), 64, (scales / 3).astype(F32), levels),
            "scales: expected numbers",
        ),
        (
            lambda: Packed.pack_int4(np.full((2, 3), 9, np.int8), 64, scales, levels),
            "values: expected levels",
        ),
    ):
        with pytest.raises(ValueError, match=what) as caught:
            refuse()
        assert FORM.fullmatch(str(caught.value))
