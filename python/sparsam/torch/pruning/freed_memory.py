"""Returns freed memory to the system, so that a deep network needs no more than a shallow one."""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = ["return_freed_memory"]


def return_freed_memory() -> None:
    """Asks the C library to return freed memory; does nothing if it has no `malloc_trim`.

    Activations are freed in other threads, at other times and in other sizes than the next ones are made.
    glibc keeps the gaps, and 2.36 was seen to reuse few of them: a process grew by two copies of all
    activations with every block.
    """
    if _TRIM is not None:
        _TRIM(0)


def _found() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc; Windows has no library without a name
        return None


_TRIM = _found()
