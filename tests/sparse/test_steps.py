"""Steps of the core: norms and other row-wise steps, whole blocks, chunks, threads, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsam
from matmul_cases import EPS, ORACLES, VALUES, inputs, weights
from messages import FORM
from rounded_matmul import ROWS, row
from sparsam._core import Packed, Steps
from sparsam.sparse.packing import pack
from steps_cases import Array, Step, layer_norm, oracle, rms_norm, rotary, run, separately

WIDTHS = [1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 384, 1000]


def packed(w: Array, kernel: str, dtype: str = "float32") -> Packed:
    """A weight in the form of that kernel."""
    found = pack(w, dtype if dtype in {"int8", "int4"} else VALUES[dtype], None, None)
    found.add(kernel)
    return found


def rows_of(width: int) -> dict[str, Array]:
    """Rows that norms could stumble over; several of each, all finite."""
    x = inputs(5, width, seed=width)
    return {
        "plain": x,
        "far from 0": x + np.float32(3e4),
        "one far out": np.where(np.arange(width) == width // 2, np.float32(1e6), x),
        "tiny": x * np.float32(1e-20),
        "subnormal": x * np.float32(1e-40),
        "huge": x * np.float32(1e17),
        "constant": np.full((5, width), 0.1, np.float32)
        * np.array([[1], [-3], [1e4], [1e-7], [7]], np.float32),
        "zeros": np.zeros((5, width), np.float32),
        "two values": np.where(np.arange(width) % 2, np.float32(1), np.float32(-1))
        * np.ones((5, 1), np.float32),
    }


def close(y: Array, exact: Array, width: int) -> None:
    """To some roundings of the largest number of a row: those of a sum, and of what follows."""
    bound = (8 + width / 64) * EPS * np.abs(exact).max(-1, keepdims=True, initial=0)
    assert (np.abs(y - exact) <= bound + np.finfo(np.float32).tiny).all(), float(np.abs(y - exact).max())


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(isa: str, width: int, eps: float) -> None:
    del isa
    weight, bias = inputs(width, seed=8), inputs(width, seed=9)
    for name, x in rows_of(width).items():
        (y,) = run([width] * 2, [("layer_norm", 0, 1, -1, -1, eps)], {0: x[None]}, [1])
        exact = layer_norm(x, None, None, eps)
        if name == "constant" or width == 1:  # of which rounding in the mean must not make an output
            assert np.abs(y - exact).max() <= 1e-3, name
            continue
        close(y[0], exact, width)
        (y,) = run([width] * 2, [("layer_norm", 0, 1, 0, 1, eps)], {0: x[None]}, [1], [weight, bias])
        assert (
            np.abs(y[0] - exact * weight - bias)
            <= (10 + width / 64) * EPS * (np.abs(exact).max() * np.abs(weight) + np.abs(bias))
        ).all(), name


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(isa: str, width: int) -> None:
    del isa
    weight = inputs(width, seed=8)
    for x in rows_of(width).values():
        (y,) = run([width] * 2, [("rms_norm", 0, 1, -1, 1e-6)], {0: x[None]}, [1])
        close(y[0], rms_norm(x, None, 1e-6), width)
        (y,) = run([width] * 2, [("rms_norm", 0, 1, 0, 1e-6)], {0: x[None]}, [1], [weight])
        close(y[0], rms_norm(x, weight, 1e-6), width)


@pytest.mark.parametrize("width", [1, 16, 17, 100])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(isa: str, number: float, width: int) -> None:
    del isa
    x = inputs(1, 7, width)
    clean = x.copy()
    x[0, 3, width // 2] = number
    others = np.arange(7) != 3
    for step in (("layer_norm", 0, 1, -1, -1, 1e-5), ("rms_norm", 0, 1, -1, 1e-5)):
        (found,), (wanted,) = (run([width] * 2, [step], {0: of}, [1]) for of in (x, clean))
        assert np.array_equal(found[0, others], wanted[0, others])
        assert np.isnan(found[0, 3, width // 2])
        if step[0] == "layer_norm" or np.isnan(number):
            assert np.isnan(found[0, 3]).all()
        else:  # as x / infinity
            assert not np.delete(found[0, 3], width // 2).any()


@pytest.mark.parametrize("width", [1, 16, 33, 384])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_an_addition_before_a_norm_is_both_steps(isa: str, norm: str, width: int) -> None:
    del isa
    a, b = inputs(1, 9, width), inputs(1, 9, width, seed=2)
    rest: tuple[Any, ...] = (0, 1, 1e-5) if norm == "layer_norm" else (0, 1e-5)
    vectors = [inputs(width, seed=3), inputs(width, seed=4)]
    total, wanted = run([width] * 4, [("add", 0, 1, 2), (norm, 2, 3, *rest)], {0: a, 1: b}, [2, 3], vectors)
    assert np.array_equal(total, a + b)
    for kept, y in ((2, 3), (-1, 3), (0, 3), (1, 3), (0, 1), (2, 0), (-1, 0), (-1, 1)):
        outs = [y] if kept < 0 else [kept, y]
        *summed, found = run(
            [width] * 4, [("add_" + norm, 0, 1, kept, y, *rest)], {0: a, 1: b}, outs, vectors
        )
        assert np.array_equal(found, wanted)
        assert all(np.array_equal(one, total) for one in summed)


@pytest.mark.parametrize(("heads", "depth"), [(1, 2), (9, 64), (3, 128), (2, 30), (5, 34), (1, 80)])
def test_rotary(isa: str, threads: int, heads: int, depth: int) -> None:
    """To the last bit: as PyTorch, which rounds each operation."""
    del isa, threads
    x, cos, sin = inputs(3, 40, heads * depth), inputs(3, 40, depth, seed=1), inputs(3, 40, depth, seed=2)
    widths, step = [heads * depth, depth, depth], ("rotary", 0, 1, 2, 3, heads)
    expected = rotary(x, cos, sin, heads)
    (y,) = run([*widths, heads * depth], [step], {0: x, 1: cos, 2: sin}, [3])
    assert np.array_equal(y, expected)
    (y,) = run(widths, [(*step[:4], 0, heads)], {0: x, 1: cos, 2: sin}, [0])  # in place
    assert np.array_equal(y, expected)


def test_infinity_turns_into_its_own_point() -> None:
    x, cos, sin = (inputs(1, 2, 32, seed=i) for i in range(3))
    x[0, 0, 5] = np.inf
    (y,) = run([32] * 4, [("rotary", 0, 1, 2, 3, 1)], {0: x, 1: cos, 2: sin}, [3])
    assert np.argwhere(~np.isfinite(y)).tolist() == [[0, 0, 5], [0, 0, 21]]


@pytest.mark.parametrize("width", [1, 7, 16, 33, 1000])
def test_what_is_done_to_each_number(isa: str, width: int) -> None:
    del isa
    a, b = inputs(2, 3, width), inputs(2, 3, width, seed=2)
    for y in (0, 1, 2):
        (found,) = run([width] * 3, [("add", 0, 1, y)], {0: a, 1: b}, [y])
        assert np.array_equal(found, a + b)
        for activation, formula in ORACLES.items():
            (found,) = run([width] * 3, [("gate", 0, 1, y, activation)], {0: a, 1: b}, [y])
            (alone,) = run(
                [width] * 3, [("activate", 0, 0 if y == 0 else 2, activation)], {0: a}, [0 if y == 0 else 2]
            )
            assert np.array_equal(found, alone * b)
            exact = formula(a.astype(float))
            assert (np.abs(alone - exact) <= 8 * EPS * np.maximum(np.abs(a), np.abs(exact))).all()
        (found,) = run([width] * 3, [("gate", 0, 1, y, "")], {0: a, 1: b}, [y])
        assert np.array_equal(found, a * b)


def block(
    make: Any, width: int, heads: int, inner: int, masked: int
) -> tuple[list[int], list[Step], list[Array]]:
    """That of BERT: input 0, output 9. make(rows, cols) gives a weight and the name of its kernel."""
    tensors = [inputs(n, seed=20 + i) for i, n in enumerate([width] * 4 + [inner] + [width] * 5)]
    steps: list[Step] = [
        ("linear", *make(width, width, 1), 0, 1, 0, ""),
        ("linear", *make(width, width, 2), 0, 2, 1, ""),
        ("linear", *make(width, width, 3), 0, 3, 2, ""),
        ("attention", 1, 2, 3, 4, heads, (width / heads) ** -0.5, masked),
        ("linear", *make(width, width, 4), 4, 5, 3, ""),
        ("add_layer_norm", 5, 0, -1, 6, 5, 6, 1e-12),
        ("linear", *make(inner, width, 5), 6, 7, 4, "gelu"),
        ("linear", *make(width, inner, 6), 7, 8, 7, ""),
        ("add_layer_norm", 8, 6, -1, 9, 8, 9, 1e-12),
    ]
    return [width] * 7 + [inner] + [width] * 2, steps, tensors


def decoder(make: Any, width: int, heads: int, inner: int) -> tuple[list[int], list[Step], list[Array]]:
    """With RMSNorm before, and a gated MLP; no biases. Input 0, output 0."""
    tensors = [inputs(width, seed=20), inputs(width, seed=21)]
    steps: list[Step] = [
        ("rms_norm", 0, 1, 0, 1e-6),
        ("linear", *make(width, width, 1), 1, 2, -1, ""),
        ("linear", *make(width, width, 2), 1, 3, -1, ""),
        ("linear", *make(width, width, 3), 1, 4, -1, ""),
        ("attention", 2, 3, 4, 5, heads, (width / heads) ** -0.5, 1),
        ("linear", *make(width, width, 4), 5, 1, -1, ""),
        ("add_rms_norm", 0, 1, 0, 2, 1, 1e-6),
        ("linear", *make(inner, width, 5), 2, 6, -1, ""),
        ("linear", *make(inner, width, 6), 2, 7, -1, ""),
        ("gate", 6, 7, 6, "silu"),
        ("linear", *make(width, inner, 7), 6, 1, -1, ""),
        ("add", 0, 1, 0),
    ]
    return [width] * 6 + [inner] * 2, steps, tensors


def padding(sequences: int, heads: int, positions: int) -> Array:
    """Of the last keys of some sequences."""
    seen = np.arange(positions) < positions - np.arange(sequences)[:, None] % 3
    return np.broadcast_to(seen[:, None, None, :], (sequences, heads, positions, positions))


@pytest.mark.parametrize("kernel", ["bitmask", "panels", "slots"])
@pytest.mark.parametrize("dtype", VALUES)
def test_blocks_are_their_formulas(isa: str, kernel: str, dtype: str) -> None:
    del isa

    def make(rows: int, cols: int, seed: int) -> tuple[Packed, str]:
        return packed(weights(rows, cols, 0.6, seed) * np.float32(2 * cols**-0.5), kernel, dtype), kernel

    x = inputs(3, 11, 48)
    for mask in (padding(3, 3, 11), np.where(padding(3, 3, 11), 0, -np.inf).astype(np.float32)):
        widths, steps, tensors = block(make, 48, 3, 100, 1)
        (y,) = run(widths, steps, {0: x}, [9], tensors, mask)
        exact = oracle(steps, {0: x}, tensors, mask)[9]
        assert np.abs(y - exact).max() <= 2e-5 * np.abs(exact).max()
        widths, steps, tensors = decoder(make, 48, 3, 100)
        (y,) = run(widths, steps, {0: x}, [0], tensors, mask)
        exact = oracle(steps, {0: x}, tensors, mask)[0]
        assert np.abs(y - exact).max() <= 2e-5 * np.abs(exact).max()


@pytest.mark.parametrize("shape", [(1, 16), (3, 100), (9, 64), (33, 24), (700, 1)], ids=str)
@pytest.mark.parametrize(
    "values",
    ["bitmask float32", "panels bfloat16", "slots float16", "slots int8", "slots int4", "bitmask int4"],
)
def test_chunks_and_threads_change_nothing(values: str, shape: tuple[int, int]) -> None:
    """Not a bit; with int8 and int4 values each sequence has what it has alone."""
    kernel, dtype = values.split()

    def make(rows: int, cols: int, seed: int) -> tuple[Packed, str]:
        return packed(weights(rows, cols, 0.8, seed), kernel, dtype), kernel

    x, mask = inputs(*shape, 192), padding(shape[0], 6, shape[1])
    for (widths, steps, tensors), out in ((block(make, 192, 6, 600, 1), 9), (decoder(make, 192, 6, 600), 0)):
        found = []
        for threads in (1, 2, 5):
            sparsam.set_num_threads(threads)
            found += run(widths, steps, {0: x}, [out], tensors, mask)
        sparsam.set_num_threads(None)
        assert np.array_equal(found[0], found[1])
        assert np.array_equal(found[0], found[2])
        if dtype in {"int8", "int4"}:
            some = list(range(0, shape[0], max(1, shape[0] // 5)))
            parts = [run(widths, steps, {0: x[s : s + 1]}, [out], tensors, mask[s : s + 1])[0] for s in some]
            assert np.array_equal(found[0][some], np.concatenate(parts))


@pytest.mark.parametrize("names", ROWS, ids="-".join)
@pytest.mark.parametrize("values", ["slots int8", "slots int4", "bitmask int4"])
def test_rounded_values_on_every_row(names: tuple[str, str], values: str, threads: int) -> None:
    """A block is its steps, one by one and sequence by sequence, to the last bit."""
    del threads
    kernel, dtype = values.split()
    with row(*names):

        def make(rows: int, cols: int, seed: int) -> tuple[Packed, str]:
            return packed(weights(rows, cols, 0.8, seed), kernel, dtype), kernel

        x, mask = inputs(4, 20, 96), padding(4, 6, 20)
        widths, steps, tensors = block(make, 96, 6, 200, 1)
        (y,) = run(widths, steps, {0: x}, [9], tensors, mask)
        assert np.array_equal(y, separately(widths, steps, {0: x}, tensors, mask)[9])
        widths, steps, tensors = decoder(make, 96, 6, 200)
        (y,) = run(widths, steps, {0: x}, [0], tensors, mask)
        assert np.array_equal(y, separately(widths, steps, {0: x}, tensors, mask)[0])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_buffers_that_are_needed_are_kept(data: st.DataObject) -> None:
    """Any additions, each of what was written before; what is asked for in the end may be all or nothing."""
    widths = data.draw(st.lists(st.sampled_from([3, 16, 20, 40]), min_size=2, max_size=12))
    firsts = [widths.index(width) for width in sorted(set(widths))]  # one of each width is an input
    x = {i: inputs(2, 5, widths[i], seed=i) for i in firsts}
    now, steps = dict(x), []
    for _ in range(data.draw(st.integers(0, 20))):
        y = data.draw(st.integers(0, len(widths) - 1))
        fits = [i for i in now if widths[i] == widths[y]]
        a, b = (data.draw(st.sampled_from(fits)) for _ in range(2))
        if y not in x:
            now[y] = now[a] + now[b]
            steps.append(("add", a, b, y))
    outputs = data.draw(st.lists(st.sampled_from(sorted(now)), unique=True))
    for i, found in zip(outputs, run(widths, steps, x, outputs), strict=True):
        assert np.array_equal(found, now[i])


def test_nothing_to_do() -> None:
    step = ("layer_norm", 0, 1, -1, -1, 1e-5)
    for shape in ((0, 5), (5, 0), (0, 0)):
        (y,) = run([4, 4], [step], {0: np.zeros((*shape, 4))}, [1])
        assert y.size == 0
    (y,) = run([0, 0], [step], {0: np.zeros((2, 3, 0))}, [1])
    assert y.size == 0
    (y,) = run([4], [], {0: np.ones((2, 3, 4))}, [0])
    assert (y == 1).all()


@pytest.mark.parametrize("room", [16, 300, 1000, 10_000])
def test_less_scratch_than_asked_for(room: int, threads: int) -> None:
    del threads
    widths, steps = [16] * 3, [("add", 0, 0, 1), ("add", 1, 1, 2)]
    x = inputs(700, 3, 16)
    if room == 16:
        with pytest.raises(ValueError, match=r"scratch: expected more floats; got 16"):
            run(widths, steps, {0: x}, [2], room=room)
    else:
        assert np.array_equal(run(widths, steps, {0: x}, [2], room=room)[0], 4 * x)


LINEAR = packed(weights(32, 16, 0.5), "panels")
CONVOLUTION = Packed.pack_int8(np.ones((4, 16), np.int8), np.ones(4, np.float32), (2, 2))
CONVOLUTION.add("slots")
WRONG: dict[str, tuple[list[int], Step]] = {
    "no name": ([4], ()),
    "another name": ([4], ("sub", 0, 0, 0)),
    "too few": ([4], ("add", 0, 0)),
    "too many": ([4], ("add", 0, 0, 0, 0)),
    "a text": ([4], ("add", 0, "0", 0)),
    "a buffer below": ([4], ("add", 0, -1, 0)),
    "a buffer above": ([4], ("add", 0, 1, 0)),
    "a tensor below": ([4], ("rms_norm", 0, 0, -2, 1e-5)),
    "widths of add": ([4, 5], ("add", 0, 0, 1)),
    "widths of a norm": ([4, 5], ("rms_norm", 0, 1, -1, 1e-5)),
    "width of a sum": ([4, 5], ("add_rms_norm", 0, 0, 1, 0, -1, 1e-5)),
    "a sum in y": ([4], ("add_rms_norm", 0, 0, 0, 0, -1, 1e-5)),
    "an activation": ([4], ("activate", 0, 0, "tanh")),
    "x of a product": ([17, 32], ("linear", LINEAR, "panels", 0, 1, -1, "")),
    "y of a product": ([16, 33], ("linear", LINEAR, "panels", 0, 1, -1, "")),
    "a product in place": (
        [16, 32],
        ("linear", packed(weights(16, 16, 0.5), "panels"), "panels", 0, 0, -1, ""),
    ),
    "a form": ([16, 32], ("linear", LINEAR, "slots", 0, 1, -1, "")),
    "a kernel": ([16, 32], ("linear", LINEAR, "dense", 0, 1, -1, "")),
    "no weight": ([16, 32], ("linear", None, "panels", 0, 1, -1, "")),
    "a convolution": ([16, 4], ("linear", CONVOLUTION, "slots", 0, 1, -1, "")),
    "bitmask of int8": (
        [16, 32],
        ("linear", packed(weights(32, 16, 0.5), "bitmask", "int8"), "bitmask", 0, 1, -1, ""),
    ),
    "no heads": ([32] * 4, ("attention", 0, 1, 2, 3, 0, 1.0, 0)),
    "depth": ([24] * 4, ("attention", 0, 1, 2, 3, 1, 1.0, 0)),
    "heads": ([32] * 4, ("attention", 0, 1, 2, 3, 3, 1.0, 0)),
    "angles of all heads": ([32] * 4, ("rotary", 0, 1, 2, 3, 2)),
    "no sine": ([32, 16, 8, 32], ("rotary", 0, 1, 2, 3, 2)),
    "a lone column": ([9, 3, 3, 9], ("rotary", 0, 1, 2, 3, 3)),
    "turned into no heads": ([0] * 4, ("rotary", 0, 1, 2, 3, 0)),
    "attention in place": ([32] * 4, ("attention", 0, 1, 2, 1, 2, 1.0, 0)),
}


@pytest.mark.parametrize("what", WRONG)
def test_steps_that_do_not_fit_are_refused(what: str) -> None:
    widths, step = WRONG[what]
    with pytest.raises(ValueError, match=FORM):
        Steps(widths, [step])


def test_calls_that_do_not_fit_are_refused() -> None:
    steps = Steps([4, 4], [("layer_norm", 0, 1, 0, 1, 1e-5)])
    x = np.zeros((4, 4), np.float32)
    for buffer, at, tensors in ((1, 0, [0, 0]), (0, x.ctypes.data, [0]), (2, x.ctypes.data, [0, 0])):
        with pytest.raises(ValueError, match=FORM):
            steps.run(1, 4, [(buffer, at)], tensors, None, 0, 0)
