"""Files and folders that one run at a time may use."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsam.inputs.system import lock

__all__ = ["locked", "real_path"]

_held: set[tuple[int, Path]] = set()
"""The locks of this process, each with the process that took it: a forked child has none of them."""


def real_path(path: Path) -> Path:
    """Returns a path with links followed; ValueError for a link that leads back to itself."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            msg = f"{path}: expected a file or a folder; got links in a circle; remove them"
            raise ValueError(msg) from error
    return path.resolve()


@contextmanager
def locked(file: Path) -> Iterator[bool]:
    """Locks a file, which is made if it is missing, until the block ends; yields whether it was free.

    The system releases the lock when the process that took it ends, however that happens; child processes do
    not keep it.

    Raises:
        ValueError: It exists and is not a regular file, or it is a link to itself.
        OSError: It cannot be opened.
    """
    if file.exists() and not file.is_file():
        msg = f"{file}: expected a regular file to lock; got a folder, pipe or device; remove it"
        raise ValueError(msg)
    key = os.getpid(), real_path(file)
    if key in _held:  # a process does not lock itself out
        yield False
        return
    with file.open("ab") as handle:
        if not lock(handle):
            yield False
            return
        _held.add(key)
        try:
            yield True
        finally:
            _held.discard(key)
