"""The two forms of int4 values, bitmask and slots: each exact, made of the other, checked, and chosen."""

from __future__ import annotations

import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import sparsam
from matmul_cases import ORACLES, inputs, weights
from rounded_matmul import F32, grid_of
from rounded_matmul import int4_product as product
from sparsam import NM, SparseMatrix, _core
from sparsam._core import Packed
from sparsam.sparse.int4 import SYMMETRIC
from sparsam.sparse.int4_form import faster_form

FORMS = ("bitmask", "slots")
SHAPES = [(1, 1), (3, 7), (16, 64), (17, 100), (32, 128), (33, 130), (40, 300), (100, 66), (7, 0), (0, 7)]
WIDEST = np.array([0, -64, *range(-6, 0), *range(1, 8), 64], np.int8)


def in_form(packed: Packed, form: str) -> Packed:
    """A copy with that form alone, which was built from another."""
    copy = Packed.from_buffers([packed.buffer(name) for name in packed.forms])
    copy.add(form)
    copy.keep([form])
    return copy


def linear(
    packed: Packed, x: NDArray[np.float32], bias: NDArray[np.float32] | None = None, activation: str = ""
) -> NDArray[np.float32]:
    (form,) = packed.forms
    y = np.full((len(x), packed.rows), np.nan, F32)
    if y.size:
        packed.linear(form, x, bias, activation, y)
    return y


def sections_of(buffer: NDArray[np.uint8]) -> list[int]:
    return [int(at) for at in buffer[64:112].view(np.uint64)]


def bitmask_by_hand(
    q: NDArray[np.int64], levels: NDArray[np.int8]
) -> tuple[list[int], NDArray[np.uint64], NDArray[np.uint8]]:
    """What docs/formats.md says: the beginnings of groups, words and codes."""
    rows, cols = q.shape
    padded = np.zeros((-(-rows // 32) * 32, -(-cols // 4) * 4), np.int64)
    padded[:rows, :cols] = q
    begin, words, codes = [0], [], []
    for group in padded.reshape(-1, 2, 16, padded.shape[1]):
        streams: list[list[int]] = [[], []]
        for column in range(0, padded.shape[1], 4):
            for half in range(2):
                four = group[half, :, column : column + 4].ravel()
                words.append(sum(1 << int(bit) for bit in np.flatnonzero(four)))
                streams[half] += [int(np.flatnonzero(levels == value)[0]) for value in four[four != 0]]
        longest = max(map(len, streams))
        low, high = (np.pad(np.array(s, np.uint8), (0, longest - len(s))) for s in streams)
        codes.append(low | high << 4)
        begin.append(begin[-1] + longest)
    return begin, np.array(words, np.uint64), np.concatenate(codes or [np.zeros(0, np.uint8)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("group", [64, 128])
def test_both_are_exact(isa: str, form: str, shape: tuple[int, int], sparsity: float, group: int) -> None:
    matrix = SparseMatrix.from_dense(weights(*shape, sparsity), dtype="int4", group=group)
    packed = in_form(matrix._state.forms.readable(), form)
    q, scales, width = grid_of(matrix)
    bias = inputs(shape[0], seed=3)
    for batch in (1, 2, 3, 4, 5, 6, 7, 8, 9, 20):
        x = inputs(batch, shape[1], seed=batch)
        assert np.array_equal(linear(packed, x, bias), product(q, scales, width, x, bias)), batch


def test_threads_and_activations(isa: str, threads: int) -> None:
    """All of them give the bits that the generic kernel gives on one thread for the other form."""
    matrix = SparseMatrix.from_dense(weights(600, 500, 0.7), dtype="int4")
    both = [in_form(matrix._state.forms.readable(), form) for form in FORMS]
    x, bias = inputs(21, 500), inputs(600, seed=2)
    for activation in ("", *ORACLES):
        bitmask, slots = (linear(packed, x, bias, activation) for packed in both)
        assert np.array_equal(bitmask, slots)
        with sparsam.use_isa("generic"):
            assert np.array_equal(linear(both[0], x, bias, activation), slots)


@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_saturates(isa: str, sign: int) -> None:
    rng = np.random.default_rng(3)
    signs = np.where(np.arange(33)[:, None] % 3, rng.choice([-64, 64], (33, 1000)), 64)
    scales = np.full((33, 8), 0.5, F32)
    for sparsity in (0.0, 0.5):
        q = np.where(rng.random((33, 1000)) < sparsity, 0, signs).astype(np.int8)
        packed = Packed.pack_int4(q, 128, scales, WIDEST)
        for batch in (1, 8, 11):
            x = np.full((batch, 1000), 2.0 * sign, F32)
            assert np.array_equal(linear(packed, x), product(q, scales, 128, x))


def test_the_widest_sums(isa: str) -> None:
    q, scales = np.full((1, 65536), -64, np.int8), np.full((1, 512), 2.0**96, F32)
    x = np.full((2, 65536), 3e-5, F32)
    y = linear(Packed.pack_int4(q, 128, scales, WIDEST), x)
    assert np.array_equal(y, product(q, scales, 128, x))
    assert np.isfinite(y).all()


def test_inputs_that_are_not_numbers(isa: str) -> None:
    packed = Packed.pack_int4(np.ones((40, 70), np.int8), 64, np.ones((40, 2), F32), SYMMETRIC)
    x = np.ones((3, 70), F32)
    x[0, 5], x[1, 6] = np.nan, np.inf
    y = linear(packed, x)
    assert np.isnan(y[:2]).all()
    assert (y[2] == 70).all()


@given(st.data())
def test_bytes_are_as_documented(data: st.DataObject) -> None:
    """Rows of very different lengths too; and each form is made of the other without loss."""
    rows, cols = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 140))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    density = rng.choice([0.0, 0.1, 0.5, 1.0], rows)
    q = np.where(rng.random((rows, cols)) < density[:, None], rng.integers(-7, 8, (rows, cols)), 0)
    units = -(-cols // 64)
    scales = (2.0 ** rng.integers(-3, 4, (rows, units))).astype(F32)
    packed = Packed.pack_int4(q.astype(np.int8), 64, scales, SYMMETRIC)
    assert packed.forms == ("bitmask",)
    buffer = packed.buffer("bitmask")
    at = sections_of(buffer)
    begin, words, codes = bitmask_by_hand(q, SYMMETRIC)
    groups = len(begin) - 1
    assert buffer[at[0] :][: 8 * (groups + 1)].view(np.uint64).tolist() == begin
    sums = np.add.reduceat(128 * q, range(0, cols, 64), axis=1)
    zero = np.zeros(groups * 32, F32)
    for unit in range(units):
        zero[:rows] += sums[:, unit].astype(F32) * scales[:, unit]
    assert np.array_equal(buffer[at[1] :][: 128 * groups].view(F32), zero)
    unit_scales = np.zeros((groups * 32, units), F32)
    unit_scales[:rows] = scales
    stored = buffer[at[2] :][: 64 * groups * units].view(ml_dtypes.bfloat16).astype(F32)
    assert np.array_equal(stored, unit_scales.reshape(groups, 32, units).transpose(0, 2, 1).ravel())
    assert np.array_equal(buffer[at[3] :][: 8 * len(words)].view(np.uint64), words)
    assert np.array_equal(buffer[at[4] :][: len(codes)], codes)
    assert np.array_equal(buffer[at[5] :][:16].view(np.int8), SYMMETRIC)

    slots = in_form(packed, "slots")
    assert np.array_equal(in_form(slots, "bitmask").buffer("bitmask"), buffer)
    for one in (packed, slots):
        assert np.array_equal(one.unpack(), (q * np.repeat(scales, 64, axis=1)[:, :cols]).astype(F32))
        assert np.array_equal(one.bits(), np.packbits(q != 0, axis=1, bitorder="little"))
        assert np.array_equal(one.scales(), scales)
        assert np.array_equal(one.levels(), SYMMETRIC)
        halves = [int(np.flatnonzero(value == SYMMETRIC)[0]) for value in q[q != 0]]
        assert one.values().tolist() == [
            low | high << 4 for low, high in zip(halves[::2], [*halves[1::2], 0], strict=False)
        ]
    assert Packed.from_buffers([buffer, slots.buffer("slots")]).forms == FORMS


@pytest.mark.parametrize(
    ("sparsity", "bits"), [(0.5, 3.13), (0.6, 2.73), (0.7, 2.33), (0.8, 1.93), (0.9, 1.53)]
)
def test_bits_of_a_weight(sparsity: float, bits: float) -> None:
    """In memory, zeros counted: one for each weight, four for each that is stored, and scales."""
    w = weights(512, 4096, sparsity)
    packed = in_form(SparseMatrix.from_dense(w, dtype="int4", group=128)._state.forms.readable(), "bitmask")
    assert 8 * packed.nbytes <= 1.05 * bits * w.size


def test_rows_that_are_not_alike(isa: str) -> None:
    """Half of a byte of codes is left over where one half of a group has more than the other."""
    w = inputs(64, 200)
    w[:16] = w[48:, 3:] = 0
    packed = in_form(SparseMatrix.from_dense(w, dtype="int4")._state.forms.readable(), "bitmask")
    q, scales, width = grid_of(SparseMatrix(packed))
    x = inputs(3, 200)
    assert np.array_equal(linear(packed, x), product(q, scales, width, x))


@pytest.mark.parametrize("shape", [(19, 100), (40, 300), (64, 128)])
def test_a_damaged_bitmask_is_refused_or_reads_within_bounds(isa: str, shape: tuple[int, int]) -> None:
    """Whatever byte is changed: it is refused, unless it makes another weight that is as good."""
    packed = SparseMatrix.from_dense(weights(*shape, 0.5), dtype="int4")._state.forms.readable()
    good = in_form(packed, "bitmask").buffer("bitmask")
    rng = np.random.default_rng(0)
    at = sections_of(good)
    places = [*range(128), *(place for start in at for place in range(start, start + 24))]
    refused = 0
    for place in (*places, *rng.integers(128, len(good), 400).tolist()):
        bad = good.copy()
        bad[place] ^= 1 << int(rng.integers(8))
        try:
            found = Packed.from_buffers([bad])
        except ValueError:
            refused += 1
            continue
        linear(found, inputs(2, found.cols))
    assert refused >= 120


@pytest.mark.parametrize(
    ("section", "place", "change", "what"),
    [
        (0, 0, 1, "expected as many codes as its header says"),
        (0, 9, 1, "expected groups in order"),
        (0, 8, 1, "expected a code for each bit"),
        (1, 0, 1, "expected the bitmask that its weights are given"),
        (3, 0, 1, "expected the bitmask that its weights are given"),
        (4, 0, 8, "values: expected levels but 0"),
        (5, 3, 7, "levels: expected 0, then 15 that rise"),
    ],
)
def test_what_is_wrong_with_a_bitmask(section: int, place: int, change: int, what: str) -> None:
    q = np.ones((40, 8), np.int8)
    good = Packed.pack_int4(q, 64, np.ones((40, 1), F32), SYMMETRIC).buffer("bitmask")
    bad = good.copy()
    bad[sections_of(good)[section] + place] ^= change
    with pytest.raises(ValueError, match=what):
        Packed.from_buffers([bad])


def test_forms_of_different_weights_are_refused() -> None:
    scales = np.ones((8, 1), F32)
    ones = Packed.pack_int4(np.ones((8, 16), np.int8), 64, scales, SYMMETRIC)
    twos = in_form(Packed.pack_int4(np.full((8, 16), 2, np.int8), 64, scales, SYMMETRIC), "slots")
    with pytest.raises(ValueError, match="buffers: expected forms of one weight; got different weights"):
        Packed.from_buffers([ones.buffer("bitmask"), twos.buffer("slots")])


def test_the_form_that_is_faster(isa: str) -> None:
    """Where bits can be expanded fast, unstructured weights that are many are a bitmask, others are slots."""
    expands = "avx512vnni" in _core.int8_isas()
    w = inputs(256, 1024)
    quarter = w * sparsam.select(w, 0.75, NM(4, 16)).to_array()
    cases = [
        (weights(256, 1024, 0.5), "bitmask"),
        (weights(256, 1024, 0.8), "slots"),
        (weights(2304, 2560, 0.8), "bitmask"),
        (quarter, "slots"),
    ]
    for dense, form in cases:
        matrix = SparseMatrix.from_dense(dense, dtype="int4", group=128)
        wanted = form if expands else "slots"
        assert [*matrix._state.forms.kernels] == [wanted]
        assert str(matrix.explain(4)).endswith(f"{wanted}, the form of int4 values")
        copy = Packed.from_buffers([matrix._state.forms.readable().buffer(wanted)])
        assert faster_form(copy) == wanted
    assert SparseMatrix.from_dense(np.zeros((8, 8), F32), dtype="int4")._state.forms.kernels == ("slots",)


def test_a_form_that_was_asked_for() -> None:
    matrix = SparseMatrix.from_dense(weights(64, 256, 0.6), dtype="int4")
    x = inputs(8, 256)
    y = matrix.linear(x)
    matrix.prepare(1, kernel="bitmask")
    assert [*matrix._state.forms.kernels] == ["bitmask"]
    matrix.prepare(8, kernel="slots")
    assert matrix._state.forms.kernels == FORMS
    for copy in (matrix, pickle.loads(pickle.dumps(matrix))):
        assert copy._state.forms.kernels == FORMS
        assert [copy.explain(batch).kernel for batch in (1, 8)] == [*FORMS]
        assert copy.explain(1).reason == "as requested with prepare()"
        assert np.array_equal(copy.linear(x), y)
        assert np.array_equal(copy.linear(x[:1]), y[:1])


def test_a_copy_elsewhere_has_the_form_that_is_faster_there() -> None:
    matrix = SparseMatrix.from_dense(weights(64, 256, 0.5), dtype="int4")
    data, x = pickle.dumps(matrix), inputs(2, 256)
    with sparsam.use_isa("generic"):
        copy = pickle.loads(data)
        assert copy._state.forms.kernels == ("slots",)
        assert np.array_equal(copy.linear(x), matrix.linear(x))
