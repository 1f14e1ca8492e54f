"""How often the cost model chooses well: `python benchmarks/grid_matmul.py [--isa ISA] [--threads N]`.

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
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ["SPARSAM_CALIBRATION"] = "off"

import numpy as np

import sparsam
from bench_matmul import COLD, PROBLEMS, SPARSITIES, capped, inputs, pruned
from sparsam import SparseMatrix
from sparsam.sparse.calibration import SETTLE, fastest
from sparsam.sparse.matmul import KERNELS

NEAR = 1.15


class Case(NamedTuple):
    """A matrix, as many copies of it as are taken in turn, and the batch."""

    name: str
    matrix: SparseMatrix
    copies: int
    batch: int


def cases() -> Iterator[Case]:
    for (shape, batch), sparsity in itertools.product(PROBLEMS, SPARSITIES):
        size, n = capped(shape, batch)
        yield Case(f"{size} s={sparsity} n={n}", SparseMatrix.from_dense(pruned(size, sparsity)), 1, n)
    for batch, sparsity in itertools.product((1, 4, 8, 16), SPARSITIES):
        size, n = capped((4096, 4096), batch)
        name = f"cold {size} s={sparsity} n={n}"
        yield Case(name, SparseMatrix.from_dense(pruned(size, sparsity)), COLD, n)
    size, n = capped((3072, 768), 128)
    patterns: list[tuple[Any, float]] = [(sparsam.NM(2, 4), 0.5), (sparsam.Block(4, 1), 0.8)]
    for pattern, sparsity in (*patterns, (sparsam.Block(16, 1), 0.8)):
        w = sparsam.select(pruned(size, 0.0), sparsity, pattern).apply(pruned(size, 0.0))
        yield Case(f"{size} {pattern} n={n}", SparseMatrix.from_dense(w), 1, n)
    for dtype, batch in itertools.product(("bfloat16", "float16"), (1, 128)):
        size, n = capped((4096, 4096), batch)
        w = pruned(size, 0.8)
        yield Case(f"{size} {dtype} n={n}", SparseMatrix.from_dense(w, dtype=np.dtype(dtype)), 1, n)


def kernel_seconds(case: Case) -> dict[str, float]:
    """The shortest time of every kernel; all results agree with the dense one to rounding."""
    x = inputs(case.batch, case.matrix.shape[1])
    dense = case.matrix.to_dense().astype(np.float32)
    bound = 2 * np.finfo(np.float32).eps * dense.shape[1] * (np.abs(x) @ np.abs(dense.T))
    runs: dict[str, list[Any]] = {}
    for kernel in KERNELS:
        copies = [SparseMatrix.from_dense(case.matrix.to_dense()) for _ in range(case.copies)]
        for copy in copies:
            copy.prepare(case.batch, kernel=kernel)
        assert (np.abs(copies[0].linear(x) - x @ dense.T) <= bound).all()
        runs[kernel] = copies
    found = {}
    for kernel, copies in runs.items():
        turn = itertools.cycle(copies)
        once = fastest(lambda turn=turn: next(turn).linear(x), settle=SETTLE, seconds=0.0)  # type: ignore[misc]
        times = []
        for _ in range(int(min(60, max(2 * len(copies), 0.03 / once)))):
            matrix = next(turn)
            start = time.perf_counter()
            matrix.linear(x)
            times.append(time.perf_counter() - start)
        found[kernel] = min(times)
    return found


def report(isa: str, lines: list[tuple[str, str, dict[str, float]]]) -> None:
    slowdowns = [seconds[kernel] / min(seconds.values()) for _, kernel, seconds in lines]
    for (name, kernel, seconds), slowdown in zip(lines, slowdowns, strict=True):
        if slowdown > NEAR:
            times = ", ".join(f"{k} {1e6 * s:,.0f}" for k, s in seconds.items())
            print(f"  {slowdown:.2f}x {name}: {kernel} chosen; us: {times}")  # noqa: T201
    good = sum(slowdown <= NEAR for slowdown in slowdowns)
    mean = float(np.exp(np.mean(np.log(slowdowns))))
    share = f"within 15 % of the fastest on {good} of {len(lines)} problems ({good / len(lines):.0%})"
    print(f"{isa}, {sparsam.num_threads()} threads: {share}; geometric mean {mean:.3f}")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description="How often the cost model chooses well.")
    parser.add_argument("--isa", default=sparsam.isa())
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    sparsam.set_num_threads(arguments.threads)
    with sparsam.use_isa(arguments.isa):
        lines: list[tuple[str, str, dict[str, float]]] = []
        for case in cases():
            lines.append((case.name, case.matrix.explain(case.batch).kernel, kernel_seconds(case)))
        report(arguments.isa, lines)


if __name__ == "__main__":
    main()
