"""Arithmetic that does not depend on the floating-point mode of the caller.

A program may make the processor treat subnormal numbers as zero (`torch.set_flush_denormal(True)`), in
NumPy's arithmetic too. Weights and scores must be compared with subnormal numbers intact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from sparsam import _core

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def standard_floats(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Wraps `function` so that it computes by IEEE 754 and then restores the caller's mode."""

    @wraps(function)
    def standard(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        mode = _core.standard_floats()
        try:
            return function(*args, **kwargs)
        finally:
            _core.set_float_mode(mode)

    return standard
