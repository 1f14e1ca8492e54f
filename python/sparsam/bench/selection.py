"""The measurements of `sparsam bench select`: exact selection against NumPy and PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sparsam.bench.timing import median_seconds
from sparsam.inputs.checks import expected
from sparsam.masks import Mask
from sparsam.selection import select_many, threshold

__all__ = ["SelectRow", "select"]

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


@dataclass(frozen=True)
class SelectRow:
    """One measurement of selection on `n` normal values; times in milliseconds.

    Attributes:
        n: Number of weights.
        dtype: Their dtype.
        sparsity: The fraction to prune.
        read_ms: NumPy's sum over the same bytes: the cost of reading them.
        threshold_ms: `sparsam.threshold`.
        prune_ms: Threshold, mask, and the pruned weights zeroed in place.
        numpy_ms: `np.partition(np.abs(x), k)`.
        torch_ms: `torch.kthvalue(x.abs(), k)`; None where torch is not installed.
    """

    n: int
    dtype: str
    sparsity: float
    read_ms: float
    threshold_ms: float
    prune_ms: float
    numpy_ms: float
    torch_ms: float | None


def select(n: Sequence[int], dtypes: Sequence[str], sparsities: Sequence[float]) -> Iterator[SelectRow]:
    """Measures exact selection of the smallest weights for every combination of the arguments.

    Args:
        n: Sizes.
        dtypes: "float16", "bfloat16", "float32" or "float64".
        sparsities: Fractions to prune, large enough for at least one weight.

    Yields:
        One row at a time.

    Raises:
        ValueError: An argument is out of range, raised before anything is measured.
        RuntimeError: NumPy or PyTorch gives another result.
    """
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(expected("dtype", dtype, f"one of {', '.join(DTYPES)}", "pass one of them"))
    for size in n:
        for sparsity in sparsities:
            if not (0 < sparsity <= 1 and round(sparsity * size) >= 1):
                wanted = f"at most 1, and enough for one weight of {size}"
                raise ValueError(expected("sparsity", sparsity, wanted, "pass 0.9, say"))
    for size in n:
        values = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
        for dtype in dtypes:
            weights = values.astype(DTYPES[dtype])
            for sparsity in sparsities:
                yield _select_row(weights, dtype, sparsity)


def _select_row(weights: NDArray[Any], dtype: str, sparsity: float) -> SelectRow:
    n = weights.size
    k = round(sparsity * n)
    found = threshold(weights, sparsity)
    _agree("np.partition", _partition(weights, k)[k - 1], found.value)

    pruned = weights.copy()
    pool = {"weights": pruned}

    def prune() -> dict[str, Mask]:
        return select_many(pool, sparsity, out=pool)

    _agree("the mask", prune()["weights"].count, n - k)
    _agree("the pruned array", np.count_nonzero(pruned), n - k)
    return SelectRow(
        n=n,
        dtype=dtype,
        sparsity=sparsity,
        read_ms=1e3 * _read_seconds(weights),
        threshold_ms=1e3 * median_seconds(threshold, weights, sparsity),
        prune_ms=1e3 * median_seconds(prune, before=lambda: np.copyto(pruned, weights)),
        numpy_ms=1e3 * median_seconds(_partition, weights, k),
        torch_ms=_torch_ms(weights, dtype, k, found.value),
    )


def _read_seconds(weights: NDArray[Any]) -> float:
    """Half-precision sums are slow for other reasons than memory: there the bytes are summed as float32."""
    words = weights if weights.itemsize >= 4 else weights[: weights.size // 2 * 2].view(np.float32)
    with np.errstate(all="ignore"):
        return median_seconds(words.sum)


def _partition(weights: NDArray[Any], k: int) -> NDArray[Any]:
    return np.partition(np.abs(weights), k - 1)


def _torch_ms(weights: NDArray[Any], dtype: str, k: int, reference: float) -> float | None:
    if find_spec("torch") is None:
        return None
    import torch  # noqa: PLC0415 - only here, and only where it is installed

    tensor = torch.from_numpy(weights.view(f"i{weights.itemsize}")).view(getattr(torch, dtype))

    def kth_value() -> Any:
        return torch.kthvalue(tensor.abs(), k)

    _agree("torch.kthvalue", kth_value().values.item(), reference)
    return 1e3 * median_seconds(kth_value)


def _agree(peer: str, result: Any, reference: float) -> None:
    if float(result) != reference:
        msg = f"{peer} gives {result}, sparsam {reference}; please report this"
        raise RuntimeError(msg)
