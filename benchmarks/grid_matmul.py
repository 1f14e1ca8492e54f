"""How often the cost model chooses well: `python benchmarks/grid_matmul.py [--isa ISA] [--threads N]`.

`--part 1/4` takes every fourth problem only, from the first on, `2/4` from the second on.

For every problem of bench_matmul.py (random patterns warm and cold, patterns, dtypes) all kernels are timed,
results compared, and the one that an unprepared SparseMatrix chooses with the default costs is held against
the fastest. Prints the share of the problems where it takes at most 15 % longer, and those where it does not.
Times are the shortest of many: an interruption only lengthens one.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

os.environ["SPARSAM_CALIBRATION"] = "off"

import numpy as np

import sparsam
from bench_matmul import COLD, PROBLEMS, SPARSITIES, capped, inputs, pruned
from sparsam import SparseMatrix
from sparsam.sparse.calibration import WARM_UP, fastest, wait_for_idle_threads
from sparsam.sparse.matmul import KERNELS

NEAR = 1.15


class Case(NamedTuple):
    """A matrix, as many copies of it as are taken in turn, and the batch."""

    name: str
    matrix: SparseMatrix
    copies: int
    batch: int


def cases() -> Iterator[Callable[[], Case]]:
    """The problems, each made when it is called."""

    def case(name: str, size: tuple[int, int], sparsity: float, n: int, copies: int = 1) -> Case:
        w = pruned(size, sparsity)
        return Case(f"{name}{size} s={sparsity} n={n}", SparseMatrix.from_dense(w), copies, n)

    def pattern_case(size: tuple[int, int], pattern: Any, sparsity: float, n: int) -> Case:
        w = sparsam.select(pruned(size, 0.0), sparsity, pattern).apply(pruned(size, 0.0))
        return Case(f"{size} {pattern} n={n}", SparseMatrix.from_dense(w), 1, n)

    def dtype_case(size: tuple[int, int], dtype: str, n: int) -> Case:
        matrix = SparseMatrix.from_dense(pruned(size, 0.8), dtype=np.dtype(dtype))
        return Case(f"{size} {dtype} n={n}", matrix, 1, n)

    for (shape, batch), sparsity in itertools.product(PROBLEMS, SPARSITIES):
        size, n = capped(shape, batch)
        yield partial(case, "", size, sparsity, n)
    for batch, sparsity in itertools.product((1, 4, 8, 16), SPARSITIES):
        size, n = capped((4096, 4096), batch)
        yield partial(case, "cold ", size, sparsity, n, COLD)
    size, n = capped((3072, 768), 128)
    patterns: list[tuple[Any, float]] = [(sparsam.NM(2, 4), 0.5), (sparsam.Block(4, 1), 0.8)]
    for pattern, sparsity in (*patterns, (sparsam.Block(16, 1), 0.8)):
        yield partial(pattern_case, size, pattern, sparsity, n)
    for dtype, batch in itertools.product(("bfloat16", "float16"), (1, 128)):
        size, n = capped((4096, 4096), batch)
        yield partial(dtype_case, size, dtype, n)


def kernel_seconds(case: Case) -> dict[str, float]:
    """The shortest time of every kernel; all results agree with the dense one to rounding."""
    x = inputs(case.batch, case.matrix.shape[1])
    dense = case.matrix.to_dense().astype(np.float32)
    bound = 2 * np.finfo(np.float32).eps * dense.shape[1] * (np.abs(x) @ np.abs(dense.T))
    runs: dict[str, list[Any]] = {}
    for kernel in sorted(KERNELS, key="dense".__eq__):  # last, since the threads of BLAS spin after it
        copies = [SparseMatrix.from_dense(case.matrix.to_dense()) for _ in range(case.copies)]
        for copy in copies:
            copy.prepare(case.batch, kernel=kernel)
        assert (np.abs(copies[0].linear(x) - x @ dense.T) <= bound).all()
        runs[kernel] = copies
    found = {}
    wait_for_idle_threads()
    for kernel, copies in runs.items():
        turn = itertools.cycle(copies)
        once = fastest(lambda turn=turn: next(turn).linear(x), warm_up=WARM_UP, seconds=0.0)  # type: ignore[misc]
        times = []
        for _ in range(int(min(60, max(2 * len(copies), 0.03 / once)))):
            matrix = next(turn)
            start = time.perf_counter()
            matrix.linear(x)
            times.append(time.perf_counter() - start)
        found[kernel] = min(times)
    return found


def slowdown(case: Case) -> float:
    """How many times as long as the fastest kernel the chosen one takes; tells where that is too much."""
    kernel, seconds = case.matrix.explain(case.batch).kernel, kernel_seconds(case)
    found = seconds[kernel] / min(seconds.values())
    if found > NEAR:
        times = ", ".join(f"{k} {1e6 * s:,.0f}" for k, s in seconds.items())
        print(f"  {found:.2f}x {case.name}: {kernel} chosen; us: {times}", flush=True)  # noqa: T201
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="How often the cost model chooses well.")
    parser.add_argument("--isa", default=sparsam.isa())
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--part", default="1/1")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    sparsam.set_num_threads(arguments.threads)
    with sparsam.use_isa(arguments.isa):
        found = [slowdown(case()) for case in itertools.islice(cases(), part - 1, None, parts)]
    good = sum(one <= NEAR for one in found)
    mean = float(np.exp(np.mean(np.log(found))))
    share = f"within 15 % of the fastest on {good} of {len(found)} problems ({good / len(found):.0%})"
    print(f"{arguments.isa}, {sparsam.num_threads()} threads: {share}; geometric mean {mean:.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
