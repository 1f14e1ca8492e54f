"""Convolutions and bfloat16 products of the core on memory of exactly the size they may touch."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from sparsam._core import Packed

Floats = NDArray[np.float32]
Pair = tuple[int, int]


def convolve(x: Floats, w: Floats, stride: Pair, padding: Pair, dilation: Pair) -> NDArray[np.float64]:
    """The sum over windows, in float64."""
    around = ((0, 0), (0, 0), *((p, p) for p in padding))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, w.shape[2:], strict=True)]
    windows = sliding_window_view(np.pad(x.astype(np.float64), around), reach, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    sums: NDArray[np.float64] = np.einsum("nchwij,ocij->nohw", windows, w.astype(np.float64))
    return sums


def sparse_convolve(
    x: Floats, w: Floats, stride: Pair, padding: Pair, dilation: Pair, bias: Floats | None = None
) -> Floats:
    images, channels, height, width = x.shape
    out, _, *kernel = w.shape
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip((height, width), padding, dilation, kernel, stride, strict=True)
    ]
    y = np.full((images, out, *sizes), np.nan, np.float32)
    packed = Packed.pack(w.reshape(out, -1))
    packed.add("panels")
    packed.conv2d_at(
        x.ctypes.data,
        channels * height * width,
        images,
        (height, width),
        (kernel[0], kernel[1]),
        stride,
        padding,
        dilation,
        0 if bias is None else bias.ctypes.data,
        "" if bias is None else "relu",
        y.ctypes.data,
        out * sizes[0] * sizes[1],
    )
    return y


def draw(*shape: int, sparsity: float = 0.0, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape, dtype=np.float32)
    return np.where(rng.random(shape) < sparsity, np.float32(0), values)


@pytest.mark.parametrize("width", [1, 5, 8, 15, 16, 17, 31, 32, 33, 64, 66])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
def test_widths(isa: str, width: int, kernel: Pair) -> None:
    x, w = draw(2, 3, 6, width), draw(5, 3, *kernel, sparsity=0.6, seed=1)
    padding = (kernel[0] // 2, kernel[1] // 2)
    for stride, dilation in itertools.product([(1, 1), (2, 3)], [(1, 1), (2, 1)]):
        if dilation[0] * (kernel[0] - 1) + 1 > 6 + 2 * padding[0]:
            continue
        expected = convolve(x, w, stride, padding, dilation)
        y = sparse_convolve(x, w, stride, padding, dilation)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    bias = draw(5)
    y = sparse_convolve(x, w, (1, 1), padding, (1, 1), bias)
    expected = np.maximum(convolve(x, w, (1, 1), padding, (1, 1)) + bias[:, None, None], 0)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("rows", [1, 4, 255, 256, 257, 700])
def test_rows_and_densities(isa: str, threads: int, rows: int, sparsity: float) -> None:
    x, w = draw(3, 40, 9, 13), draw(rows, 40, 3, 3, sparsity=sparsity, seed=1)
    y = sparse_convolve(x, w, (1, 1), (1, 1), (1, 1))
    np.testing.assert_allclose(y, convolve(x, w, (1, 1), (1, 1), (1, 1)), rtol=1e-4, atol=1e-3)


def test_rows_that_share_columns(isa: str) -> None:
    w = np.repeat(draw(8, 12, 3, 3, sparsity=0.7), 4, axis=0) * draw(32, 1, 1, 1, seed=3)
    x = draw(1, 12, 20, 20, seed=2)
    assert Packed.pack(w.reshape(32, -1)).blocked == 4
    y = sparse_convolve(x, w, (1, 1), (1, 1), (1, 1))
    np.testing.assert_allclose(y, convolve(x, w, (1, 1), (1, 1), (1, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["bitmask", "panels"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 65), (300, 129)])
@pytest.mark.parametrize("batch", [1, 3, 17, 70])
def test_bfloat16_activations(isa: str, kernel: str, shape: Pair, batch: int) -> None:
    bfloat16: Any = ml_dtypes.bfloat16
    w, x, bias = draw(*shape, sparsity=0.5), draw(batch, shape[1], seed=1).astype(bfloat16), draw(shape[0])
    y = np.zeros((batch, shape[0]), bfloat16)
    packed = Packed.pack(w)
    packed.add(kernel)
    packed.linear_at(kernel, x.ctypes.data, True, batch, bias.ctypes.data, "relu", y.ctypes.data)
    exact = np.maximum(x.astype(np.float64) @ w.astype(np.float64).T + bias, 0)
    error = np.abs(y.astype(np.float64) - exact)
    assert (error <= 2.0**-8 * np.abs(exact) + 1e-4).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image": (0, 4)}, "at least 1"),
        ({"stride": (1, 0)}, "at least 1"),
        ({"kernel": (2, 1)}, "divisor of 9 columns"),
        ({"image": (1, 1)}, "at least the size of the dilated kernel"),
        ({"padding": (1 << 30, 0)}, "at most 2\\^29"),
        ({"image": (1 << 18, 1 << 18)}, "less than 2\\^32 floats"),
    ],
)
def test_geometries_that_cannot_be(change: dict[str, Pair], text: str) -> None:
    packed = Packed.pack(draw(2, 9))
    geometry: dict[str, Any] = {
        "image": (4, 4), "kernel": (3, 3), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1),
    }  # fmt: skip
    with pytest.raises(ValueError, match=text):
        packed.conv2d_at(
            x=0, x_stride=0, images=0, bias=0, activation="", out=0, out_stride=0, **geometry | change
        )
