"""Convolutions with int8 values: exact sums on every instruction set, in both layouts, and their forms."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sparsam
from messages import FORM
from rounded_matmul import F32, ROWS, int8_convolution, row
from sparsam._core import Packed

Pair = tuple[int, int]
Geometry = tuple[Pair, Pair, Pair]  # stride, padding, dilation
PLAIN: Geometry = ((1, 1), (1, 1), (1, 1))


@pytest.fixture(params=ROWS, ids="-".join)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every row for int8 values, wherever it runs."""
    with row(*request.param):
        yield request.param[1]


def draw(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=F32)


def integers(*shape: int, sparsity: float = 0.6, seed: int = 1) -> NDArray[np.int8]:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < sparsity, 0, rng.integers(-64, 65, shape)).astype(np.int8)


def steps(rows: int) -> NDArray[np.float32]:
    return np.random.default_rng(7).uniform(0.1, 2, rows).astype(F32)


def packed(q: NDArray[np.int8], scales: NDArray[np.float32]) -> Packed:
    height, width = q.shape[2:]
    found = Packed.pack_int8(q.reshape(len(q), -1), scales, (height, width))
    found.add("slots")
    found.keep(["slots"])
    return found


def convolve(
    weight: Packed,
    x: NDArray[np.float32],
    kernel: Pair,
    geometry: Geometry = PLAIN,
    bias: NDArray[np.float32] | None = None,
    *,
    last: bool = False,
    activation: str = "",
) -> NDArray[np.float32]:
    """The core's convolution of images (n, channels, height, width), with channels last in memory or not."""
    images, channels, height, width = x.shape
    stride, padding, dilation = geometry
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip((height, width), padding, dilation, kernel, stride, strict=True)
    ]
    x = np.ascontiguousarray(x.transpose(0, 2, 3, 1) if last else x)
    shape = (images, *sizes, weight.rows) if last else (images, weight.rows, *sizes)
    y = np.full(shape, -1, F32)
    weight.conv2d_at(
        x.ctypes.data,
        channels * height * width,
        images,
        (height, width),
        kernel,
        stride,
        padding,
        dilation,
        0 if bias is None else bias.ctypes.data,
        activation,
        y.ctypes.data,
        weight.rows * sizes[0] * sizes[1],
        channels if last else 1,
        weight.rows if last else 1,
    )
    return y.transpose(0, 3, 1, 2) if last else y


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5), (5, 1), (1, 4)])
def test_geometries(isa: str, kernel: Pair, last: bool) -> None:
    q, scales, bias = integers(5, 9, *kernel), steps(5), draw(5, seed=3)
    weight = packed(q, scales)
    geometries = itertools.product([(1, 1), (2, 3)], [(0, 0), (2, 1), (1, 4)], [(1, 1), (2, 1), (1, 2)])
    for geometry, width in itertools.product(geometries, (1, 4, 5, 9, 16, 37, 150)):
        _, padding, dilation = geometry
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        if reach[0] > 6 + 2 * padding[0] or reach[1] > width + 2 * padding[1]:
            continue
        x = draw(2, 9, 6, width, seed=width)
        expected = int8_convolution(q, scales, x, geometry, bias)
        found = convolve(weight, x, kernel, geometry, bias, last=last)
        assert np.array_equal(found, expected), (width, geometry)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("rows", [1, 33, 257, 600])
def test_rows_and_densities(isa: str, threads: int, rows: int, sparsity: float) -> None:
    q, scales, bias = integers(rows, 20, 3, 3, sparsity=sparsity), steps(rows), draw(rows, seed=3)
    weight = packed(q, scales)
    for images, height, width in ((1, 8, 8), (3, 9, 13), (40, 3, 3)):
        x = draw(images, 20, height, width)
        expected = int8_convolution(q, scales, x, PLAIN, bias)
        for last in (False, True):
            assert np.array_equal(convolve(weight, x, (3, 3), PLAIN, bias, last=last), expected)


def test_uneven_rows_return_to_their_places(isa: str) -> None:
    """Rows are sorted by their number of weights where these differ much."""
    q = integers(300, 40, 3, 3, sparsity=0.0)
    q[np.random.default_rng(0).permutation(300)[:280]] *= (np.arange(360).reshape(40, 3, 3) < 9).astype(
        np.int8
    )
    scales, x = steps(300), draw(2, 40, 7, 7)
    expected = int8_convolution(q, scales, x, PLAIN)
    for last in (False, True):
        assert np.array_equal(convolve(packed(q, scales), x, (3, 3), last=last), expected)


def test_many_images_and_large_ones(isa: str) -> None:
    """More bytes than are rounded at a time."""
    q, scales = integers(4, 64, 1, 1, sparsity=0.3), steps(4)
    plain: Geometry = ((1, 1), (0, 0), (1, 1))
    for shape in ((5, 64, 120, 130), (2, 64, 200, 330)):
        x = draw(*shape)
        expected = int8_convolution(q, scales, x, plain)
        for last in (False, True):
            assert np.array_equal(convolve(packed(q, scales), x, (1, 1), plain, last=last), expected)


def test_no_channels(isa: str) -> None:
    q, scales, bias, x = integers(4, 0, 3, 3), steps(4), draw(4), draw(2, 0, 5, 6)
    assert np.array_equal(
        convolve(packed(q, scales), x, (3, 3), PLAIN, bias), int8_convolution(q, scales, x, PLAIN, bias)
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_nothing_saturates(isa: str, sparsity: float, sign: int) -> None:
    """Bytes of 255 (and 1) times weights of 64, of one sign in every third row."""
    rng = np.random.default_rng(3)
    signs = np.where(np.arange(33)[:, None, None, None] % 3, rng.choice([-64, 64], (33, 60, 3, 3)), 64)
    q = np.where(rng.random(signs.shape) < sparsity, 0, signs).astype(np.int8)
    scales, x = np.full(33, 0.5, F32), np.full((2, 60, 9, 9), 2.0 * sign, F32)
    expected = int8_convolution(q, scales, x, PLAIN)
    for last in (False, True):
        assert np.array_equal(convolve(packed(q, scales), x, (3, 3), last=last), expected)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_image_that_is_not_finite_is_nan(isa: str, threads: int, bad: float, last: bool) -> None:
    """And no other image is; one whose numbers are tiny is 0, and a scale belongs to its image."""
    q, scales, bias = integers(40, 12, 3, 3, sparsity=0.9), steps(40), draw(40, seed=3)
    q[3] = 0
    x = draw(5, 12, 20, 20)
    x[1, 11, 19, 19] = bad
    x[2] *= F32(2.0**-110)
    x[4] *= 1000
    y = convolve(packed(q, scales), x, (3, 3), PLAIN, bias, last=last)
    assert np.isnan(y[1]).all()
    assert np.array_equal(y[2], np.broadcast_to(bias[:, None, None], y[2].shape))
    others = [0, 3, 4]
    assert np.array_equal(y[others], int8_convolution(q, scales, x[others], PLAIN, bias))


def test_every_machine_gives_the_same_bits(threads: int) -> None:
    """A form that was built under one instruction set is multiplied under all; activations included."""
    q, scales, bias, x = integers(70, 30, 3, 3), steps(70), draw(70, seed=3), draw(2, 30, 14, 14)
    for activation in ("", "relu", "gelu", "gelu_tanh", "silu"):
        found = []
        for built in sparsam.available_isas():
            with sparsam.use_isa(built):
                weight = packed(q, scales)
            for (name, int8), last in itertools.product(ROWS, (False, True)):
                with row(name, int8):
                    found.append(convolve(weight, x, (3, 3), PLAIN, bias, last=last, activation=activation))
        assert all(np.array_equal(each, found[0]) for each in found[1:])
        if activation == "relu":
            assert np.array_equal(found[0], np.maximum(int8_convolution(q, scales, x, PLAIN, bias), 0))


def test_forms_give_the_weight_back(isa: str) -> None:
    """In the order of the dense weight, whatever the order in slots; also where the form is checked."""
    for kernel in ((3, 3), (1, 7), (4, 2)):
        q, scales = integers(19, 11, *kernel), steps(19)
        flat = q.reshape(19, -1)
        plain = Packed.pack_int8(flat, scales)
        weight = packed(q, scales)
        assert weight.taps == kernel
        assert plain.taps == (0, 0)
        assert weight.width == 0
        assert np.array_equal(weight.unpack(), flat * scales[:, None])
        assert np.array_equal(weight.bits(), plain.bits())
        assert np.array_equal(weight.values(), plain.values())
        again = Packed.from_buffers([weight.buffer("slots")])
        again.add("bitmask")
        again.add("rows")
        assert again.taps == kernel
        for form in ("bitmask", "slots", "rows"):
            one = Packed.from_buffers([again.buffer(form)])
            assert np.array_equal(one.unpack(), weight.unpack())
            one.add("slots")
            assert np.array_equal(one.buffer("slots"), weight.buffer("slots"))
        parts = Packed.from_int8_parts(19, flat.shape[1], plain.bits(), plain.values(), scales, kernel)
        parts.add("slots")
        assert np.array_equal(parts.buffer("slots"), weight.buffer("slots"))
    assert Packed.pack_int8(flat, scales, (1, 1)).taps == (0, 0)


def test_columns_stand_by_pixels() -> None:
    """docs/formats.md: (column, row, channel), and the kernel in the header."""
    q = np.zeros((1, 2, 2, 3), np.int8)  # two channels, kernel 2 x 3
    q[0, 1, 0, 2] = 5  # column (2, 0, 1): 2 * 4 + 0 * 2 + 1
    q[0, 0, 1, 0] = 7  # column (0, 1, 0): 2
    with row("generic", "generic"):
        data = packed(q, np.ones(1, F32)).buffer("slots")
    assert data[120:128].view(np.uint64) == (2 << 16 | 3)
    *_, starts, codes = data[64:96].view(np.uint64).tolist()
    assert data[starts : starts + 4].view(np.uint16).tolist() == [2, 11]  # the second step is empty
    assert data[codes : codes + 2].tolist() == [7, 5]
    assert [code & 15 for code in data[codes + 64 : codes + 66].tolist()] == [0, 7]


def refused(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        call()
    assert FORM.fullmatch(str(caught.value))


def test_what_is_refused() -> None:
    q, scales, x = integers(4, 3, 3, 3), steps(4), draw(1, 3, 5, 5)
    flat, weight = q.reshape(4, -1), packed(q, scales)
    refused(
        lambda: convolve(weight, draw(1, 1, 5, 9), (3, 9)), "kernel size: expected the one that .* got 3 x 9;"
    )
    refused(
        lambda: weight.linear("slots", draw(2, 27), None, "", draw(2, 4)), "weight: expected that of a linear"
    )
    for taps in ((2, 2), (0, 3), (3, 0), (1 << 16, 1)):
        refused(lambda taps=taps: Packed.pack_int8(flat, scales, taps), "taps: expected sizes up to 65535")
    floats = Packed.pack(flat.astype(F32))
    floats.add("panels")
    refused(lambda: convolve(floats, x, (3, 3), last=True), "pixels: expected planes for float values")
    bitmask = Packed.pack_int8(flat, scales, (3, 3))
    refused(lambda: convolve(bitmask, x, (3, 3)), "kernel 'slots': expected a form that the weight has")
    plain = Packed.pack_int8(flat, scales)
    plain.add("slots")
    refused(lambda: convolve(plain, x, (3, 3)), "kernel size: expected the one that the weight was packed")
    damaged = weight.buffer("slots").copy()
    for bits in (2 << 16 | 2, 1 << 16 | 1, 3, 3 << 16, 1 << 40):
        damaged[120:128] = np.array([bits], np.uint64).view(np.uint8)
        refused(
            lambda: Packed.from_buffers([damaged]), "0, or the kernel of a convolution of so many columns"
        )
    damaged[120:128] = 0  # the slots of the same columns in another order
    refused(lambda: Packed.from_buffers([damaged, weight.buffer("slots")]), "expected")
    both = [Packed.from_buffers([damaged]).buffer("slots"), bitmask.buffer("bitmask")]
    refused(lambda: Packed.from_buffers(both), "forms of one weight; got different sizes or types")
