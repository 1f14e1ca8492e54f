from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models import KEY, made
from sparsam.sparse.cost_model import Weight
from sparsam.sparse.dispatch import choose, needed_kernels
from sparsam.sparse.matmul import KERNELS

WEIGHT = Weight(64, 48, 1000, "float32")


@pytest.mark.parametrize("best", KERNELS)
def test_the_cheapest_kernel_is_chosen(best: str) -> None:
    expected = made(KEY, **dict.fromkeys(KERNELS, 10.0) | {best: 0.01}).expect(WEIGHT)
    choice = choose(expected, 4, KERNELS)
    assert choice.kernel == choice.candidates[0].kernel == best
    assert {c.kernel for c in choice.candidates} == set(KERNELS)
    assert choice.reason == "the cheapest by default costs (isa, 2 threads, float32 values)"
    assert choice == choose(expected, 4, KERNELS)


def test_only_kernels_whose_forms_are_held_run() -> None:
    expected = made(dense=1e-3, panels=1.0, bitmask=2.0).expect(WEIGHT)
    choice = choose(expected, 4, ("bitmask", "panels"))
    assert choice.kernel == "panels"
    assert choice.reason.startswith("the cheapest form that is held by default costs")
    assert [c.kernel for c in choice.candidates] == ["panels", "dense", "bitmask", "slots"]
    assert choose(expected, 4, ("bitmask",)).kernel == "bitmask"


@pytest.mark.parametrize(
    ("times", "required", "needed"),
    [
        ([], (), None),
        ([], ("dense",), ("dense",)),
        ([{"bitmask": 1.0, "panels": 2.0}], (), ("bitmask",)),
        ([{"bitmask": 1.0, "panels": 1.2}, {"bitmask": 9.0, "panels": 1.0}], (), ("panels",)),  # one will do
        ([{"bitmask": 1.0, "panels": 1.3}, {"bitmask": 9.0, "panels": 1.0}], (), ("bitmask", "panels")),
        ([{"bitmask": 1.0, "panels": 1.2}], ("panels",), ("panels",)),
        ([{"bitmask": 1.0, "panels": 1.3}], ("panels",), ("panels", "bitmask")),
        ([{"dense": 1.0}, {"bitmask": 1.0}, {"panels": 1.0}, {"slots": 1.0}], (), KERNELS),
        ([{"dense": 1.0, "panels": 1.0}, {"panels": 1.1, "dense": 1.0}], (), ("dense",)),
    ],
)
def test_needed_kernels(times: Any, required: Any, needed: Any) -> None:
    found = needed_kernels(times, required)
    assert found == needed if needed else len(found) == 1


def test_at_most_so_many_kernels() -> None:
    times = [{"dense": 1.0, "panels": 9.0, "bitmask": 2.0}, {"dense": 9.0, "panels": 1.0, "bitmask": 2.0}]
    assert needed_kernels(times) == ("dense", "panels")
    assert needed_kernels(times, most=1) == ("bitmask",)
    assert needed_kernels(times, ["bitmask"], most=0) == ("bitmask",)
    assert needed_kernels(times, ["bitmask"], most=1) in {("bitmask", "dense"), ("bitmask", "panels")}


TIMES = st.lists(st.floats(0.1, 10), min_size=len(KERNELS), max_size=len(KERNELS))  # of one batch


@given(st.lists(TIMES, min_size=1, max_size=5))
def test_needed_kernels_are_few_and_fast(numbers: list[list[float]]) -> None:
    times = [dict(zip(KERNELS, row, strict=True)) for row in numbers]

    def fast(kernels: tuple[str, ...]) -> bool:
        return all(min(t[k] for k in kernels) <= 1.25 * min(t.values()) for t in times)

    found = needed_kernels(times)
    assert fast(found)
    fewer = itertools.combinations(KERNELS, len(found) - 1)
    assert not any(fast(kernels) for kernels in fewer if kernels)
    assert math.isfinite(sum(min(t[k] for k in found) for t in times))
