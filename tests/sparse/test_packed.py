"""Forms of a packed weight: buffers that describe themselves, each of which gives the weight back exactly."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from packed_forms import FORMS, only, run, weights
from sparsam._core import Packed

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (3, 9), (4, 64), (255, 129), (257, 300), (600, 1100)]


def words(mask: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """The bits of a mask as the core has them."""
    packed = np.packbits(mask.reshape(-1), bitorder="little")
    return np.concatenate([packed, np.zeros(-len(packed) % 8, np.uint8)]).view(np.uint64)


def moved(buffer: NDArray[np.uint8], at: int = 0) -> NDArray[np.uint8]:
    """A copy of a buffer at an address that is `at` past a multiple of 64."""
    room = np.full(len(buffer) + 128, 0xFF, np.uint8)
    start = -room.ctypes.data % 64 + at
    room[start : start + len(buffer)] = buffer
    return room[start : start + len(buffer)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("tall", [1, 4])
def test_each_form_gives_the_weight_back(threads: int, dtype: str, sparsity: float, tall: int) -> None:
    for shape in SHAPES:
        w = weights(*shape, sparsity, tall=tall).astype(DTYPES[dtype])
        bits = np.packbits(w != 0, axis=1, bitorder="little")
        first = Packed.pack(w)
        expected = first.buffer("bitmask").tobytes()
        for form in FORMS:
            packed = only(Packed.pack(w), form)
            assert (packed.rows, packed.cols, packed.nnz, packed.dtype) == (
                *shape,
                int(np.count_nonzero(w)),
                dtype,
            )
            assert packed.unpack().tobytes() == w.tobytes()
            assert np.array_equal(packed.bits(), bits)
            assert packed.values().tobytes() == w[w != 0].tobytes()
            assert packed.nbytes == len(packed.buffer(form))
            assert packed.blocked == first.blocked
            packed.add("bitmask")
            assert packed.buffer("bitmask").tobytes() == expected


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 300),
    cols=st.integers(0, 300),
    sparsity=st.floats(0, 1),
    tall=st.sampled_from([1, 4]),
    seed=st.integers(0, 99),
)
def test_a_mask_is_kept_as_it_is(rows: int, cols: int, sparsity: float, tall: int, seed: int) -> None:
    """Zeros that the mask keeps stay, -0.0 included; what it prunes is gone, whatever it was."""
    rng = np.random.default_rng(seed)
    w = np.where(
        rng.random((rows, cols)) < 0.3, np.float32(-0.0), rng.standard_normal((rows, cols), np.float32)
    )
    mask = weights(rows, cols, sparsity, tall=tall, seed=seed) != 0
    for form in FORMS:
        packed = only(Packed.from_mask(w, words(mask)), form)
        assert packed.nnz == mask.sum()
        assert np.array_equal(packed.bits(), np.packbits(mask, axis=1, bitorder="little"))
        assert packed.values().tobytes() == w[mask].tobytes()
        assert packed.unpack().tobytes() == np.where(mask, w, np.float32(0)).tobytes()


def test_a_mask_of_another_size_and_strided_weights() -> None:
    w = weights(20, 30, 0.0)
    mask = weights(30, 20, 0.5, seed=1) != 0
    assert np.array_equal(Packed.from_mask(w.T, words(mask)).unpack(), np.where(mask, w.T, 0))
    with pytest.raises(ValueError, match=r"mask: expected 10 words .*; got 9 words"):
        Packed.from_mask(w, words(mask)[:-1])
    with pytest.raises(TypeError):
        Packed.from_mask(w, mask)


def test_forms_come_and_go() -> None:
    packed = Packed.pack(weights(300, 200, 0.5))
    assert list(packed.forms) == ["bitmask"]
    bitmask = packed.buffer("bitmask")
    packed.add("panels")
    packed.add("panels")
    assert list(packed.forms) == ["bitmask", "panels"]
    packed.add("slots")
    assert list(packed.forms) == list(FORMS)
    assert packed.nbytes == sum(len(packed.buffer(form)) for form in FORMS)
    packed.keep(["panels"])
    assert list(packed.forms) == ["panels"]
    x, y = np.ones((3, 200), np.float32), np.empty((3, 300), np.float32)
    absent = "kernel 'bitmask': expected a form that the weight has"
    with pytest.raises(ValueError, match=absent):
        packed.linear("bitmask", x, None, "", y)
    with pytest.raises(ValueError, match=absent):
        packed.linear_at("bitmask", x.ctypes.data, False, 3, 0, "", y.ctypes.data)
    for forms in (["bitmask"], []):
        with pytest.raises(ValueError, match="forms: expected at least one that the weight has"):
            packed.keep(forms)
    with pytest.raises(ValueError, match="form: expected bitmask, panels, slots or rows; got 'blas'"):
        packed.add("blas")
    with pytest.raises(ValueError, match="form: expected bitmask, panels, slots or rows; got 'blas'"):
        packed.keep(["panels", "blas"])
    with pytest.raises(ValueError, match="form 'bitmask': expected a form that the weight has"):
        packed.buffer("bitmask")
    assert packed.forms == ("panels",)
    assert np.array_equal(Packed.from_buffers([bitmask]).unpack(), packed.unpack())  # which outlives its form


def test_buffers_are_the_memory_itself(isa: str) -> None:
    w, x = weights(300, 200, 0.7), np.ones((40, 200), np.float32)
    packed = Packed.pack(w)
    for form in FORMS:
        packed.add(form)
        for trusted in (False, True):
            copy = moved(packed.buffer(form))
            again = Packed.from_buffers([copy], trusted=trusted)
            buffer = again.buffer(form)
            assert buffer.ctypes.data == copy.ctypes.data
            assert not buffer.flags.writeable
            y, expected = np.empty((40, 300), np.float32), np.empty((40, 300), np.float32)
            packed.linear(form, x, None, "", expected)
            del copy, buffer
            again.linear(form, x, None, "", y)
            assert np.array_equal(y, expected)
    both = Packed.from_buffers([packed.buffer(form) for form in reversed(FORMS)])
    assert both.forms == FORMS
    assert both.nbytes == packed.nbytes


GOLDEN = {
    "bitmask": (
        "73706172 73616d00 02000000 01020000 0200000000000000 0900000000000000 0300000000000000"
        "0000000000000000 0000000000000000 0000000000000000"
        "8000000000000000 c000000000000000 0001000000000000 0000000000000000"
        "0000000000000000 0000000000000000 8001000000000000 0000000000000000"
        "0101000000000000 0800000000000000"
        + 48 * "00"
        + "0000000000000000 0200000000000000 0300000000000000"
        + 40 * "00"
        + "0000803f 000000c0 0000003f"
        + 116 * "00"
    ),
    "panels": (
        "73706172 73616d00 02000000 02020000 0200000000000000 0900000000000000 0300000000000000"
        "8000000000000000 0100000000000000 0200000000000000"
        "8000000000000000 c000000000000000 0001000000000000 4001000000000000"
        "0000000000000000 0000000000000000 c001000000000000 0000000000000000"
        "0000000000000000 0000000000000000 0100000000000000 0200000000000000"
        + 32 * "00"
        + "0200 0001 0001 0100 0000"
        + 54 * "00"
        + "80800300 80808008"
        + 56 * "00"
        + "00000000 00000000 0000003f 0000803f 00000000 00000000 00000000 000000c0"
        + 96 * "00"
    ),
}


def test_golden_bytes() -> None:
    """1, -2 at columns 0 and 8 of the first row; 0.5 at column 3 of the second. As docs/formats.md has it."""
    w = np.zeros((2, 9), np.float32)
    w[0, 0], w[0, 8], w[1, 3] = 1, -2, 0.5
    for form, text in GOLDEN.items():
        assert only(Packed.pack(w), form).buffer(form).tobytes() == bytes.fromhex(text), form


def damaged() -> dict[str, tuple[str, Callable[[NDArray[np.uint8]], object], str]]:
    """Name -> form, what is changed, and what the error says."""

    def put(at: int, value: int, size: int = 8) -> Callable[[NDArray[np.uint8]], object]:
        def change(buffer: NDArray[np.uint8]) -> None:
            buffer[at : at + size] = np.frombuffer(value.to_bytes(size, "little"), np.uint8)

        return change

    cases = {
        "magic": (0, 0, "begins with 'sparsam'"),
        "version": (8, 3 | 1 << 32 | 2 << 40, "expected version 2; got 3"),
        "kind": (12, 7 | 2 << 8, "expected form 1"),
        "dtype": (12, 1 | 3 << 8, "expected values of dtype"),
        "rows": (16, 3, "row 2: expected as many values as bits"),
        "many rows": (16, 1 << 63, "at most 2\\^40"),
        "columns": (24, 1 << 41, "at most 2\\^40"),
        "nonzeros": (32, 1 << 39, "no more nonzero"),
        "depth": (40, 64, "expected a depth"),
        "sections": (64, 64, "bytes, with the sections"),
        "bytes": (112, 1 << 40, "bytes, with the sections"),
    }
    found = {name: ("bitmask", put(at, value), text) for name, (at, value, text) in cases.items()}
    found["a bit more"] = ("bitmask", put(128, 0x103), "row 0: expected as many values as bits")
    found["a bit past the end"] = (
        "bitmask",
        put(128, 1 | 1 << 9),
        "row 0: expected no bits past the last column",
    )
    found["a start"] = ("bitmask", put(192, 1), "first row to start at value 0")
    found["a start in between"] = ("bitmask", put(200, 1 << 40), "row 0: expected as many values as bits")
    found["panels depth"] = ("panels", put(40, 100), "expected a depth")
    found["panels units"] = ("panels", put(48, 1 << 62), "units and steps that fit")
    found["panels steps"] = ("panels", put(56, 1 << 62), "units and steps that fit")
    found["a block"] = ("panels", put(128, 1), "blocks from the first unit")
    found["steps of a unit"] = ("panels", put(192, 3, 2), "too many steps")
    found["fewer steps"] = ("panels", put(192, 1, 2), "not in order|steps in no unit|no row|pads|row|entries")
    found["a row twice"] = ("panels", put(196, 257, 2), "rows that it cannot have")
    found["a row beyond"] = ("panels", put(194, 9, 2), "rows that it cannot have")
    found["a column beyond"] = ("panels", put(256, 0x7F7F7F7F, 4), "not in order, or are too many|no row")
    found["a padding value"] = ("panels", put(320, 1, 4), "pads a unit is not 0")
    return found


@pytest.mark.parametrize("name", damaged())
def test_damaged_buffers_are_refused(name: str) -> None:
    form, change, message = damaged()[name]
    w = np.zeros((2, 9), np.float32)
    w[0, 0], w[0, 8], w[1, 3] = 1, -2, 0.5
    buffer = moved(only(Packed.pack(w), form).buffer(form))
    change(buffer)
    with pytest.raises(ValueError, match=f"buffer: .*{message}.*; pack the weight again"):
        Packed.from_buffers([buffer])


def test_buffers_that_are_none() -> None:
    buffer = Packed.pack(weights(5, 6, 0.5)).buffer("bitmask")
    other = Packed.pack(weights(5, 6, 0.5, seed=1))
    other.add("panels")
    cases: list[tuple[list[Any], str]] = [
        ([], "expected at least one; got none"),
        ([buffer, buffer], "expected one of each form"),
        ([buffer[:50]], "expected at least 128 bytes; got 50"),
        ([buffer[:-1]], "bytes, with the sections"),
        ([moved(buffer, 4)], "address that is a multiple of 8"),
        ([buffer[::2]], "contiguous vector of uint8"),
        ([buffer.view(np.int8)], "contiguous vector of uint8"),
        ([buffer[None]], "contiguous vector of uint8"),
        ([buffer, other.buffer("panels")], "forms of one weight; got different"),
    ]
    for buffers, message in cases:
        with pytest.raises(ValueError, match=message):
            Packed.from_buffers(buffers)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tall", [1, 4])
def test_mutated_buffers_are_refused_or_multiply(isa: str, form: str, tall: int) -> None:
    """Flipped bits anywhere: what is not refused is a weight, and gives the same in both forms."""
    rng = np.random.default_rng(0)
    pristine = only(Packed.pack(weights(12, 140, 0.6, tall=tall)), form).buffer(form)
    loaded = 0
    for _ in range(3000):
        buffer = moved(pristine)
        for at in rng.integers(0, len(buffer), rng.integers(1, 4)):
            buffer[at] ^= 1 << rng.integers(8)
        try:
            packed = Packed.from_buffers([buffer])
        except ValueError:
            continue
        loaded += 1
        if packed.cols > 1 << 20:  # slots say nothing of columns without weights
            continue
        for kernel in FORMS:
            packed.add(kernel)
            x, y = np.ones((3, packed.cols), np.float32), np.empty((3, packed.rows), np.float32)
            packed.linear(kernel, x, None, "", y)
        assert np.array_equal(
            packed.unpack(), Packed.from_buffers([packed.buffer(form)]).unpack(), equal_nan=True
        )
    assert 0 < loaded < 3000


# Threads and forks


def test_forms_change_while_products_run() -> None:
    w = weights(300, 200, 0.8)
    packed = Packed.pack(w)
    x = np.ones((7, 200), np.float32)
    expected = x.astype(np.float64) @ w.T.astype(np.float64)
    stop = threading.Event()
    wrong: list[object] = []

    def multiply() -> None:
        y = np.empty((7, 300), np.float32)
        while not stop.is_set():
            try:
                packed.linear("panels", x, None, "", y)
            except ValueError:  # the form is not there now
                continue
            if not np.allclose(y, expected, atol=1e-3):
                wrong.append(y)

    pool = [threading.Thread(target=multiply) for _ in range(3)]
    for thread in pool:
        thread.start()
    for _ in range(200):
        packed.add("panels")
        packed.keep(["bitmask"])
    stop.set()
    for thread in pool:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this machine cannot fork")
def test_a_child_forked_while_forms_are_built_can_build_and_multiply() -> None:
    assert run("""
        import os, threading, time, warnings
        warnings.simplefilter("ignore")  # that forking with threads is dangerous is the point
        w = rng.standard_normal((700, 600), dtype=np.float32)
        w[rng.random(w.shape) < 0.7] = 0
        shared = Packed.pack(w)
        done = False
        def work():
            while not done:
                shared.add("panels")
                shared.keep(["bitmask"])
                Packed.pack(w)
        threads = [threading.Thread(target=work) for _ in range(2)]
        for t in threads:
            t.start()
        for _ in range(40):
            child = os.fork()
            if child == 0:
                shared.add("panels")
                own = Packed.pack(w)
                own.add("panels")
                y = np.empty((20, 700), np.float32)
                for packed in (shared, own):
                    packed.linear("panels", np.ones((20, 600), np.float32), None, "", y)
                os._exit(0 if np.allclose(y[0], w.sum(axis=1), atol=1e-2) else 1)
            end = time.monotonic() + 30
            while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
                time.sleep(0.002)
            assert found == (child, 0), found
        done = True
        for t in threads:
            t.join()
        print("fine")
    """) == "fine\n"  # fmt: skip
