from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsam.config import ScheduleLike, ScheduleName
from sparsam.schedules import Cosine, Exponential, OneShot, Polynomial, resolve, sample

CURVES = [Polynomial(1), Polynomial(3), Polynomial(0.5), Exponential(), Cosine()]


def points(schedule: ScheduleLike, initial: float = 0.0, final: float = 0.8, n: int = 5) -> list[float]:
    return sample(schedule, num_iterations=n, initial=initial, final=final)


@pytest.mark.parametrize(
    ("schedule", "initial", "final", "expected"),
    [
        ("one_shot", 0.2, 0.8, [0.8, 0.8, 0.8, 0.8, 0.8]),
        ("linear", 0.0, 0.8, [0.0, 0.2, 0.4, 0.6, 0.8]),
        ("linear", 0.2, 0.8, [0.2, 0.35, 0.5, 0.65, 0.8]),
        ("cubic", 0.0, 0.64, [0.0, 0.37, 0.56, 0.63, 0.64]),
        (Polynomial(2), 0.0, 0.8, [0.0, 0.35, 0.6, 0.75, 0.8]),
        ("exponential", 0.0, 0.9375, [0.0, 0.5, 0.75, 0.875, 0.9375]),
        ("exponential", 0.5, 0.96875, [0.5, 0.75, 0.875, 0.9375, 0.96875]),
        ("cosine", 0.0, 1.0, [0.0, 0.5 - math.sqrt(0.125), 0.5, 0.5 + math.sqrt(0.125), 1.0]),
        ([0.1, 0.1, 0.3, 0.7, 0.9], 0.2, 0.8, [0.1, 0.1, 0.3, 0.7, 0.9]),
        (lambda p: 0.4 + 0.4 * p, 0.2, 0.8, [0.4, 0.5, 0.6, 0.7, 0.8]),
    ],
)
def test_formulas(schedule: ScheduleLike, initial: float, final: float, expected: list[float]) -> None:
    assert points(schedule, initial, final) == pytest.approx(expected, abs=1e-12)


def test_agp_differs_from_its_namesakes() -> None:
    assert resolve("cubic").at(0.5, initial=0.0, final=1.0) == 0.875
    assert resolve("cosine").at(0.5, initial=0.0, final=1.0) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["one_shot", "linear", "cubic", "exponential", "cosine"])
def test_one_iteration_goes_to_the_end(name: ScheduleName) -> None:
    assert points(name, 0.2, 0.7, n=1) == [0.7]


@given(
    curve=st.sampled_from(CURVES),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1, exclude_max=True)).map(sorted),
    n=st.integers(2, 40),
)
def test_curves_grow_between_exact_ends(curve: ScheduleLike, ends: list[float], n: int) -> None:
    initial, final = ends
    if final == 1:
        initial, final = 0.0, initial
    values = points(curve, initial, final, n)
    assert len(values) == n
    assert values[0] == initial
    assert values[-1] == final
    assert values == sorted(values)


def test_exponential_prunes_the_same_share_each_time() -> None:
    density = [1 - s for s in points("exponential", 0.2, 0.9, n=6)]
    shares = [after / before for before, after in pairwise(density)]
    assert shares == pytest.approx([shares[0]] * 5)


def test_exponential_cannot_reach_one() -> None:
    with pytest.raises(ValueError, match=r"exponential schedule: .* never reaches a density of 0"):
        points("exponential", 0.2, 1.0)
    with pytest.raises(ValueError, match="exponential"):
        points("exponential", 0.2, 1.0, n=1)
    with pytest.raises(ValueError, match=r"exponential schedule: .* got 1\.0 and 0\.8"):
        points("exponential", 1.0, 0.8)
    assert points("cubic", 0.2, 1.0)[-1] == 1.0


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda p: 1 - p, "schedule, iteration 2: expected at least 1.0, .*; got 0.75"),
        (lambda p: 1.2 * p, "schedule, iteration 5: expected a number from 0 .*; got 1.2"),
        (lambda p: p - 0.5, "schedule, iteration 1: expected a number from 0 .*; got -0.5"),
        (lambda _: math.nan, "schedule, iteration 1: .*; got nan"),
        (lambda _: "half", "schedule, iteration 1: .*; got 'half'"),
        ([0.5, 0.2, 0.6, 0.7, 0.8], "schedule, iteration 2: expected at least 0.5, .*; got 0.2"),
        ([0.5, 0.6], "num_iterations: expected 2, .*; got 5"),
        ([], "schedule: expected at least one sparsity"),
        ("agp", "schedule: expected one of 'one_shot', .*; got 'agp'"),
    ],
)
def test_bad_schedules(schedule: ScheduleLike, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        points(schedule)


def test_ends_in_the_wrong_order_shrink() -> None:
    with pytest.raises(ValueError, match=r"schedule, iteration 2: expected at least 0.5, .*; got 0.2"):
        points("linear", 0.5, 0.2)
    assert points("one_shot", 0.5, 0.2) == [0.2] * 5


@pytest.mark.parametrize("power", [0, -1, math.inf, math.nan, True, "3"])
def test_polynomial_powers(power: float) -> None:
    with pytest.raises(ValueError, match="Polynomial: power: expected a finite number above 0"):
        Polynomial(power)


def test_names_are_objects() -> None:
    assert resolve("linear") == Polynomial(1)
    assert resolve("cubic") == Polynomial()
    assert resolve("one_shot") == OneShot()
    curve = Cosine()
    assert resolve(curve) is curve


def test_a_curve_of_ones_own() -> None:
    class Root:
        def at(self, progress: float, /, *, initial: float, final: float) -> float:
            return initial + (final - initial) * math.sqrt(progress)

    assert points(Root(), 0.0, 0.8) == pytest.approx([0.8 * math.sqrt(i / 4) for i in range(5)])
