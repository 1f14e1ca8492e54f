"""int8 values: rounding, exact sums on every instruction set, files, what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import sparsam
from matmul_cases import ORACLES, inputs, weights
from messages import FORM
from rounded_matmul import F32, ROWS, rounded, row
from rounded_matmul import int8_product as product
from sparsam import Mask, SparseMatrix, _core, checkpoint
from sparsam._core import Packed
from sparsam.sparse.stored import to_arrays


@pytest.fixture(params=ROWS, ids="-".join)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every row for int8 values, wherever it runs."""
    with row(*request.param):
        yield request.param[1]


SHAPES = [(1, 1), (3, 7), (8, 16), (17, 100), (64, 64), (100, 300), (7, 0), (0, 7)]
NAMES: tuple[Any, ...] = (None, *ORACLES)


def of_integers(q: NDArray[np.int8], scales: NDArray[np.float32]) -> SparseMatrix:
    packed = Packed.pack_int8(q, scales)
    packed.add("slots")
    packed.keep(["slots"])
    return SparseMatrix(packed)


def extreme(rows: int, cols: int, sparsity: float) -> NDArray[np.int8]:
    """Weights of 64 and -64 only: of one sign in every third row, where sums of neighbours are largest."""
    rng = np.random.default_rng(3)
    signs = np.where(np.arange(rows)[:, None] % 3, rng.choice([-64, 64], (rows, cols)), 64)
    return np.where(rng.random((rows, cols)) < sparsity, 0, signs).astype(np.int8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.95, 1.0])
def test_products_are_exact(isa: str, shape: tuple[int, int], sparsity: float) -> None:
    w, bias = weights(*shape, sparsity), inputs(shape[0], seed=3)
    matrix = SparseMatrix.from_dense(w, dtype="int8")
    q, scales = rounded(w)
    assert matrix.nnz == np.count_nonzero(q)
    assert matrix.dtype == np.int8
    for batch in (1, 2, 3, 7, 8, 9, 40):
        x = inputs(batch, shape[1], seed=batch)
        assert np.array_equal(matrix.linear(x, bias), product(q, scales, x, bias)), batch
        assert np.array_equal(matrix.linear(x, bias, "relu"), np.maximum(product(q, scales, x, bias), 0))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_saturates(isa: str, sparsity: float, sign: int) -> None:
    """Bytes of 255 (and 1) times weights of 64, of one sign in every third row."""
    q, scales = extreme(33, 1000, sparsity), np.full(33, 0.5, F32)
    matrix = of_integers(q, scales)
    for batch in (1, 8, 11):
        x = np.full((batch, 1000), 2.0 * sign, F32)
        assert np.array_equal(matrix.linear(x), product(q, scales, x))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16), (4, 16), (1, 4)])
def test_patterns_fill_all_slots(isa: str, n: int, m: int) -> None:
    w = inputs(64, 256)
    keep = sparsam.select(w, 1 - n / m, sparsam.NM(n, m)).to_array()
    q = np.where(keep, np.random.default_rng(0).integers(1, 65, w.shape), 0)
    q[keep & (np.cumsum(keep, axis=1) == 1)] = 64  # the scale is 1
    matrix = SparseMatrix.from_dense(q.astype(F32), dtype="int8")
    data = matrix._state.forms.packed
    assert data is not None
    window, lanes, pairs = np.frombuffer(data.buffer("slots")[40:64].tobytes(), np.uint64).tolist()
    assert matrix.nnz == np.count_nonzero(keep)
    assert matrix.nnz == (8 if window == 16 else 4) * lanes * pairs
    x = inputs(5, 256)
    assert np.array_equal(matrix.linear(x), product(q, np.ones(64, F32), x))


def test_every_machine_gives_the_same_bits(threads: int) -> None:
    """A form that was built under one instruction set is multiplied under all; activations included."""
    w, x, bias = weights(600, 500, 0.7), inputs(21, 500), inputs(600, seed=2)
    found = []
    for built in sparsam.available_isas():
        with sparsam.use_isa(built):
            matrix = SparseMatrix.from_dense(w, dtype="int8")
        for one in ROWS:
            with row(*one):
                found.append([matrix.linear(x, bias, name) for name in NAMES])
    for other in found[1:]:
        for y, expected in zip(other, found[0], strict=True):
            assert np.array_equal(y, expected)
    exact = product(*rounded(w), x, bias)
    for name, y in zip(ORACLES, found[0][1:], strict=True):
        z = ORACLES[name](exact.astype(np.float64))
        assert np.abs(y - z).max() < 2e-6 * (1 + np.abs(exact).max()), name


def test_the_row_that_is_asked_for_runs() -> None:
    """One that another instruction set needs is refused, and the best is taken again where it cannot run."""
    best = ROWS[0][1]
    assert [int8 for name, int8 in ROWS if name == "generic"] == ["generic"]
    with sparsam.use_isa("generic"):
        for name in {*(int8 for _, int8 in ROWS), "avx9"} - {"generic"}:
            wanted = "instruction set of int8 values: expected one that runs under generic .generic.; got"
            with pytest.raises(ValueError, match=f"{wanted} '{name}'; pass") as caught:
                _core.use_int8_isa(name)
            assert FORM.fullmatch(str(caught.value))
    w = weights(64, 256, 0.5)
    sizes = {}
    for name, int8 in ROWS:
        with row(name, int8):
            sizes[int8] = SparseMatrix.from_dense(w, dtype="int8").nbytes
            with sparsam.use_isa("generic"):
                SparseMatrix.from_dense(w, dtype="int8").linear(inputs(2, 256))
    assert SparseMatrix.from_dense(w, dtype="int8").nbytes == sizes[best]
    assert len(set(sizes.values())) <= 2  # windows of 16, and of 64


def test_out_dtypes_and_shapes(isa: str) -> None:
    w, x = weights(30, 50, 0.6), inputs(2, 3, 50)
    matrix = SparseMatrix.from_dense(w.astype(np.float64), dtype=np.int8)
    exact = product(*rounded(w), x.reshape(6, 50)).reshape(2, 3, 30)
    out = np.empty((2, 3, 30), np.float64)
    assert matrix.linear(x, out=out) is out
    assert np.array_equal(out, exact)
    assert np.array_equal(matrix @ x[0].T, exact[0].T)
    assert np.array_equal(matrix.linear(x.astype(np.float64)), exact)
    for turned in (np.asfortranarray(w), np.repeat(w, 2, axis=1)[:, ::2]):  # in any memory layout
        assert np.array_equal(SparseMatrix.from_dense(turned, dtype="int8").linear(x), exact)


def test_a_weight_that_rounds_to_zero_is_pruned() -> None:
    w = np.array([[1, 1e-4, 0.5, 0], [0, 0, 0, 0]], F32)
    for dtype in (F32, np.float16, ml_dtypes.bfloat16, np.float64):
        matrix = SparseMatrix.from_dense(w.astype(dtype), dtype="int8")
        assert matrix.nnz == 2
        assert np.array_equal(matrix.to_dense() != 0, [[True, False, True, False], [False] * 4])
    kept = SparseMatrix.from_mask(w, np.array([[False, True, True, True], [True] * 4]), dtype="int8")
    assert np.array_equal(kept._state.forms.readable().values(), [64])  # its scale is of what is kept
    mask = Mask.from_array(np.array([[True] * 4, [False] * 4]))
    assert SparseMatrix.from_mask(w, mask, dtype="int8").nnz == 2


def test_the_error_of_rounding() -> None:
    w = weights(100, 200, 0.5)
    dense = SparseMatrix.from_dense(w, dtype="int8").to_dense()
    assert dense.dtype == np.float32
    largest = np.abs(w).max(axis=1, keepdims=True)
    assert (np.abs(dense - w) <= largest / 128 * (1 + 1e-6)).all()


def test_rows_on_a_grid_are_not_rounded_again() -> None:
    """Whatever their largest integer is; the others get max |w| / 64 as ever."""
    rng = np.random.default_rng(0)
    most = np.arange(1, 65)
    q = rng.integers(-most[:, None], most[:, None] + 1, (64, 200)) * (rng.random((64, 200)) < 0.4)
    q[:, 7] = most
    steps = np.ldexp(rng.integers(2**17, 2**18, 64).astype(F32), rng.integers(-60, 20, 64)).astype(F32)
    w = (q * steps[:, None]).astype(F32)
    w[5], w[20] = inputs(2, 200) * F32(0.01)  # in between
    w[30] *= F32(2.0**-40)
    matrix = SparseMatrix.from_dense(w, dtype="int8")
    on_grid = ~np.isin(np.arange(64), [5, 20])
    assert np.array_equal(matrix.to_dense()[on_grid], w[on_grid])
    scales = matrix._state.forms.readable().scales()
    full = on_grid & (most >= 33)  # below that twice the integers are as good
    full[30] = False
    assert np.array_equal(scales[full], steps[full])
    assert np.array_equal(scales[[5, 20]], np.abs(w[[5, 20]]).max(axis=1) / F32(64))


def test_scales_that_are_given() -> None:
    w = np.array([[32.2, 0, -1.6, 0.4], [0, 0, 0, 0], [0.1, 0, 0, 0]], F32)
    matrix = SparseMatrix.from_dense(w, dtype="int8", scales=np.array([0.5, 2, 0.25]))
    assert matrix.to_dense().tolist() == [[32, 0, -1.5, 0.5], [0] * 4, [0] * 4]
    assert np.array_equal(matrix._state.forms.readable().scales(), np.array([0.5, 2, 0.25], F32))
    for scales, got in (
        (np.ones(2), "float64 .2,."),
        (np.ones((3, 1)), "float64 .3, 1."),
        (np.ones(3, int), "int64 .3,."),
        (np.array([0.4, 1, 1]), "0.4.* in row 0, whose largest weight is 32.2"),
        (np.array([1, 0, 1.0]), "0.0 in row 1"),
        (np.array([1, 1, 1e-40]), "9.99994.* in row 2"),
        (np.array([1, np.nan, 1]), "nan in row 1"),
        (np.array([np.inf, 1, 1]), "inf in row 0"),
        (np.array([1, 1, 1e60]), "inf in row 2"),
    ):
        with pytest.raises(ValueError, match=f"scales: expected .*; got {got}") as caught:
            SparseMatrix.from_dense(w, dtype="int8", scales=scales)
        assert FORM.fullmatch(str(caught.value))
    for dtype in (None, F32):
        with pytest.raises(ValueError, match=r"scales: expected none for dtype .*; got some; pass") as caught:
            SparseMatrix.from_dense(w, dtype=dtype, scales=np.ones(3))
        assert FORM.fullmatch(str(caught.value))


def test_what_can_be_asked_of_it() -> None:
    w = weights(40, 96, 0.75)
    matrix = SparseMatrix.from_dense(w, dtype="int8")
    assert repr(matrix).startswith("SparseMatrix(40x96, int8, ")
    assert matrix.explain(3).kernel == "slots"
    assert str(matrix.explain(3)).endswith("slots, the kernel of int8 values")
    matrix.prepare([1, 64])
    matrix.prepare(1, kernel="slots")
    assert matrix.explain(1).kernel == "slots"
    with pytest.raises(ValueError, match="kernel: expected one of slots; got 'panels'; pass"):
        matrix.prepare(1, kernel="panels")
    assert np.array_equal(np.asarray(matrix), matrix.to_dense())
    assert np.array_equal(matrix.T.to_dense(), matrix.to_dense().T)
    assert matrix.T.dtype == np.float32
    pytest.importorskip("scipy")
    assert np.array_equal(matrix.to_scipy().toarray(), matrix.to_dense())
    again = SparseMatrix.from_scipy(matrix.to_scipy(), dtype="int8")
    assert again.nnz == matrix.nnz


def test_bytes_are_counted() -> None:
    matrix = SparseMatrix.from_dense(weights(256, 512, 0.8), dtype="int8")
    data = matrix._state.forms.packed
    assert data is not None
    assert matrix.nbytes == len(data.buffer("slots"))
    assert matrix.nbytes < 4.6 / 8 * 256 * 512  # bits a weight, of which 4 and a little are slots
    assert data.forms == ("slots",)


@pytest.mark.parametrize("shape", SHAPES)
def test_copies_are_equal(tmp_path: Path, shape: tuple[int, int]) -> None:
    matrix = SparseMatrix.from_dense(weights(*shape, 0.6), dtype="int8")
    x = inputs(3, shape[1])
    matrix.save(tmp_path / "w.safetensors")
    for copy in (SparseMatrix.load(tmp_path / "w.safetensors"), pickle.loads(pickle.dumps(matrix))):
        assert copy.dtype == np.int8
        assert copy.nbytes == matrix.nbytes
        assert np.array_equal(copy.linear(x), matrix.linear(x))


GOLDEN = (
    b'{"__metadata__":{"sparsam":"SparseMatrix 1"},"shape":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
    b'"scales":{"dtype":"F32","shape":[2],"data_offsets":[16,24]},'
    b'"values":{"dtype":"I8","shape":[3],"data_offsets":[24,27]},'
    b'"bits":{"dtype":"U8","shape":[2,2],"data_offsets":[27,31]}}'
)
GOLDEN_DATA = bytes.fromhex(
    "0200000000000000 0900000000000000"  # shape
    "0000803c 0000003c"  # scales: 1/64, 1/128
    "20 c0 40"  # values: 32, -64; 64
    "01 01 08 00"  # bits: columns 0 and 8; column 3
)


def test_golden_bytes(tmp_path: Path) -> None:
    w = np.zeros((2, 9), F32)
    w[0, 0], w[0, 8], w[1, 3] = 0.5, -1, 0.5
    file = tmp_path / "w.safetensors"
    SparseMatrix.from_dense(w, dtype="int8").save(file)
    header = GOLDEN + b" " * (-len(GOLDEN) % 8)
    assert file.read_bytes() == len(header).to_bytes(8, "little") + header + GOLDEN_DATA
    assert np.array_equal(SparseMatrix.load(file).to_dense(), w)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"scales": np.ones(3, F32)}, "scales: expected float32"),
        ({"scales": np.ones(2, np.float64)}, "scales: expected float32"),
        ({"scales": np.array([1, 0], F32)}, "scales: expected positive, normal numbers"),
        ({"scales": np.array([1, np.nan], F32)}, "scales: expected positive, normal numbers"),
        ({"scales": np.array([1e-40, 1], F32)}, "scales: expected positive, normal numbers"),
        ({"values": np.array([1, 0, 3], np.int8)}, "values: expected -64 to 64 and not 0"),
        ({"values": np.array([1, -65, 3], np.int8)}, "values: expected -64 to 64 and not 0"),
        ({"values": np.ones(3, F32)}, "values: expected a vector of int8"),
        ({"values": np.ones(4, np.int8)}, "values: expected 3, .*; got 4"),
    ],
)
def test_damaged_files(tmp_path: Path, change: dict[str, NDArray[Any]], what: str) -> None:
    w = np.zeros((2, 9), F32)
    w[0, 0], w[0, 8], w[1, 3] = 1, -2, 3
    arrays = to_arrays(SparseMatrix.from_dense(w, dtype="int8")._state.forms.readable())
    file = tmp_path / "w.safetensors"
    checkpoint.save(file, {**arrays, **change}, {"sparsam": "SparseMatrix 1"})
    with pytest.raises(ValueError, match=what):
        SparseMatrix.load(file)


@pytest.mark.parametrize("shape", [(19, 100), (40, 300)])
def test_a_damaged_form_is_refused_or_reads_within_bounds(isa: str, shape: tuple[int, int]) -> None:
    """Whatever byte of a form is changed: it is refused, unless it makes another weight that is as good."""
    packed = SparseMatrix.from_dense(weights(*shape, 0.7), dtype="int8")._state.forms.packed
    assert packed is not None
    good = packed.buffer("slots")
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
    assert refused >= 200


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="w: expected finite weights for int8; got inf in row 1; use float"):
        SparseMatrix.from_dense(np.array([[1, 2], [np.inf, 0]], F32), dtype="int8")
    with pytest.raises(ValueError, match="w: expected at most 65536 columns for int8; got 65537; use float"):
        SparseMatrix.from_dense(np.zeros((1, 65537), F32), dtype="int8")
    with pytest.raises(TypeError, match=r"dtype: expected one of float32, .*int8, int4; got 'int16'; pass"):
        SparseMatrix.from_dense(np.zeros((1, 5), F32), dtype="int16")
    packed = Packed.pack_int8(np.ones((2, 3), np.int8), np.ones(2, F32))
    with pytest.raises(ValueError, match="expected bitmask, slots or rows, for int8 values"):
        packed.add("panels")
    with pytest.raises(ValueError, match="scales: expected 2, one for each row"):
        Packed.pack_int8(np.ones((2, 3), np.int8), np.ones(3, F32))


def test_the_widest_sums(isa: str) -> None:
    """65536 products of 64 and 127: the largest sum there is."""
    matrix = of_integers(np.full((1, 65536), -64, np.int8), np.ones(1, F32))
    x = np.full((2, 65536), 3, F32)
    assert np.array_equal(matrix.linear(x), product(np.full((1, 65536), -64), np.ones(1, F32), x))
