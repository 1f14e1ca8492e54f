"""What this package asks the operating system, and what it does where the system has no answer.

The only module that knows Linux from others: files in /proc and /sys, locks, hints about files.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None  # type: ignore[assignment]

__all__ = [
    "available_memory",
    "interruptions",
    "loaded_libraries",
    "lock",
    "open_direct",
    "processor_fields",
    "return_freed_memory",
    "sync",
    "usable_cpus",
    "write_soon",
]

_MEMINFO, _CPUINFO, _MAPS = Path("/proc/meminfo"), Path("/proc/cpuinfo"), Path("/proc/self/maps")
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def available_memory() -> int | None:
    """Bytes that are free or can be freed, of the machine and of its container; None where nothing tells."""
    found = [_of_machine(), *(_of_group(limit, used) for limit, used in _CGROUPS)]
    return min((size for size in found if size is not None), default=None)


def _of_machine() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _of_group(limit: Path, used: Path) -> int | None:
    try:
        return max(int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii")), 0)
    except (OSError, ValueError):  # there is none, or its limit is "max"
        return None


def processor_fields() -> dict[str, str]:
    """What Linux says of the first processor; empty elsewhere."""
    fields: dict[str, str] = {}
    with suppress(OSError):
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return fields


def loaded_libraries() -> set[str]:
    """The paths of the files that are mapped into this process; empty where nothing tells."""
    found: set[str] = set()
    with suppress(OSError):
        for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
            path = line.partition("/")[2]
            if path:
                found.add(f"/{path}")
    return found


def usable_cpus() -> int:
    """How many CPUs this process may run on; all of them where it cannot be held to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def interruptions() -> int:
    """How often a thread of this process was stopped in favour of something else; 0 where nothing counts."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def lock(file: BinaryIO) -> bool:
    """Locks an open file until it is closed or this process ends, without waiting.

    Returns:
        Whether it was free. Windows has no such locks, and everything is free.

    Raises:
        OSError: It cannot be locked at all.
    """
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, onto the disk; Windows keeps names by itself."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_soon(file: BinaryIO, begin: int, size: int) -> None:
    """Has Linux start writing a part of an open file to the disk, without waiting for it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), begin, size, os.POSIX_FADV_DONTNEED)


def open_direct(path: Path) -> int | None:
    """Opens a file for writes that do not go through the page cache; None where there is no such thing."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except (AttributeError, OSError):  # not Linux, or not this file system
        return None


def return_freed_memory() -> None:
    """Asks the C library to give back what was freed; does nothing where it has no `malloc_trim`.

    glibc keeps the gaps between what is in use, and 2.36 was seen to reuse few of them: a process that freed
    activations in other threads, at other times and in other sizes than the next ones were made grew by two
    copies of all activations with every block of a model.
    """
    if _TRIM is not None:
        _TRIM(0)


def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc; Windows has no library without a name
        return None


_TRIM = _trim()
