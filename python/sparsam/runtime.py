"""Which instruction set and how many threads the kernels use."""

from __future__ import annotations

import operator
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

from sparsam import _core
from sparsam.inputs.checks import expected
from sparsam.report import Readable


def isa() -> str:
    """The active instruction set: "avx512", "avx2", "neon" or "generic"."""
    return _core.active_isa()


def available_isas() -> list[str]:
    """Instruction sets that were compiled in and that this machine runs, best first."""
    return _core.available_isas()


class use_isa(AbstractContextManager["use_isa"]):
    """Switch the kernels to another instruction set, permanently or for a `with` block.

    All instruction sets select exactly the same weights; this is for measuring and testing. It affects the
    whole process, including all threads.

    Args:
        name: one of `available_isas()`.

    Raises:
        ValueError: the name is unknown, or this machine lacks the instructions.
    """

    def __init__(self, name: str) -> None:
        self._before = _core.active_isa()
        _core.use_isa(name)

    def __enter__(self) -> use_isa:  # noqa: PYI034 - not meant for subclasses
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _core.use_isa(self._before)


def num_threads() -> int:
    """Threads that a call may use.

    By default the smallest of OpenMP's maximum (OMP_NUM_THREADS), the CPUs in the affinity mask and the
    cgroup's CPU quota, all read at the first call. 1 in a forked child: an OpenMP team does not survive a
    fork.
    """
    return _core.num_threads()


def set_num_threads(n: int | None) -> None:
    """Set the number of threads for the calls that follow; None restores the default.

    Raises:
        ValueError: n is not a positive integer.
    """
    try:
        count = 0 if n is None or isinstance(n, bool) else operator.index(n)
    except TypeError:
        count = 0
    if n is not None and not 1 <= count <= 4096:
        raise ValueError(
            expected(
                "n", n, "a number of threads from 1 to 4096, or None for the default", "pass one of them"
            )
        )
    _core.set_num_threads(count)


@dataclass(frozen=True)
class BuildInfo(Readable):
    """What was built and what runs: `print(sparsam.build_info())`."""

    version: str
    compiler: str
    compiled_isas: tuple[str, ...]
    available_isas: tuple[str, ...]
    isa: str
    num_threads: int
    threading: str

    def __str__(self) -> str:
        return "\n".join(
            (
                f"sparsam    {self.version}",
                f"compiler   {self.compiler}",
                f"compiled   {', '.join(self.compiled_isas)}",
                f"detected   {', '.join(self.available_isas)}",
                f"active     {self.isa}",
                f"threads    {self.num_threads}",
                f"runtime    {self.threading}",
            )
        )


def build_info() -> BuildInfo:
    """Version, compiler, instruction sets compiled / detected / active, threads and OpenMP runtime."""
    return BuildInfo(
        version=_core.__version__,
        compiler=_core.compiler,
        compiled_isas=tuple(_core.compiled_isas()),
        available_isas=tuple(_core.available_isas()),
        isa=_core.active_isa(),
        num_threads=_core.num_threads(),
        threading=_core.threading_runtime(),
    )


def _apply_environment() -> None:
    """Obey SPARSAM_ISA, SPARSAM_INT8_ISA and SPARSAM_NUM_THREADS; called once, on import."""
    for variable, use in (("SPARSAM_ISA", _core.use_isa), ("SPARSAM_INT8_ISA", _core.use_int8_isa)):
        name = os.environ.get(variable, "")
        if name:
            try:
                use(name)
            except ValueError as error:
                msg = f"environment variable {variable}: {error}"
                raise ValueError(msg) from None
    threads = os.environ.get("SPARSAM_NUM_THREADS", "")
    if threads:
        try:
            set_num_threads(int(threads))
        except ValueError:
            what = "environment variable SPARSAM_NUM_THREADS"
            raise ValueError(
                expected(what, threads, "a number of threads from 1 to 4096", "set it to one, or unset it")
            ) from None


_apply_environment()
