from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models import KEY, made
from sparsam.sparse.cost_model import Weight
from sparsam.sparse.dispatch import FURTHER_FORM, choose, needed_kernels
from sparsam.sparse.matmul import KERNELS

WEIGHT = Weight(64, 48, 1000, "float32")


@pytest.mark.parametrize("best", KERNELS)
def test_the_cheapest_kernel_is_chosen(best: str) -> None:
    slopes = dict.fromkeys(KERNELS, 10.0) | {best: 0.01}
    choice = choose(WEIGHT, 4, made(KEY, **slopes))
    assert choice.kernel == choice.candidates[0].kernel == best
    assert {c.kernel for c in choice.candidates} == set(KERNELS)
    assert choice.reason == "the cheapest by default costs (isa, 2 threads, float32 values)"
    assert choice == choose(WEIGHT, 4, made(KEY, **slopes))


def test_only_allowed_kernels_run() -> None:
    costs = made(dense=1e-3, panels=1.0, bitmask=2.0)
    choice = choose(WEIGHT, 4, costs, kernels=("bitmask", "panels"))
    assert choice.kernel == "panels"
    assert choice.reason.startswith("the cheapest among bitmask, panels by")
    assert choose(WEIGHT, 4, costs, kernels=("bitmask",)).kernel == "bitmask"


def test_a_further_form_must_win_clearly() -> None:
    for factor, kernel in ((1.0001 / FURTHER_FORM, "bitmask"), (0.9999 / FURTHER_FORM, "panels")):
        costs = made(dense=1e3, panels=factor)
        assert choose(WEIGHT, 4, costs, held=("bitmask",)).kernel == kernel
        assert choose(WEIGHT, 4, costs).kernel == "panels"


def test_nothing_to_multiply() -> None:
    for weight, batch in ((WEIGHT, 0), (replace(WEIGHT, nnz=0), 4)):
        choice = choose(weight, batch, made(), held=("panels",))
        assert (choice.kernel, choice.reason) == ("panels", "since there is nothing to multiply")


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
        ([{"dense": 1.0}, {"bitmask": 1.0}, {"panels": 1.0}], (), KERNELS),
        ([{"dense": 1.0, "panels": 1.0}, {"panels": 1.1, "dense": 1.0}], (), ("dense",)),
    ],
)
def test_needed_kernels(times: Any, required: Any, needed: Any) -> None:
    found = needed_kernels(times, required)
    assert found == needed if needed else len(found) == 1


@given(st.lists(st.lists(st.floats(0.1, 10), min_size=3, max_size=3), min_size=1, max_size=5))
def test_needed_kernels_are_few_and_fast(numbers: list[list[float]]) -> None:
    times = [dict(zip(KERNELS, row, strict=True)) for row in numbers]

    def fast(kernels: tuple[str, ...]) -> bool:
        return all(min(t[k] for k in kernels) <= 1.25 * min(t.values()) for t in times)

    found = needed_kernels(times)
    assert fast(found)
    fewer = itertools.combinations(KERNELS, len(found) - 1)
    assert not any(fast(kernels) for kernels in fewer if kernels)
    assert math.isfinite(sum(min(t[k] for k in found) for t in times))
