"""Writes of large blocks past the page cache, which costs a copy and a page for each 4 KiB."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from sparsam.inputs.system import open_direct, write_soon

__all__ = ["DirectWrites", "block_for", "write_all"]

_PAGE = 4096  # a multiple of the blocks of all usual disks


def block_for(size: int) -> NDArray[np.uint8]:
    """Memory for blocks of so many bytes, whatever their place in the file."""
    return np.empty(size + _PAGE, np.uint8)


def write_all(file: BinaryIO, data: bytes | NDArray[np.uint8]) -> None:
    """Writes all bytes where an unbuffered file stands, whose `write` may take only a part of them."""
    view, done = memoryview(data), 0  # type: ignore[arg-type]
    while done < len(view):
        done += file.write(view[done:])


class DirectWrites:
    """Writes to a file: whole pages directly where that can be, the rest through the page cache."""

    def __init__(self, file: BinaryIO) -> None:
        """Takes a file that is open for writing and has no buffer of its own."""
        self._file, self._direct = file, open_direct(Path(file.name))

    def room(self, memory: NDArray[np.uint8], begin: int, size: int) -> NDArray[np.uint8]:
        """Returns a part of `memory`, from `block_for`, whose pages are pages of the file from `begin` on."""
        shift = (begin - memory.ctypes.data) % _PAGE if self._direct is not None and begin % 8 == 0 else 0
        return memory[shift : shift + size]

    def write(self, data: NDArray[np.uint8], begin: int) -> None:
        """Writes a block at its place."""
        first = -begin % _PAGE
        last = len(data) - (begin + len(data)) % _PAGE
        if (
            last <= first
            or (begin - data.ctypes.data) % _PAGE
            or not self._wrote(data[first:last], begin + first)
        ):
            first = last = len(data)
        for start, part in ((0, data[:first]), (last, data[last:])):
            self._file.seek(begin + start)
            write_all(self._file, part)
            if len(part) >= _PAGE:
                write_soon(self._file, begin + start, len(part))

    def _wrote(self, pages: NDArray[np.uint8], begin: int) -> bool:
        """Writes pages directly; False if the disk has other blocks."""
        done = 0
        while self._direct is not None and done < len(pages):
            try:
                done += os.pwrite(self._direct, memoryview(pages)[done:], begin + done)  # type: ignore[arg-type]
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return False
        return self._direct is not None

    def close(self) -> None:
        """Closes what was opened; a lock that this process has on the file ends, too."""
        if self._direct is not None:
            with suppress(OSError):
                os.close(self._direct)
            self._direct = None
