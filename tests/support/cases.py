"""Named adversarial inputs, shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

DTYPES: dict[str, Any] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}

# Around vector widths (4 to 32), mask words (64), the direct limit (512), blocks (4096), chunks (65536).
SMALL_SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 511, 512, 513, 1025)
SIZES = (*SMALL_SIZES, 4095, 4097, 65535, 65537, 200_003)


def _normal(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return rng.standard_normal(n)


def _all_but_one(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    x = np.full(n, 0.5)
    if n:
        x[rng.integers(n)] = 2.0
    return x


def _outlier(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    x = rng.standard_normal(n) * 1e-3
    if n:
        x[rng.integers(n)] = 6e4
    return x


def _mostly_zeros(rng: np.random.Generator, n: int) -> NDArray[Any]:
    return np.where(rng.random(n) < 0.99, 0.0, rng.standard_normal(n))


def _signed_zeros(rng: np.random.Generator, n: int) -> NDArray[Any]:
    return np.where(rng.random(n) < 0.5, -0.0, 0.0)


def _infinities(rng: np.random.Generator, n: int) -> NDArray[Any]:
    x: NDArray[Any] = np.where(rng.random(n) < 0.3, np.inf, rng.standard_normal(n)) * rng.choice(
        [-1.0, 1.0], n
    )
    return x


def _denormals(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return rng.standard_normal(n) * 1e-41  # denormal in float32 and bfloat16, zero in float16


CASES: dict[str, Callable[[np.random.Generator, int], NDArray[Any]]] = {
    "normal": _normal,
    "constant": lambda _, n: np.full(n, 0.25),
    "two values": lambda rng, n: rng.choice([0.5, -1.0], n),
    "all equal but one": _all_but_one,
    "sorted": lambda rng, n: np.sort(rng.standard_normal(n)),
    "reversed": lambda rng, n: np.sort(rng.standard_normal(n))[::-1],
    "powers of two": lambda rng, n: 2.0 ** rng.integers(-12, 12, n),
    "denormals": _denormals,
    "one huge outlier": _outlier,
    "99 % zeros": _mostly_zeros,
    "signed zeros": _signed_zeros,
    "infinities": _infinities,
    "small integers": lambda rng, n: rng.integers(-3, 4, n).astype(np.float64),
    "equal lines": lambda rng, n: np.repeat(rng.standard_normal(n // 16 + 1), 16)[:n],
    "period 64": lambda rng, n: np.resize(rng.standard_normal(64), n),
}


def make(case: str, n: int, dtype: str, seed: int = 0) -> NDArray[Any]:
    """The case as an array of that size and dtype."""
    with np.errstate(over="ignore"):
        x: NDArray[Any] = CASES[case](np.random.default_rng(seed), n).astype(DTYPES[dtype])
    return x


def model() -> dict[str, NDArray[Any]]:
    """A small network's tensors: two dtypes, a bias, names not in alphabetical order."""
    rng = np.random.default_rng(0)
    return {
        "fc2.weight": rng.standard_normal((12, 20)).astype(np.float32),
        "fc2.bias": rng.standard_normal(12).astype(np.float32),
        "fc1.weight": rng.standard_normal((20, 16)).astype(ml_dtypes.bfloat16),
    }


def layouts(x: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The same 2-D values in memory layouts that are not C order."""
    wide = np.zeros((x.shape[0], 2 * x.shape[1]), x.dtype)
    wide[:, ::2] = x
    return {
        "fortran": np.asfortranarray(x),
        "strided": wide[:, ::2],
        "negative": np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
        "misaligned": np.frombuffer(b"\0" + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
    }
