"""The BLAS that NumPy uses, and its number of threads."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from sparsam.inputs.system import loaded_libraries, usable_cpus

__all__ = ["numpy_blas"]

_LIBRARIES = ("openblas", "mkl_rt", "blis")
_COUNTS = (
    "scipy_openblas_get_num_threads64_",
    "scipy_openblas_get_num_threads",
    "openblas_get_num_threads64_",
    "openblas_get_num_threads",
    "MKL_Get_Max_Threads",
    "bli_thread_get_num_threads",
)
_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "OMP_NUM_THREADS")


def numpy_blas() -> tuple[str, int]:
    """Returns the name and version, and the number of threads that it uses now."""
    name, count = _found()
    return name, max(1, count())


@cache
def _found() -> tuple[str, Callable[[], int]]:
    name = "unknown BLAS"
    with suppress(Exception):  # show_config(mode=) needs NumPy 1.26, and its result is not documented
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        name = f"{blas['name']} {blas['version']}"
    for path in _loaded():
        with suppress(OSError):
            library = ctypes.CDLL(path)
            for function in _COUNTS:
                if (count := getattr(library, function, None)) is not None:
                    return name, count
    return name, _from_environment


def _loaded() -> list[str]:
    """The libraries in this process that may be the BLAS, those that came with NumPy first."""
    paths = [path for path in loaded_libraries() if any(name in Path(path).name for name in _LIBRARIES)]
    return sorted(paths, key=lambda path: ("numpy" not in path, path))


def _from_environment() -> int:
    for variable in _VARIABLES:
        if (value := os.environ.get(variable, "")).isdigit():
            return int(value)
    return usable_cpus()
