"""Cost models with numbers that a test can work out by hand."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from sparsam.sparse.cost_model import BATCHES, KINDS, CostModel, Costs, Key

KEY = Key("cpu", "isa", "1", "float32", 2)


def made(key: Key = KEY, **slopes: float) -> CostModel:
    """Microseconds per row of x and weight: those stored, and all of them for dense; 1, and 9 for slots."""
    fits: dict[str, list[Any]] = {}
    for kind, batches in KINDS.items():
        slope = 1e-6 * slopes.get(kind, 9.0 if kind == "slots" else 1.0)
        terms = [0.0, 0.0, 0.0, slope, 0.0, 0.0, 0.0] if kind == "dense" else [0.0] * 4 + [slope, 0.0, 0.0]
        fits[kind] = [tuple(n * term for term in terms) for n in BATCHES[:batches]]
    dense = Costs(fits={"dense": fits.pop("dense")}, **asdict(replace(key, library="numpy")))
    return CostModel(Costs(fits=fits, **asdict(key)), dense, "default costs")
