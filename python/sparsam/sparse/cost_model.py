"""The costs of products: defaults that ship with the package, or those that `sparsam calibrate` measured.

For every kernel, and every batch of a grid, the time is taken to be

    a + b rows + c cols + d rows cols + e nnz + f (bytes beyond 2 MiB) + g (bytes beyond 32 MiB)

with coefficients of at least 0, where bytes are those of the weight in the form that the kernel reads: what
does not fit the inner or the outer caches costs more. Between two batches of the grid the time is
interpolated; beyond it, times grow in proportion.

Nothing here measures, and nothing is written. A calibration is read once, and a damaged one is ignored. There
are no locks: looking up twice gives the same.
"""

from __future__ import annotations

import json
import os
import platform
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Annotated, ClassVar

from msgspec import Meta

from sparsam import _core
from sparsam.checkpoint.json_state import Document, Positive, read
from sparsam.inputs.checks import expected
from sparsam.inputs.system import processor_fields
from sparsam.sparse.blas import numpy_blas

__all__ = [
    "BATCHES",
    "KERNEL_REVISION",
    "CostModel",
    "Costs",
    "Expectation",
    "Key",
    "Weight",
    "bucket",
    "cache_file",
    "calibrated",
    "cpu",
    "current_costs",
    "dense_key",
    "features",
    "forget",
    "form_bytes",
    "kernel_key",
    "lookup",
    "shipped",
]

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SMALL_BATCHES = 5  # of BATCHES: some kernels read the weights anew for every few rows of x
DTYPES = ("float32", "bfloat16", "float16")
KERNEL_REVISION = 4
"""Increase this when kernels change so much that earlier calibrations would be misleading."""

# Kind of product -> how many of BATCHES have coefficients. "blocks": panels of aligned groups of four rows
# that share their columns.
KINDS = {
    "bitmask": SMALL_BATCHES,
    "slots": SMALL_BATCHES,
    "panels": len(BATCHES),
    "blocks": len(BATCHES),
    "dense": len(BATCHES),
}

_INNER, _OUTER = 2 << 20, 32 << 20
_KNOWN = 64  # costs kept in memory: one for each instruction set, dtype and number of threads in use
_REMEDY = "delete it, or measure again with `sparsam calibrate`"

Coefficient = Annotated[float, Meta(ge=0, le=1)]  # seconds
Curve = tuple[float, ...]
Row = tuple[Coefficient, Coefficient, Coefficient, Coefficient, Coefficient, Coefficient, Coefficient]


@dataclass(frozen=True)
class Weight:
    """The properties of a weight on which the time of a product depends.

    Attributes:
        rows: Outputs.
        cols: Inputs.
        nnz: Stored values.
        dtype: Of the values: "float32", "bfloat16", "float16", "int8" or "int4".
        blocked: Whether aligned groups of four rows share their columns.
    """

    rows: int
    cols: int
    nnz: int
    dtype: str
    blocked: bool = False

    @property
    def rounded(self) -> bool:
        """Whether values are rounded to integers, which have one form for all batches unless told."""
        return self.dtype in {"int8", "int4"}

    @classmethod
    def of(cls, packed: _core.Packed) -> Weight:
        """The properties of a packed weight."""
        return cls(packed.rows, packed.cols, packed.nnz, packed.dtype, packed.blocked > 0)


@dataclass(frozen=True)
class Key:
    """What measured costs depend on: a calibration is used only if all of it is equal.

    Attributes:
        cpu: The processor.
        library: "avx512", "avx2", "neon", "generic" for our kernels; "numpy" or "torch" for dense products.
        version: Of the kernels or of the BLAS.
        dtype: Of the packed values, or of x and the weight in a dense product.
        threads: That the library uses.
    """

    cpu: str
    library: str
    version: str
    dtype: str
    threads: int

    def __str__(self) -> str:
        return f"{self.library}, {self.dtype}, {self.threads} threads"


class Costs(Document, frozen=True):
    """The coefficients of one library for one dtype and number of threads.

    Attributes:
        cpu: As in `Key`, like the next four: where and with what it was measured.
        library: See `Key`.
        version: See `Key`.
        dtype: See `Key`.
        threads: See `Key`.
        fits: Kind of product -> for each of its batches, the coefficients.
    """

    WHAT: ClassVar[str] = "a calibration"
    MARK: ClassVar[str] = "sparsam_costs"
    VERSION: ClassVar[int] = 2

    cpu: str
    library: str
    version: str
    dtype: str
    threads: Positive
    fits: dict[str, list[Row]]

    def __post_init__(self) -> None:
        for kind, rows in self.fits.items():
            if KINDS.get(kind) != len(rows) or not all(map(any, rows)):
                wanted = f"{KINDS.get(kind, 'no')} rows of coefficients, none of them all 0"
                msg = f"fits.{kind}: expected {wanted}; got {len(rows)} rows; calibrate again"
                raise ValueError(msg)
        dense = self.fits.keys() == {"dense"}
        if not dense and self.fits.keys() != KINDS.keys() - {"dense"}:
            msg = (
                f"fits: expected those of {', '.join(KINDS)}; got those of {', '.join(self.fits)}; calibrate "
                "again"
            )
            raise ValueError(msg)

    @property
    def key(self) -> Key:
        """What it was measured for."""
        return Key(self.cpu, self.library, self.version, self.dtype, self.threads)

    def curve(self, kind: str, weight: Weight) -> Curve:
        """The expected seconds of a product, for those of BATCHES for which the kind has coefficients."""
        terms = features(kind, weight)
        return tuple(sum(map(float.__mul__, row, terms)) for row in self.fits[kind])


class Defaults(Document, frozen=True):
    """The costs that ship with the package: python/sparsam/sparse/default_costs.json.

    Attributes:
        costs: For every library, dtype and some numbers of threads.
    """

    WHAT: ClassVar[str] = "the default costs"
    MARK: ClassVar[str] = "sparsam_default_costs"

    costs: list[Costs]


@dataclass(frozen=True)
class Expectation:
    """What products with one weight are expected to take.

    Attributes:
        curves: Kernel -> its seconds for the first of BATCHES.
        settings: The instruction set and number of threads for which this holds.
        source: Where the costs are from.
    """

    curves: Mapping[str, Curve]
    settings: tuple[str, int]
    source: str

    def seconds(self, kernel: str, batch: int) -> float:
        """The expected seconds of one product of a kernel with `batch` rows of x."""
        curve = self.curves[kernel]
        above = min(bisect_left(BATCHES, batch), len(curve) - 1)
        if above == 0 or batch >= BATCHES[above]:
            return curve[above] * max(1.0, batch / BATCHES[above])
        low, high = curve[above - 1 : above + 1]
        return low + (batch - BATCHES[above - 1]) / (BATCHES[above] - BATCHES[above - 1]) * (high - low)

    def times(self, batch: int, kernels: Iterable[str]) -> dict[str, float]:
        """The seconds of some kernels."""
        return {kernel: self.seconds(kernel, batch) for kernel in kernels}


@dataclass(frozen=True)
class CostModel:
    """The costs of every kernel: those of this package, and the dense product of one BLAS.

    Attributes:
        kernels: The costs of "bitmask", "panels" and "slots".
        dense: The costs of "dense".
        source: "default costs" or "calibrated costs": the origin of `kernels`.
    """

    kernels: Costs
    dense: Costs
    source: str

    def expect(self, weight: Weight) -> Expectation:
        """The expected times of products with a weight."""
        panels = "blocks" if weight.blocked else "panels"
        return Expectation(
            {
                "dense": self.dense.curve("dense", weight),
                "bitmask": self.kernels.curve("bitmask", weight),
                "panels": self.kernels.curve(panels, weight),
                "slots": self.kernels.curve("slots", weight),
            },
            (self.kernels.library, self.kernels.threads),
            str(self),
        )

    def __str__(self) -> str:
        kernels = self.kernels
        return f"{self.source} ({kernels.library}, {kernels.threads} threads, {kernels.dtype} values)"


def current_costs(dtype: str, dense: Key | None = None) -> CostModel:
    """The costs under the current settings: the active instruction set, the threads, and a BLAS.

    Args:
        dtype: Of the packed values.
        dense: What multiplies densely; by default NumPy's BLAS.
    """
    kernels, source = lookup(kernel_key(dtype))
    return CostModel(kernels, lookup(dense or dense_key())[0], source)


def kernel_key(dtype: str) -> Key:
    """The key of this package's kernels under the current settings, for packed values of a dtype."""
    version = f"revision {KERNEL_REVISION}"
    return Key(cpu(), _core.active_isa(), version, dtype, _core.num_threads())


def dense_key(
    library: str = "numpy", version: str | None = None, dtype: str = "float32", threads: int | None = None
) -> Key:
    """The key of dense products: of NumPy's BLAS under the current settings, or of the given library."""
    if version is None or threads is None:
        version, threads = numpy_blas()
    return Key(cpu(), library, version, dtype, threads)


def lookup(key: Key) -> tuple[Costs, str]:
    """The costs that were calibrated for the key, else the shipped ones; and which of the two they are."""
    found = _known.get(key)
    if found is None:
        own = None if _is_off() else calibrated(key)
        found = (shipped(key), "default costs") if own is None else (own, "calibrated costs")
        if len(_known) >= _KNOWN:
            _known.clear()
        _known[key] = found
    return found


_known: dict[Key, tuple[Costs, str]] = {}


def forget() -> None:
    """Forgets the calibrations that were read, since a new one was just written."""
    _known.clear()


def shipped(key: Key) -> Costs:
    """The default costs of the library and dtype, measured with the most threads up to those of the key.

    With more threads than were measured, times are scaled down in proportion, except for the fixed cost of a
    call. A dtype that was not measured is taken to cost what float32 does, and an unknown instruction set
    what "generic" does.
    """
    known: dict[tuple[str, str], list[Costs]] = {}
    for costs in _defaults().costs:
        known.setdefault((costs.library, costs.dtype), []).append(costs)
    likest = [(library, dtype) for library in (key.library, "generic") for dtype in (key.dtype, "float32")]
    found = next(known[name] for name in likest if name in known)
    best = max(
        (costs for costs in found if costs.threads <= key.threads),
        key=lambda costs: costs.threads,
        default=min(found, key=lambda costs: costs.threads),
    )
    share = best.threads / key.threads
    fits = {
        kind: [(row[0], *(share * value for value in row[1:])) for row in rows]
        for kind, rows in best.fits.items()
    }
    return Costs(fits=fits, **asdict(key))  # type: ignore[arg-type]


@cache
def _defaults() -> Defaults:
    file = files("sparsam.sparse") / "default_costs.json"
    return Defaults.from_json(file.read_bytes(), "default_costs.json", "install sparsam again")


def calibrated(key: Key) -> Costs | None:
    """The calibration of this machine for the key; None if there is none, or a damaged one."""
    with suppress(OSError, ValueError, RuntimeError):
        file = cache_file(key)
        costs = Costs.from_json(read(file, _REMEDY), str(file), _REMEDY)
        return costs if costs.key == key else None
    return None


def cache_file(key: Key) -> Path:
    """Where the calibration for a key is kept: below $XDG_CACHE_HOME, or ~/.cache."""
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(cache_home) if Path(cache_home).is_absolute() else Path.home() / ".cache"
    digest = sha256(json.dumps(asdict(key)).encode()).hexdigest()[:16]
    return folder / "sparsam" / f"costs-{digest}.json"


def features(kind: str, weight: Weight) -> tuple[float, ...]:
    """The terms that the coefficients multiply, in the order of the module's formula."""
    rows, cols, nnz = map(float, (weight.rows, weight.cols, weight.nnz))
    size = form_bytes(kind, weight)
    if kind == "dense":
        nnz = 0.0
    return 1.0, rows, cols, rows * cols, nnz, max(0.0, size - _INNER), max(0.0, size - _OUTER)


def form_bytes(kind: str, weight: Weight) -> float:
    """The approximate bytes of the form that a kernel reads, without headers and the padding of rows."""
    width = 4 if weight.dtype == "float32" else 2
    if kind == "dense":
        return 4.0 * weight.rows * weight.cols
    if kind == "bitmask":
        return weight.rows * weight.cols / 8 + width * weight.nnz
    if kind == "slots":  # some slots stay empty: about this many with random patterns
        return width * weight.nnz + 0.7 * (weight.nnz + 0.09 * weight.rows * weight.cols)
    return (width + 1.0) * weight.nnz


def bucket(batch: int) -> int:
    """The batch rounded up to four significant bits; batches of one bucket cost about the same."""
    step = 1 << max((batch - 1).bit_length() - 4, 0)
    return -(-batch // step) * step


@cache
def cpu() -> str:
    """The processor's name, with what distinguishes models that share it."""
    fields = processor_fields()
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [fields[key] for key in ("cpu family", "model", "stepping") if key in fields]
    return f"{name} ({'/'.join(numbers)})" if numbers else name


def _is_off() -> bool:
    """Whether SPARSAM_CALIBRATION=off: then the default costs are used, whatever was calibrated.

    Raises:
        ValueError: The variable has another value.
    """
    value = os.environ.get("SPARSAM_CALIBRATION", "")
    if value not in {"", "on", "off"}:
        what = "environment variable SPARSAM_CALIBRATION"
        raise ValueError(expected(what, value, "on or off", "set it to one, or unset it"))
    return value == "off"
