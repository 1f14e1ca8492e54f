"""Statistics of inputs do not depend on the caller's floating-point mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from float_modes import partly_subnormal, same_in_both, subnormal_only
from sparsam import InputStatistics, Mask, Slices, Tied, shrink


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_and_moments(dtype: str, weighted: bool) -> None:
    x, more = (partly_subnormal((300, 20), dtype, seed) for seed in (0, 1))
    x[:, 3] = subnormal_only((300,)) if dtype == "float32" else 1e-310
    y = partly_subnormal((300, 4), dtype, 2)
    weights = np.linspace(0, 1, 300) if weighted else None

    def collected() -> list[Any]:
        seen = InputStatistics(20, targets=4).update(x, y, weights=weights)
        both = seen + InputStatistics(20, targets=4).update(more, y)
        found: list[Any] = []
        for one in (seen, both):
            centred = one.centred
            found += [one.mean, one.rms, one.sum_squares, one.gram, one.cross, one.target_mean]
            found += [centred.gram, centred.mean, centred.cross]
        return found

    same_in_both(collected)


def test_shrinking_keeps_what_is_not_zero() -> None:
    rows, columns = subnormal_only((8, 6)), subnormal_only((5, 8), 1)
    rows[::2], columns[:, ::2] = 0, 0
    keep = Mask.from_array(rows != 0)
    tied = Tied({"a": Slices(0), "b": Slices(1)})
    expected = same_in_both(lambda: shrink({"a": rows, "b": columns}, {"a": keep}, ties=tied))
    assert expected["a"][0] == (4, 6)
    assert expected["b"][0] == (5, 4)
