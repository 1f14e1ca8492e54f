"""Measures the costs of products, on request: `sparsam calibrate`, and benchmarks/fit_costs.py.

Every kind of product is timed on matrices of different shapes and densities, and the coefficients of the cost
model are fitted: least squares of the relative error among coefficients of at least 0.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import ml_dtypes  # noqa: F401 - makes NumPy know "bfloat16"
import numpy as np
from numpy.typing import NDArray

from sparsam import _core
from sparsam.checkpoint.atomic import publish
from sparsam.sparse import cost_model
from sparsam.sparse.cost_model import BATCHES, DTYPES, KINDS, Costs, Key, Weight, cache_file, features

__all__ = [
    "Measured",
    "calibrate",
    "fastest",
    "measure_dense",
    "measure_kernels",
    "numpy_product",
    "store",
    "wait_for_idle_threads",
]

WARM_UP = 0.01  # seconds; our own threads, and PyTorch's, wait actively for 1 to 5 ms
SPINNING = 0.25
"""Seconds for which the threads of a BLAS may wait actively after a product: OpenBLAS's for 2^28 ticks of the
time stamp counter, 0.1 s at 2.6 GHz, those of Intel's OpenMP for 0.2 s. On two processors our own threads may
then share one of them, and each product takes some time slices: 8 ms were seen instead of 0.8."""

DenseProduct = Callable[[NDArray[np.float32], NDArray[np.float32]], Callable[[], object]]
"""(w, x) -> a function that computes x W^T."""

# ((out, in), largest batch): large matrices are measured with small batches, for which memory is the limit.
SHAPES = (
    ((64, 64), 512),
    ((384, 384), 512),
    ((768, 768), 512),
    ((1536, 384), 512),
    ((384, 1536), 512),
    ((3072, 768), 512),
    ((768, 3072), 128),
    ((4096, 4096), 16),
)
_DENSITIES = (0.5, 0.25, 0.1, 0.05)
# From this many weights on, three copies take turns, so that caches are as cold as in a model.
_COLD = 1 << 22
_TRUSTED = 0.5  # a fit with a larger median relative error was disturbed by other work, and is not kept


@dataclass(frozen=True)
class Measured:
    """Fitted costs.

    Attributes:
        costs: The coefficients.
        error: The median relative error of the fit where it was measured.
        stored: Whether they were written to the cache directory.
    """

    costs: Costs
    error: float
    stored: bool = False

    @property
    def is_trusted(self) -> bool:
        """Whether the fit is worth keeping; otherwise something disturbed the measurement."""
        return self.error < _TRUSTED


def calibrate(dtype: str = "float32") -> list[Measured]:
    """Measure the costs of products on this machine, half a minute, and keep them in the cache directory.

    Our kernels are measured, with the active instruction set and number of threads, and NumPy's BLAS.
    `sparsam.torch.layers.dense_costs` measures PyTorch's dense products. Convolutions are not measured. A fit
    that other work on the machine disturbed is not kept; if the cache cannot be written, nothing is stored.

    Args:
        dtype: Of the packed values: "float32", "bfloat16" or "float16".

    Returns:
        The costs of the kernels, and of NumPy's BLAS.

    Raises:
        ValueError: Another dtype.
    """
    if dtype not in DTYPES:
        msg = f"dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}; pass one of them"
        raise ValueError(msg)
    found = [
        measure_kernels(cost_model.kernel_key(dtype)),
        measure_dense(cost_model.dense_key(), numpy_product),
    ]
    return [replace(measured, stored=store(measured)) for measured in found]


def store(measured: Measured) -> bool:
    """Writes costs to the cache directory, completely or not at all; returns whether that worked."""
    if not measured.is_trusted:
        return False
    with suppress(OSError, ValueError, RuntimeError):
        file = cache_file(measured.costs.key)
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink():  # its target is not ours to overwrite
            file.unlink()
        content = measured.costs.to_json()
        publish({file: lambda path: path.write_text(content, encoding="utf-8")})
        cost_model.forget()
        return True
    return False


def measure_kernels(key: Key) -> Measured:
    """Times "bitmask", "panels" and "slots" with the active instruction set and threads, and fits."""
    seen: dict[tuple[str, int], list[tuple[tuple[float, ...], float]]] = {}
    wait_for_idle_threads()
    for shape, largest in SHAPES:
        for kinds, weights in _samples(shape):
            packed = [_core.Packed.pack(w.astype(key.dtype)) for w in _copies(weights)]
            for one in packed:
                one.add("panels")
                one.add("slots")
            for kind, batch in itertools.product(kinds, BATCHES):
                if batch <= min(largest, BATCHES[KINDS[kind] - 1]):
                    kernel = "panels" if kind == "blocks" else kind
                    seconds = _time_kernel(kernel, packed, batch)
                    seen.setdefault((kind, batch), []).append((features(kind, Weight.of(packed[0])), seconds))
    return _fit_all(key, seen)


def measure_dense(key: Key, product: DenseProduct) -> Measured:
    """Times the dense product of a library, and fits."""
    seen: dict[tuple[str, int], list[tuple[tuple[float, ...], float]]] = {}
    for shape, largest in SHAPES:
        weights = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        for batch in BATCHES:
            if batch <= largest:
                x = np.ones((batch, shape[1]), np.float32)
                runs = [product(w, x) for w in _copies(weights)]
                warm_up = WARM_UP if batch == BATCHES[0] else 0.0
                seconds = fastest(_in_turn(runs), warm_up=warm_up, seconds=4e-3)
                what = features("dense", Weight(*shape, nnz=0, dtype=key.dtype))
                seen.setdefault(("dense", batch), []).append((what, seconds))
    return _fit_all(key, seen)


def numpy_product(w: NDArray[np.float32], x: NDArray[np.float32]) -> Callable[[], object]:
    """The dense product that SparseMatrix uses."""
    y = np.empty((len(x), len(w)), np.float32)
    return lambda: np.dot(x, w.T, out=y)


def wait_for_idle_threads() -> None:
    """Waits until the threads of other libraries no longer spin, in the way of those to be timed."""
    time.sleep(SPINNING)


def fastest(run: Callable[[], object], *, warm_up: float = WARM_UP, seconds: float = 0.01) -> float:
    """The shortest time of a run: interruptions only lengthen runs, so the shortest is the one to compare.

    Args:
        run: What to time.
        warm_up: Seconds to warm up, at least one run.
        seconds: Stop once at least 3 runs took this long in total, or after 20 runs; after one run if that
            is longer than 0.05 s.
    """
    end = time.perf_counter() + warm_up
    while True:
        run()
        if time.perf_counter() >= end:
            break
    best, end = math.inf, time.perf_counter() + seconds
    for done in range(1, 21):
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end and (done >= 3 or best > 0.05):
            break
    return best


def _samples(shape: tuple[int, int]) -> Iterator[tuple[tuple[str, ...], NDArray[np.float32]]]:
    """Matrices, the same each time, and the kinds of products to time with them."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(shape, dtype=np.float32)
    for density in _DENSITIES:
        draws = rng.random(shape, dtype=np.float32)
        yield ("bitmask", "panels", "slots"), np.where(draws < density, weights, np.float32(0))
        if density < _DENSITIES[0]:
            shared = np.repeat(draws[::4], 4, axis=0) < density
            yield ("blocks",), np.where(shared, weights, np.float32(0))


def _copies(weights: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return [weights.copy() for _ in range(3)] if weights.size >= _COLD else [weights]


def _time_kernel(kernel: str, packed: Sequence[_core.Packed], batch: int) -> float:
    x, y = np.ones((batch, packed[0].cols), np.float32), np.empty((batch, packed[0].rows), np.float32)
    runs = [lambda one=one: one.linear(kernel, x, None, "", y) for one in packed]
    return fastest(_in_turn(runs), warm_up=0.0, seconds=2e-3)


def _in_turn(runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
    turn = itertools.cycle(runs)

    def run() -> None:
        next(turn)()

    return runs[0] if len(runs) == 1 else run


def _fit_all(key: Key, seen: dict[tuple[str, int], list[tuple[tuple[float, ...], float]]]) -> Measured:
    fits: dict[str, list[Any]] = {}
    errors: list[float] = []
    for (kind, _), times in seen.items():
        row, off = _fit(np.array([what for what, _ in times]), np.array([seconds for _, seconds in times]))
        fits.setdefault(kind, []).append(row)
        errors += off
    return Measured(Costs(fits=fits, **asdict(key)), float(np.median(errors)))


def _fit(features: NDArray[Any], seconds: NDArray[Any]) -> tuple[tuple[float, ...], list[float]]:
    """The non-negative coefficients that minimise the squared relative errors, and these errors.

    They are the unconstrained least-squares solution over the features with nonzero coefficients; with so few
    features, all subsets can be tried.
    """
    relative = features / seconds[:, None]
    n = relative.shape[1]
    best, least = np.zeros(n), math.inf
    for used in (list(c) for size in range(1, n + 1) for c in itertools.combinations(range(n), size)):
        if not relative[:, used].any(axis=0).all():
            continue
        found = np.linalg.lstsq(relative[:, used], np.ones(len(relative)), rcond=None)[0]
        error = float(np.square(relative[:, used] @ found - 1).sum())
        if (found >= 0).all() and error < least:
            best, least = np.zeros(n), error
            best[used] = found
    errors = np.abs(relative @ best - 1)
    return tuple(float(f"{value:.4g}") for value in best), [float(error) for error in errors]
