from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from sparsam import allocation, scores
from sparsam._checks import check_sparsity
from sparsam.config import ALLOCATIONS, METHODS, SCHEDULES, PruningConfig, check_growing
from sparsam.patterns import NM, Block, Pattern, Slices, Unstructured
from sparsam.schedules import Cosine, Polynomial, resolve


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (Unstructured(), "unstructured"),
        (NM(2, 4), "2:4"),
        (Block(4, 1), "block 4x1"),
        (Slices(0), "slices axis 0"),
        (Slices(-1, size=64), "slices axis -1 size 64"),
    ],
)
def test_patterns_say_what_they_are(pattern: Pattern, text: str) -> None:
    assert str(pattern) == text


@pytest.mark.parametrize(
    ("n", "m", "sparsity"), [(2, 4, 0.5), (1, 4, 0.75), (4, 4, 0.0), (4, 8, 0.5), (3, 4, 0.25)]
)
def test_nm_keeps_n_of_m(n: int, m: int, sparsity: float) -> None:
    assert NM(n, m).sparsity == sparsity


def test_patterns_take_numpy_integers_and_compare_by_value() -> None:
    pattern = NM(np.int64(2), np.uint8(4))
    assert pattern == NM(2, 4)
    assert hash(pattern) == hash(NM(2, 4))
    assert type(pattern.n) is int


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (NM, (0, 4), "NM: n: expected an integer of at least 1; got 0"),
        (NM, (5, 4), r"NM\(5, 4\): .* must not exceed m"),
        (NM, (2, 257), "NM: m: expected at most 256 weights in a group; got 257"),
        (NM, (2.0, 4), "NM: n: expected an integer; got 2.0"),
        (NM, (True, 4), "NM: n: expected an integer; got True"),
        (Block, (0, 1), "Block: rows: expected an integer of at least 1; got 0"),
        (Block, (1, "4"), "Block: cols: expected an integer; got '4'"),
        (Slices, (None,), "Slices: axis: expected an integer; got None"),
        (Slices, (0, 0), "Slices: size: expected an integer of at least 1; got 0"),
    ],
)
def test_patterns_refuse_nonsense(kind: Any, fields: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(*fields)


def test_defaults() -> None:
    config = PruningConfig()
    assert dataclasses.astuple(config)[:2] == (0.5, "magnitude")
    assert config == PruningConfig(
        0.5, "magnitude", Unstructured(), "layer", "uniform", "one_shot", 1, (), {}
    )
    assert hash(config) == hash(PruningConfig())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("target_sparsity", 1.5, "target_sparsity: expected a number from 0 .* to 1 .*; got 1.5"),
        ("target_sparsity", -0.1, "target_sparsity: expected a number from 0 .* to 1 .*; got -0.1"),
        ("target_sparsity", float("nan"), "target_sparsity: .*; got nan"),
        ("target_sparsity", "0.5", "target_sparsity: .*; got '0.5'"),
        ("target_sparsity", True, "target_sparsity: .*; got True"),
        ("method", "magnitud", "method: expected 'magnitude', 'random', .* or an object .*; got 'magnitud'"),
        ("method", scores.Random, "method: expected .*; got <class"),
        ("method", None, "method: expected .*; got None"),
        ("pattern", "2:4", r"pattern: expected Unstructured\(\), NM\(n, m\), .*; got '2:4'"),
        ("pattern", NM, "pattern: expected .*; got <class"),
        ("scope", "model", "scope: expected 'layer', 'row', 'global'; got 'model'"),
        ("scope", ["layer"], "scope: expected 'layer', 'row', 'global'"),
        ("allocation", "er", "allocation: expected 'uniform', 'erk', 'lamp', 'global', .*; got 'er'"),
        ("allocation", allocation.ERK, "allocation: expected .*; got <class"),
        ("allocation", {3: 0.5}, "allocation: expected names or shell-style patterns as keys; got 3"),
        ("allocation", {"fc": 1.5}, r"allocation\['fc'\]: expected a number from 0 .*; got 1.5"),
        ("schedule", "cubical", "schedule: expected 'one_shot', 'linear', .*; got 'cubical'"),
        ("schedule", 0.5, "schedule: expected .* a list of sparsities, .*; got 0.5"),
        ("schedule", [], "schedule is empty"),
        ("schedule", [0.5, 0.4], "schedule shrinks from 0.5 to 0.4 at iteration 2"),
        ("schedule", [0.5, 1.4], "schedule, iteration 2: expected a number from 0 .*; got 1.4"),
        ("schedule", lambda p: 2 * p, r"schedule\(1.0\): expected a number from 0 .*; got 2.0"),
        ("num_iterations", 0, "num_iterations: expected an integer of at least 1; got 0"),
        ("num_iterations", 2.5, "num_iterations: expected an integer; got 2.5"),
        ("exclude", 3, "exclude: expected shell-style name patterns, .*; got 3"),
        ("exclude", ["head", 3], "exclude: expected shell-style name patterns, .*; got 3"),
        ("overrides", [("fc", 0.5)], "overrides: expected a mapping"),
        ("overrides", {3: 0.5}, "overrides: expected shell-style name patterns as keys; got 3"),
        ("overrides", {"fc": 1.5}, r"overrides\['fc'\]: expected a number from 0 .*; got 1.5"),
        ("overrides", {"fc": "2:4"}, r"overrides\['fc'\]: expected a number from 0 .*; got '2:4'"),
        ("overrides", {"fc": (0.5, "2:4")}, r"overrides\['fc'\]: expected Unstructured\(\), .*; got '2:4'"),
        (
            "overrides",
            {"fc": (0.6, NM(2, 4))},
            r"overrides\['fc'\] is 0.6, but pattern 2:4 has the sparsity 0.5",
        ),
        ("ties", 3, r"ties: expected Tied objects, such as \(Tied\(.*; got 3"),
        ("ties", [{"fc": Slices(0)}], r"ties: expected Tied objects, .*; got \[\{'fc': "),
    ],
)
def test_every_wrong_field_says_what_is_allowed(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scope": "global", "allocation": "erk"}, "expected 'uniform' with scope 'global'.*; got 'erk'"),
        ({"scope": "global", "allocation": {"fc": 0.5}}, "with scope 'global'.*; got {'fc': 0.5}"),
        (
            {"pattern": NM(2, 4), "allocation": "lamp"},
            "pattern 2:4 has one sparsity: expected 'uniform'; got",
        ),
        ({"pattern": Block(2, 2), "scope": "row"}, "scope 'row' .* got pattern block 2x2"),
        ({"pattern": Slices(0), "scope": "row"}, "scope 'row' .* got pattern slices axis 0"),
    ],
)
def test_fields_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningConfig(**changes)


def test_an_allocation_is_kept_as_it_was() -> None:
    given = {"fc*": 0.25}
    config = PruningConfig(allocation=given)
    given["fc*"] = 0.75
    assert config.allocation == {"fc*": 0.25}
    assert config == PruningConfig(allocation={"fc*": 0.25})
    assert hash(config) == hash(PruningConfig(allocation={"fc*": 0.25}))
    assert PruningConfig(pattern=NM(2, 4), scope="row").scope == "row"
    assert {allocation.resolve(name) for name in ALLOCATIONS} == set(allocation._NAMED.values())


def test_nm_brings_its_own_sparsity() -> None:
    assert PruningConfig(pattern=NM(1, 4)).target_sparsity == 0.75
    assert PruningConfig(2 / 3, pattern=NM(1, 3)).target_sparsity == NM(1, 3).sparsity
    with pytest.raises(ValueError, match=r"target_sparsity is 0.8, but pattern 2:4 has the sparsity 0.5"):
        PruningConfig(0.8, pattern=NM(2, 4))


def test_an_explicit_schedule_sets_target_and_length() -> None:
    config = PruningConfig(schedule=[0.1, 0.5, 0.5, 0.7])
    assert config.schedule == (0.1, 0.5, 0.5, 0.7)
    assert (config.target_sparsity, config.num_iterations) == (0.7, 4)
    assert dataclasses.replace(config, scope="global").num_iterations == 4
    assert hash(config) == hash(PruningConfig(schedule=(0.1, 0.5, 0.5, 0.7)))
    with pytest.raises(
        ValueError, match=r"target_sparsity is 0.8, but the end of schedule has the sparsity 0.7"
    ):
        PruningConfig(0.8, schedule=[0.1, 0.7])
    for steps in (1, 3):
        with pytest.raises(ValueError, match=f"num_iterations is {steps}, but schedule lists 2 sparsities"):
            PruningConfig(schedule=[0.1, 0.7], num_iterations=steps)


def test_what_was_not_set_follows_the_other_fields() -> None:
    config = dataclasses.replace(PruningConfig(scope="global"), pattern=NM(1, 4))
    assert (config.target_sparsity, config.scope) == (0.75, "global")
    assert dataclasses.replace(config, pattern=Unstructured()) == PruningConfig(scope="global")
    config = dataclasses.replace(PruningConfig(schedule=[0.1, 0.5, 0.7]), schedule=[0.2, 0.3])
    assert (config.target_sparsity, config.num_iterations) == (0.3, 2)
    config = dataclasses.replace(config, schedule=None)  # type: ignore[arg-type]
    assert (config.target_sparsity, config.schedule, config.num_iterations) == (0.5, "one_shot", 1)
    with pytest.raises(ValueError, match=r"target_sparsity is 0\.5, but pattern 1:4"):
        dataclasses.replace(PruningConfig(0.5), pattern=NM(1, 4))


def test_a_function_sets_the_target() -> None:
    assert PruningConfig(schedule=lambda p: 0.9 * p, num_iterations=3).target_sparsity == 0.9
    with pytest.raises(ValueError, match=r"target_sparsity is 0.5, but schedule\(1.0\) has the sparsity 0.9"):
        PruningConfig(0.5, schedule=lambda p: 0.9 * p)


def test_objects_are_taken_as_they_are() -> None:
    method, schedule = scores.Magnitude(norm=2), Polynomial(2)
    config = PruningConfig(method=method, schedule=schedule)
    assert config.method is method
    assert config.schedule is schedule
    assert PruningConfig(schedule=Cosine()).target_sparsity == 0.5


def test_overrides_are_kept_apart_from_the_callers() -> None:
    given: dict[str, Any] = {"fc*": np.float32(0.25), "conv": Block(2, 2), "head": (0.5, NM(2, 4))}
    config = PruningConfig(overrides=given, exclude="embed*")
    given.clear()
    assert config.overrides == {"fc*": 0.25, "conv": Block(2, 2), "head": (0.5, NM(2, 4))}
    assert type(config.overrides["fc*"]) is float
    assert config.exclude == ("embed*",)
    with pytest.raises(TypeError):
        config.overrides["fc*"] = 9.0  # type: ignore[index]
    assert repr(config.overrides) == repr(dict(config.overrides))


def test_configurations_travel() -> None:
    config = PruningConfig(
        0.9, scores.Random(3), schedule=Polynomial(2), num_iterations=5, overrides={"a": NM(2, 4)}
    )
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.scope = "global"  # type: ignore[misc]


def test_the_vocabulary_is_what_the_stages_know() -> None:
    assert {*scores._NAMED, *scores._NEEDS} == set(METHODS)
    assert len({resolve(name) for name in SCHEDULES}) == len(SCHEDULES)


def test_checks_return_floats() -> None:
    assert check_sparsity("s", 1) == 1.0
    assert type(check_sparsity("s", np.float32(0.5))) is float
    assert check_growing("s", np.array([0.0, 0.5, 1.0])) == (0.0, 0.5, 1.0)
