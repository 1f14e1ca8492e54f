"""Files that are replaced completely or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from sparsam.checkpoint.locks import locked, real_path
from sparsam.inputs.checks import expected
from sparsam.inputs.messages import LOGGER
from sparsam.inputs.system import sync

__all__ = ["LOCK", "check_target", "open_folder", "publish", "remove_abandoned", "short"]

LOCK = "lock"
"""A file in each folder of temporary files, which its process keeps locked while it is alive."""


def check_target(path: Path) -> Path:
    """Checks that a file can be written, before its content is computed; follows links.

    Raises:
        ValueError: It exists and is not a regular file, or is a link to itself.
        OSError: Its folder is missing.
    """
    target = real_path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(target.parent))
    if target.exists() and not target.is_file():
        msg = f"{path}: expected a regular file to replace; got a folder, pipe or device; choose another name"
        raise ValueError(msg)
    return target


def open_folder(what: str, path: str | os.PathLike[str]) -> Path:
    """Makes a folder, with its parents, if it is missing; returns its path.

    Args:
        what: The argument's name in error messages.
        path: The folder.

    Raises:
        ValueError: The path, or a part of it, is a file.
        TypeError: It is not a path.
        OSError: It cannot be made.
    """
    do = "name a folder"
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(expected(what, path, "the path of a folder", do))
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(expected(what, str(path), "a folder, or where one can be made", do)) from error
    return folder


def publish(writers: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Writes files beside their targets, flushes them to the disk, then renames all of them in order.

    A failure removes what was written and leaves every target as it was, unless it happens between two
    renames: then each target is complete, the earlier ones new and the later ones old. A target that is a
    link is followed, and a target that exists keeps its mode. What killed processes left beside a target
    is removed.

    Args:
        writers: Target -> a function that writes the target's content to the path that it is given.

    Raises:
        ValueError: A target exists and is not a regular file; two targets are links to one file.
        OSError: A folder is missing, the disk is full, and whatever else writing can raise.
    """
    staged: dict[Path, Path] = {}
    with ExitStack() as folders:
        for path, write in writers.items():
            target = check_target(path)
            if target in staged:
                msg = (
                    f"{path}: expected a file of its own; got a link to {target}, which is written too; "
                    "unlink it"
                )
                raise ValueError(msg)
            staged[target] = temporary = folders.enter_context(_workplace(target)) / "file"
            temporary.touch(exist_ok=False)
            mode = (target if target.exists() else temporary).stat().st_mode
            write(temporary)
            temporary.chmod(mode)
            sync(temporary)
        for target, temporary in staged.items():
            temporary.replace(target)
        if os.name == "posix":
            for folder in {target.parent for target in staged}:
                sync(folder)


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """A folder beside a file in which it is written; those that killed processes left there are removed."""
    name = target.name if len(os.fsencode(target.name)) <= 200 else short(target.name)
    ours = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.tmp")
    for other in target.parent.iterdir():
        if ours.fullmatch(other.name):
            remove_abandoned(other)
    folder = target.with_name(f".{name}.{secrets.token_hex(4)}.tmp")
    folder.mkdir()
    with locked(folder / LOCK):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Removes a folder of temporary files, unless the process that made it is alive."""
    if folder.is_symlink() or not (folder / LOCK).is_file():
        return
    with suppress(OSError), locked(folder / LOCK) as free:
        if free:
            LOGGER.info("removing %r, which a process that ended left", str(folder))
            shutil.rmtree(folder, ignore_errors=True)


def short(name: str) -> str:
    """Returns 16 characters that identify a name of any length."""
    return hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
