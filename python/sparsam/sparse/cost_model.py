"""What a product costs on this machine: measured once, kept in the user's cache directory, and fitted.

For every kernel and every batch of a grid the time is taken to be

    a + b (rows + cols) + c rows cols + d nnz        with a, b, c, d >= 0

and a, b, c, d are fitted to a few matrices of different shapes and densities, least squares of the relative
error. Between two batches of the grid a product costs at least what it costs at the lower and at most what it
costs at the upper one, and in between it is interpolated; beyond the grid, costs grow in proportion. How far
the fit was off at its own measurements widens that range. Where ranges overlap, or the expected costs of two
kernels lie within 25 %, the calibration cannot tell which is faster, and the matrix itself is timed.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - makes NumPy know "bfloat16"
import numpy as np
from numpy.typing import NDArray

from sparsam import _core
from sparsam.checkpoint.atomic import publish
from sparsam.sparse.matmul import KERNELS, multiply

__all__ = [
    "CostModel",
    "Estimate",
    "Machine",
    "bucket",
    "cache_file",
    "calibrate",
    "candidates",
    "contenders",
    "cpu",
    "fastest",
    "is_off",
]

DTYPES = ("float32", "bfloat16", "float16")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# "bitmask" expands the weights again for every few rows of x: past this batch it can only lose.
BITMASK_BATCHES = 16
CLOSE = 1.25
SETTLE = 0.04  # OpenBLAS's threads wait actively for 2^26 ticks of the time stamp counter, 22 ms at 3 GHz

_SHAPES = ((128, 1024), (768, 768), (64, 64), (768, 192))
_LARGE = (2048, 4096)  # past the inner caches; measured with the small batches, which memory limits
_SECONDS = 5.0  # after which no further shape is begun: the machine is slow, or busy
_BUSY = 0.5  # a fit that is off by more, in the median, is not worth keeping
_DENSITIES = (0.7, 0.3, 0.05)
_KINDS = (*KERNELS, "blocks")  # "blocks": "panels" where aligned groups of four rows share their columns
_VERSION = 1

_lock = threading.RLock()
_known: dict[Machine, CostModel] = {}


class Estimate(NamedTuple):
    """Seconds: what is expected, and the range in which the truth lies if the calibration is right."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True)
class Machine:
    """What costs depend on; the calibration is kept under it."""

    cpu: str
    isa: str
    threads: int
    dtype: str
    sparsam: str
    numpy: str

    def __str__(self) -> str:
        return f"{self.cpu}, {self.isa}, {self.threads} threads, {self.dtype} values"


@dataclass(frozen=True)
class CostModel:
    """The fitted costs.

    Attributes:
        machine: Where they were measured.
        fits: Kind of product -> one row (a, b, c, d) for each of BATCHES.
        errors: Kind of product -> for each of BATCHES, the largest relative error of the fit where it was
            measured.
    """

    machine: Machine
    fits: Mapping[str, tuple[tuple[float, ...], ...]]
    errors: Mapping[str, tuple[float, ...]]

    def estimates(
        self, shape: tuple[int, int], nnz: int, batch: int, *, blocked: bool
    ) -> dict[str, Estimate]:
        """What each kernel that can be of use for that batch costs."""
        return {
            kernel: self._estimate("blocks" if blocked and kernel == "panels" else kernel, shape, nnz, batch)
            for kernel in candidates(batch)
        }

    def _estimate(self, kind: str, shape: tuple[int, int], nnz: int, batch: int) -> Estimate:
        features = _features(shape, nnz)
        rows = self.fits[kind]
        above = min(bisect_left(BATCHES, batch), len(rows) - 1)
        below = max(above - 1, 0) if batch < BATCHES[above] else above
        high, low = (sum(map(float.__mul__, rows[i], features)) for i in (above, below))
        high = max(low, high)
        grown = max(1.0, batch / BATCHES[len(rows) - 1])
        share = (batch - BATCHES[below]) / (BATCHES[above] - BATCHES[below]) if below < above else 0.0
        error = max(self.errors[kind][below], self.errors[kind][above])
        expected = low + share * (high - low)
        return Estimate(low * (1 - error) * grown, expected * grown, high * (1 + error) * grown)


def candidates(batch: int) -> tuple[str, ...]:
    """The kernels that can be of use for a batch."""
    return KERNELS if batch <= BITMASK_BATCHES else tuple(k for k in KERNELS if k != "bitmask")


def contenders(estimates: Mapping[str, Estimate]) -> list[str]:
    """The kernels among which the estimates cannot tell which is fastest, the likeliest first."""
    order = sorted(estimates, key=lambda kernel: estimates[kernel].expected)
    best = estimates[order[0]]
    return [
        k for k in order if estimates[k].expected <= CLOSE * best.expected or estimates[k].low < best.high
    ]


def bucket(batch: int) -> int:
    """The batch, rounded up to four significant bits: products of one bucket cost much the same."""
    step = 1 << max((batch - 1).bit_length() - 4, 0)
    return -(-batch // step) * step


def fastest(run: Callable[[], object], *, settle: float = SETTLE, seconds: float = 0.01) -> float:
    """The shortest time of a run: an interruption only lengthens one, so that is the time to compare.

    Args:
        run: What to time.
        settle: Seconds to warm up, at least once. By default long enough for the threads of another library
            that ran just before to stop spinning, in the way of these.
        seconds: After 3 runs, and this time or 20 runs, it is enough; after one if that is slow.
    """
    end = time.perf_counter() + settle
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


def is_off() -> bool:
    """Whether SPARSAM_CALIBRATION=off: then every matrix is timed, and nothing is measured beforehand.

    Raises:
        ValueError: The variable has another value.
    """
    value = os.environ.get("SPARSAM_CALIBRATION", "")
    if value not in {"", "on", "off"}:
        msg = f"environment variable SPARSAM_CALIBRATION={value!r}: expected on or off"
        raise ValueError(msg)
    return value == "off"


def calibrate(dtype: str = "float32", *, force: bool = False) -> CostModel:
    """The costs of products on this machine, with the active instruction set and number of threads.

    They are measured on first use, in two or three seconds, and kept in `$XDG_CACHE_HOME/sparsam` (by default
    ~/.cache/sparsam), unless other work disturbed the measurement. A cache that is damaged, or cannot be
    written, is as good as none.

    Args:
        dtype: Of the packed values: "float32", "bfloat16" or "float16".
        force: Measure again, for example because the machine was busy.

    Raises:
        ValueError: Another dtype.
    """
    if dtype not in DTYPES:
        msg = f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}"
        raise ValueError(msg)
    machine = Machine(
        cpu(), _core.active_isa(), _core.num_threads(), dtype, _core.__version__, np.__version__
    )
    with _lock:
        found = None if force else _known.get(machine) or _read(machine)
        if found is None:
            found = _measure(machine)
            if np.median(list(itertools.chain.from_iterable(found.errors.values()))) < _BUSY:
                _write(found)
        _known[machine] = found
        return found


def _features(shape: tuple[int, int], nnz: int) -> tuple[float, ...]:
    rows, cols = map(float, shape)
    return 1.0, rows + cols, rows * cols, float(nnz)


def _measure(machine: Machine) -> CostModel:
    """Times every kind of product on matrices of different shapes and densities, and fits."""
    seen: dict[tuple[str, int], dict[tuple[float, ...], float]] = {}
    end, last = time.perf_counter() + _SECONDS, ""
    # Twice, some time apart, and the shorter time counts: what disturbed the one may not disturb the other.
    for shape in 2 * (*_SHAPES, _LARGE):
        if time.perf_counter() > end and seen:
            break
        batches = BATCHES if shape != _LARGE else BATCHES[: BATCHES.index(BITMASK_BATCHES) + 1]
        for kinds, weights in _samples(shape):
            packed = _core.Packed.pack(weights.astype(machine.dtype))
            packed.add("panels")
            for kind, batch in itertools.product(kinds, batches):
                kernel = "panels" if kind == "blocks" else kind
                if kernel in candidates(batch):
                    seconds = _time(kernel, packed, weights, batch, SETTLE if kind != last else 0.0)
                    last = kind
                    features = _features(shape, 0 if kind == "dense" else packed.nnz)
                    times = seen.setdefault((kind, batch), {})
                    times[features] = min(times.get(features, math.inf), seconds)
    fitted = {key: _fit(np.array([*times]), np.array([*times.values()])) for key, times in seen.items()}
    rows = {kind: [fitted[kind, n] for n in BATCHES if (kind, n) in fitted] for kind in _KINDS}
    return CostModel(
        machine,
        {kind: tuple(fit for fit, _ in row) for kind, row in rows.items()},
        {kind: tuple(error for _, error in row) for kind, row in rows.items()},
    )


def _samples(shape: tuple[int, int]) -> Iterator[tuple[tuple[str, ...], NDArray[np.float32]]]:
    """Matrices, the same each time, and the kinds of products to time with them."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(shape, dtype=np.float32)
    yield ("dense",), weights
    for density in _DENSITIES:
        draws = rng.random(shape, dtype=np.float32)
        yield ("bitmask", "panels"), np.where(draws < density, weights, np.float32(0))
        yield ("blocks",), np.where(np.repeat(draws[::4], 4, axis=0) < density, weights, np.float32(0))


def _time(kernel: str, packed: _core.Packed, dense: NDArray[np.float32], batch: int, settle: float) -> float:
    x, y = np.ones((batch, packed.cols), np.float32), np.empty((batch, packed.rows), np.float32)
    return fastest(lambda: multiply(kernel, packed, dense, x, None, "", y), settle=settle, seconds=1e-3)


def _fit(features: NDArray[Any], seconds: NDArray[Any]) -> tuple[tuple[float, ...], float]:
    """Least squares of the relative error among the nonnegative coefficients, and the largest relative error.

    The best nonnegative coefficients are the unconstrained best of those features whose coefficients are not
    0; with four features all sets can be tried.
    """
    relative = features / seconds[:, None]
    n = relative.shape[1]
    best, least = np.zeros(n), math.inf
    for used in (list(c) for size in range(1, n + 1) for c in itertools.combinations(range(n), size)):
        found = np.linalg.lstsq(relative[:, used], np.ones(len(relative)), rcond=None)[0]
        error = float(np.square(relative[:, used] @ found - 1).sum())
        if (found >= 0).all() and error < least:
            best, least = np.zeros(n), error
            best[used] = found
    return tuple(map(float, best)), float(np.abs(relative @ best - 1).max())


def cpu() -> str:
    """The processor's name, with what tells apart models that share it."""
    fields: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [fields[key] for key in ("cpu family", "model", "stepping") if key in fields]
    return f"{name} ({'/'.join(numbers)})" if numbers else name


def cache_file(machine: Machine) -> Path:
    """Where the calibration of a machine is kept."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    digest = sha256(json.dumps(asdict(machine)).encode()).hexdigest()[:16]
    return folder / "sparsam" / f"costs-{digest}.json"


def _read(machine: Machine) -> CostModel | None:
    """The stored calibration; None where there is none, or nothing that could be one."""
    try:
        stored = json.loads(cache_file(machine).read_bytes())
        if stored["sparsam_costs"] != _VERSION or stored["machine"] != asdict(machine):
            return None
        fits = {kind: tuple(tuple(map(float, row)) for row in stored["fits"][kind]) for kind in _KINDS}
        errors = {kind: tuple(map(float, stored["errors"][kind])) for kind in _KINDS}
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ):
        return None
    costs = CostModel(machine, fits, errors)
    return costs if _valid(costs) else None


def _valid(costs: CostModel) -> bool:
    """Whether there is a fit for every kind of product and batch, of numbers that costs can be."""
    for kind in _KINDS:
        rows, errors = costs.fits[kind], costs.errors[kind]
        length = sum(kind != "bitmask" or n <= BITMASK_BATCHES for n in BATCHES)
        if {len(rows), len(errors)} != {length} or any(len(row) != 4 or not any(row) for row in rows):
            return False
        if not all(0 <= value < math.inf for value in itertools.chain(errors, *rows)):
            return False
    return True


def _write(costs: CostModel) -> None:
    with suppress(OSError, RuntimeError):
        file = cache_file(costs.machine)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"sparsam_costs": _VERSION, **asdict(costs)}, indent=1)
        publish({file: lambda path: path.write_text(content, encoding="utf-8")})
