"""The measurements of `sparsam bench matmul`: a pruned matrix against dense NumPy and PyTorch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam.bench.timing import median_seconds
from sparsam.checkpoint.exchange.compressed_rows import pattern_head, read_pattern
from sparsam.inputs.checks import expected
from sparsam.runtime import isa, num_threads
from sparsam.selection import select
from sparsam.sparse.calibration import wait_for_idle_threads
from sparsam.sparse.cost_model import cpu
from sparsam.sparse.matmul import KERNELS
from sparsam.sparse.matrix import SparseMatrix

__all__ = [
    "MatmulRow",
    "Problem",
    "break_even",
    "geometric_mean",
    "machine",
    "milliseconds",
    "multiply",
    "random_problems",
    "read_dlmc",
]

COLD_COPIES = 8


@dataclass(frozen=True)
class Problem:
    """A pruned matrix (rows, cols) to measure with, made only when it is measured.

    Attributes:
        name: "random", or the file that the pattern comes from.
        shape: (out, in).
        sparsity: The share of zeros.
        make: Returns the matrix in float32.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    make: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True)
class MatmulRow:
    """One measurement of x W^T for x (batch, cols) and W (rows, cols), float32 in C order; milliseconds.

    Attributes:
        name: "random", or the file that the pattern comes from.
        rows: Of W, the outputs.
        cols: Of W, the inputs.
        batch: Rows of x.
        sparsity: The share of zeros in W.
        kernel: The kernel that `SparseMatrix` chose; "dense" where that is faster.
        linear_ms: `SparseMatrix.linear`.
        sparse_ms: The faster of its sparse kernels; the same number unless `kernel` is "dense".
        numpy_ms: `x @ w.T`.
        torch_ms: `torch.nn.functional.linear(x, w)`; None where torch is not installed.
    """

    name: str
    rows: int
    cols: int
    batch: int
    sparsity: float
    kernel: str
    linear_ms: float
    sparse_ms: float
    numpy_ms: float
    torch_ms: float | None

    @property
    def dense_ms(self) -> float:
        """The faster of the dense products."""
        return self.numpy_ms if self.torch_ms is None else min(self.numpy_ms, self.torch_ms)

    @property
    def speedup(self) -> float:
        """dense_ms / linear_ms."""
        return self.dense_ms / self.linear_ms


def random_problems(shapes: Iterable[tuple[int, int]], sparsities: Sequence[float]) -> list[Problem]:
    """Normal weights of which the smallest are pruned, which leaves a random pattern.

    Raises:
        ValueError: A sparsity is outside [0, 1].
    """
    for sparsity in sparsities:
        if not 0 <= sparsity <= 1:
            raise ValueError(expected("sparsity", sparsity, "a number from 0 to 1", "pass 0.9, say"))

    def problem(shape: tuple[int, int], sparsity: float) -> Problem:
        def make() -> NDArray[np.float32]:
            weights = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
            return select(weights, sparsity).apply(weights)

        return Problem("random", shape, sparsity, make)

    return [problem(*pair) for pair in itertools.product(shapes, sparsities)]


def read_dlmc(folder: Path) -> list[Problem]:
    """The patterns of networks pruned in practice (Deep Learning Matrix Collection), with normal values.

    Args:
        folder: Holds `*.smtx` files, at any depth: a line `rows, columns, nonzeros`, one of row pointers, one
            of column numbers.

    Raises:
        ValueError: There is no such file, or one of them is damaged.
        OSError: One of them cannot be read.
    """
    files = sorted(folder.rglob("*.smtx"))
    if not files:
        msg = f"{folder}: expected a folder with *.smtx files; got none; unpack the matrices there"
        raise ValueError(msg)
    return [_dlmc_problem(file, file.relative_to(folder).with_suffix("").as_posix()) for file in files]


def multiply(
    problems: Iterable[Problem], batches: Sequence[int], *, cold: bool = False
) -> Iterator[MatmulRow]:
    """Measures every problem with every batch; all results are compared.

    Args:
        problems: See `random_problems` and `read_dlmc`.
        batches: Rows of x.
        cold: Use eight copies of each matrix in turn, like the layers of a model, so that large ones are read
            from memory and not from a cache.

    Yields:
        One row at a time.

    Raises:
        RuntimeError: NumPy or PyTorch gives another result.
    """
    for problem in problems:
        weights = problem.make()
        copies = [weights.copy() if i else weights for i in range(COLD_COPIES if cold else 1)]
        matrices = [SparseMatrix.from_dense(copy) for copy in copies]
        for batch in batches:
            yield _row(problem, copies, matrices, batch)


def break_even(rows: Iterable[MatmulRow]) -> dict[tuple[int, int, int], float | None]:
    """For each (rows, cols, batch), the sparsity from which the sparse kernels beat the dense products.

    Between two measurements the difference of the times is interpolated. The lowest sparsity measured if they
    win everywhere; None if they do not win at the highest.
    """
    points: dict[tuple[int, int, int], list[tuple[float, float]]] = {}
    for row in rows:
        gain = row.dense_ms - row.sparse_ms
        points.setdefault((row.rows, row.cols, row.batch), []).append((row.sparsity, gain))
    return {key: _crossing(sorted(found)) for key, found in points.items()}


def machine() -> str:
    """The machine that the times were measured on: processor, instruction set, threads, versions."""
    versions = [f"{name} {version(name)}" for name in ("sparsam", "numpy", "torch") if find_spec(name)]
    return f"{cpu()}, {isa()}, {num_threads()} threads; {', '.join(versions)}"


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def _crossing(points: list[tuple[float, float]]) -> float | None:
    """The sparsity from which the gain stays positive."""
    at: float | None = None
    for i in reversed(range(len(points))):
        sparsity, gain = points[i]
        if gain < 0:
            if at is not None:
                after = points[i + 1][1]
                at = sparsity + (at - sparsity) * -gain / (after - gain)
            return at
        at = sparsity
    return at


def _row(
    problem: Problem, copies: list[NDArray[np.float32]], matrices: list[SparseMatrix], batch: int
) -> MatmulRow:
    x = np.random.default_rng(1).standard_normal((batch, problem.shape[1]), dtype=np.float32)
    reference, bound = _reference_product(x, copies[0])
    for matrix in matrices:
        matrix.prepare(batch)
    explanation = matrices[0].explain(batch)
    _agree("SparseMatrix", matrices[0].linear(x), reference, bound)
    linear = milliseconds([matrix.linear for matrix in matrices], x)
    sparse = linear
    if explanation.kernel == "dense":
        sparse = min(_forced(kernel, copies, x) for kernel in KERNELS if kernel != "dense")
    return MatmulRow(
        problem.name,
        *problem.shape,
        batch,
        problem.sparsity,
        explanation.kernel,
        linear,
        sparse,
        milliseconds([partial(_numpy_linear, w=copy) for copy in copies], x),
        _torch_ms(x, copies, reference, bound),
    )


def _forced(kernel: str, copies: list[NDArray[np.float32]], x: NDArray[np.float32]) -> float:
    matrices = [SparseMatrix.from_dense(copy) for copy in copies]
    for matrix in matrices:
        matrix.prepare(len(x), kernel=kernel)
    return milliseconds([matrix.linear for matrix in matrices], x)


def _torch_ms(
    x: NDArray[np.float32],
    copies: list[NDArray[np.float32]],
    reference: NDArray[np.float32],
    bound: NDArray[np.float32],
) -> float | None:
    if find_spec("torch") is None:
        return None
    import torch  # noqa: PLC0415 - only here, and only where it is installed

    tensors = [torch.from_numpy(copy) for copy in copies]
    linear: Any = torch.nn.functional.linear
    with torch.inference_mode():
        _agree("torch", linear(torch.from_numpy(x), tensors[0]).numpy(), reference, bound)
        return milliseconds([partial(linear, weight=w) for w in tensors], torch.from_numpy(x))


def _numpy_linear(x: NDArray[np.float32], w: NDArray[np.float32]) -> NDArray[np.float32]:
    y: NDArray[np.float32] = x @ w.T
    return y


def milliseconds(products: Sequence[Callable[[Any], object]], x: Any) -> float:
    """The median time of one product, the products taken in turn, once the threads of others are idle."""
    turn = itertools.cycle(products)
    wait_for_idle_threads()
    return 1e3 * median_seconds(lambda: next(turn)(x))


def _reference_product(x: NDArray[np.float32], weights: NDArray[np.float32]) -> tuple[Any, Any]:
    """NumPy's product, and a bound on its difference from one with another order of additions."""
    eps = float(np.finfo(np.float32).eps)
    return x @ weights.T, 2 * eps * max(weights.shape[1], 1) * (np.abs(x) @ np.abs(weights.T))


def _agree(peer: str, result: Any, reference: NDArray[np.float32], bound: NDArray[np.float32]) -> None:
    off = np.abs(result - reference)
    if not (off <= bound).all():
        msg = f"{peer} and NumPy give products that differ by up to {off.max():g}; please report this"
        raise RuntimeError(msg)


def _dlmc_problem(file: Path, name: str) -> Problem:
    (rows, cols), nnz = pattern_head(file)

    def make() -> NDArray[np.float32]:
        pattern = read_pattern(file)
        values = np.random.default_rng(0).standard_normal(nnz, dtype=np.float32)
        weights = np.zeros(pattern.shape, np.float32)
        weights[pattern] = np.where(values == 0, np.float32(1), values)
        return weights

    return Problem(name, (rows, cols), 1 - nnz / max(rows * cols, 1), make)
