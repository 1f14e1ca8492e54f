"""Files that are replaced completely or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def check_target(path: Path) -> Path:
    """Checks that a file can be written, before its content is computed; follows links.

    Raises:
        ValueError: It exists and is not a regular file.
        OSError: Its folder is missing.
    """
    target = path.resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(target.parent))
    if target.exists() and not target.is_file():
        msg = f"{path}: expected a regular file to replace; got a folder, pipe or device; choose another name"
        raise ValueError(msg)
    return target


def publish(writers: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Writes files beside their targets, flushes them to the disk, then renames all of them in order.

    A failure removes what was written and leaves every target as it was, unless it happens between two
    renames: then each target is complete, the earlier ones new and the later ones old. A target that is a
    link is followed, and a target that exists keeps its mode.

    Args:
        writers: Target -> a function that writes the target's content to the path that it is given.

    Raises:
        ValueError: A target exists and is not a regular file.
        OSError: A folder is missing, the disk is full, and whatever else writing can raise.
    """
    staged: dict[Path, Path] = {}
    try:
        for path, write in writers.items():
            target = check_target(path)
            staged[target] = temporary = target.with_name(f".{target.name[:64]}.{secrets.token_hex(4)}.tmp")
            temporary.touch(exist_ok=False)
            mode = (target if target.exists() else temporary).stat().st_mode
            write(temporary)
            temporary.chmod(mode)
            _flush(temporary)
        for target, temporary in staged.items():
            temporary.replace(target)
        if os.name == "posix":
            for folder in {target.parent for target in staged}:
                _flush(folder)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Forces a file, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
