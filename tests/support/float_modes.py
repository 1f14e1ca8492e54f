"""The floating-point mode of a program that flushes subnormal numbers to zero and rounds up."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam import _core

# MXCSR of x86: denormals are zeros, flush to zero, and rounding up; FPCR of ARM: flush to zero, rounding up.
FLUSHING = {"x86_64": 0x8040 | 0x4000, "aarch64": (1 << 24) | (1 << 22)}

ROUNDING = {"x86_64": 0x6000, "aarch64": 3 << 22}


@contextmanager
def flushing(*, upwards: bool = True) -> Iterator[None]:
    """Runs a block in that mode, or without rounding up, and checks that the block leaves it as it was."""
    before = _core.standard_floats()
    mode = FLUSHING[platform.machine()]
    _core.set_float_mode(before | (mode if upwards else mode & ~ROUNDING[platform.machine()]))
    assert np.float64(1e-310) * np.float64(1.0) == 0
    yield
    still = np.float64(1e-310) * np.float64(1.0) == 0
    _core.set_float_mode(before)
    assert still


def same_in_both(function: Callable[[], Any], *, upwards: bool = True) -> Any:
    """The bytes of the arrays that a function returns, which must not depend on the mode."""
    expected = bits(function())
    with flushing(upwards=upwards):
        got = function()
    assert bits(got) == expected
    return expected


def bits(value: Any) -> Any:
    """An array, or a tuple, list or mapping of arrays, as bytes."""
    if isinstance(value, dict):
        return {key: bits(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [bits(one) for one in value]
    array = np.asarray(value)
    return array.shape, str(array.dtype), array.tobytes()


def partly_subnormal(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> NDArray[Any]:
    """Normal numbers of which a third are below the normal range, made in the standard mode."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    tiny = 1e-39 if dtype == "float32" else 1e-310
    return np.where(rng.random(shape) < 1 / 3, x * tiny, x).astype(dtype)


def subnormal_only(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    """float32 numbers that are all below the normal range."""
    return (1e-39 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)
