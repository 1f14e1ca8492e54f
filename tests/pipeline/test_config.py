from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any, cast

import numpy as np
import pytest

from sparsam import allocation, scores
from sparsam.config import (
    ALLOCATIONS,
    METHODS,
    SCHEDULES,
    ConfigFields,
    Override,
    PruningConfig,
    check_growing,
)
from sparsam.inputs.checks import check_sparsity
from sparsam.patterns import NM, Block, Pattern, Slices, Unstructured
from sparsam.schedules import Cosine, Polynomial, resolve
from sparsam.training.iterative import IterativePruner


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
        (NM, (5, 4), "NM: n: expected at most m, which is 4: n of every m stay; got 5"),
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
    assert (config.schedule, config.num_iterations) == (None, None)
    assert config == PruningConfig(0.5, "magnitude", Unstructured(), "layer", "uniform", None, None, (), {})
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
        ("schedule", [], r"schedule: expected at least one sparsity; got \(\)"),
        (
            "schedule",
            [0.5, 0.4],
            "schedule, iteration 2: expected at least 0.5, since what is pruned stays pruned; got 0.4",
        ),
        ("schedule", [0.5, 1.4], "schedule, iteration 2: expected a number from 0 .*; got 1.4"),
        ("schedule", lambda p: 2 * p, r"schedule\(1.0\): expected a number from 0 .*; got 2.0"),
        ("num_iterations", 0, "num_iterations: expected an integer of at least 1; got 0"),
        ("num_iterations", 2.5, "num_iterations: expected an integer; got 2.5"),
        ("exclude", 3, "exclude: expected names or shell-style patterns, .*; got 3"),
        ("exclude", ["head", 3], "exclude: expected names or shell-style patterns, .*; got 3"),
        ("overrides", [("fc", 0.5)], "overrides: expected a mapping"),
        ("overrides", {3: 0.5}, "overrides: expected names or shell-style patterns as keys; got 3"),
        ("overrides", {"fc": 1.5}, r"overrides\['fc'\]: expected a number from 0 .*; got 1.5"),
        ("overrides", {"fc": "2:4"}, r"overrides\['fc'\]: expected a number from 0 .*; got '2:4'"),
        ("overrides", {"fc": (0.5, "2:4")}, r"overrides\['fc'\]: expected Unstructured\(\), .*; got '2:4'"),
        (
            "overrides",
            {"fc": (0.6, NM(2, 4))},
            r"overrides\['fc'\]: expected 0.5, the sparsity of pattern 2:4; got 0.6; leave",
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
            "allocation: expected 'uniform' with pattern 2:4, which has one sparsity; got 'lamp'",
        ),
        (
            {"pattern": Block(2, 2), "scope": "row"},
            "pattern: expected .* with scope 'row', .*; got 'block 2x2'",
        ),
        (
            {"pattern": Slices(0), "scope": "row"},
            "pattern: expected .* with scope 'row', .*; got 'slices axis 0'",
        ),
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
    with pytest.raises(
        ValueError, match=r"target_sparsity: expected 0.5, the sparsity of pattern 2:4; got 0.8; leave one"
    ):
        PruningConfig(0.8, pattern=NM(2, 4))


def test_an_explicit_schedule_sets_target_and_length() -> None:
    config = PruningConfig(schedule=[0.1, 0.5, 0.5, 0.7])
    assert config.schedule == (0.1, 0.5, 0.5, 0.7)
    assert (config.target_sparsity, config.num_iterations) == (0.7, 4)
    assert dataclasses.replace(config, scope="global").num_iterations == 4
    assert hash(config) == hash(PruningConfig(schedule=(0.1, 0.5, 0.5, 0.7)))
    with pytest.raises(ValueError, match=r"target_sparsity: expected 0.7, the end of schedule; got 0.8"):
        PruningConfig(0.8, schedule=[0.1, 0.7])
    for steps in (1, 3):
        with pytest.raises(
            ValueError, match=f"num_iterations: expected 2, the number of .* in schedule; got {steps}"
        ):
            PruningConfig(schedule=[0.1, 0.7], num_iterations=steps)


def test_what_a_new_pattern_or_schedule_implies_comes_with_it() -> None:
    config = PruningConfig(scope="global").with_changes(pattern=NM(1, 4))
    assert (config.target_sparsity, config.scope) == (0.75, "global")
    assert config.with_changes(pattern=Unstructured()) == PruningConfig(0.75, scope="global")
    config = PruningConfig(schedule=[0.1, 0.5, 0.7]).with_changes(schedule=[0.2, 0.3])
    assert (config.target_sparsity, config.num_iterations) == (0.3, 2)
    config = config.with_changes(schedule=lambda p: p / 4)
    assert (config.target_sparsity, config.num_iterations) == (0.25, 2)
    config = config.with_changes(schedule=None, target_sparsity=None, num_iterations=None)
    assert config == PruningConfig()
    assert PruningConfig(0.5).with_changes(pattern=NM(1, 4)).target_sparsity == 0.75
    for change in (PruningConfig.with_changes, dataclasses.replace):
        with pytest.raises(ValueError, match=r"target_sparsity: expected 0\.75, .* pattern 1:4; got 0\.5"):
            change(PruningConfig(), pattern=NM(1, 4), target_sparsity=0.5)
    with pytest.raises(ValueError, match=r"target_sparsity: expected 0\.75, .* pattern 1:4; got 0\.5"):
        dataclasses.replace(PruningConfig(), pattern=NM(1, 4))


ALIKE: list[tuple[Any, Any]] = [
    (PruningConfig(), PruningConfig(0.5)),
    (PruningConfig(), PruningConfig(None, schedule=None, num_iterations=None)),
    (PruningConfig(pattern=NM(1, 4)), PruningConfig(0.75, pattern=NM(1, 4))),
    (PruningConfig(schedule=[0.1, 0.7]), PruningConfig(0.7, schedule=(0.1, 0.7), num_iterations=2)),
    (PruningConfig(overrides={"a": NM(2, 4)}), PruningConfig(overrides={"a": (0.5, NM(2, 4))})),
    (PruningConfig(overrides={"a": 1}), PruningConfig(overrides={"a": Override(1.0)})),
    (PruningConfig(exclude="a", transposed="b"), PruningConfig(exclude=["a"], transposed=("b",))),
]
DIFFERENT: list[tuple[Any, Any]] = [
    (PruningConfig(), PruningConfig(0.5, schedule="one_shot", num_iterations=1)),
    (PruningConfig(), PruningConfig(num_iterations=4)),
    (PruningConfig(), PruningConfig(schedule="linear")),
    (PruningConfig(), PruningConfig(transposed="a")),
    (PruningConfig(overrides={"a": 0.5}), PruningConfig(overrides={"a": (0.5, Unstructured())})),
]


@pytest.mark.parametrize(("a", "b"), ALIKE)
def test_equal_configurations_do_the_same_everywhere(a: PruningConfig, b: PruningConfig) -> None:
    for first, second in (
        (a, b),
        (pickle.loads(pickle.dumps(a)), b),
        (a, copy.deepcopy(b)),
        (dataclasses.replace(a), b),
        (a, b.with_changes()),
        (dataclasses.replace(a, num_iterations=2), dataclasses.replace(b, num_iterations=2)),
        (a.with_changes(method="random"), b.with_changes(method="random")),
    ):
        assert first == second
        assert hash(first) == hash(second)
        assert repr(first) == repr(second)
        schedules = [IterativePruner(config=config).get_schedule() for config in (first, second)]
        assert schedules[0] == schedules[1]
        assert IterativePruner(config=first).config == IterativePruner(config=second).config


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_what_does_not_do_the_same_is_not_equal(a: PruningConfig, b: PruningConfig) -> None:
    assert a != b
    assert repr(a) != repr(b)


def test_the_keyword_arguments_are_the_fields() -> None:
    fields = {field.name for field in dataclasses.fields(PruningConfig)}
    assert set(ConfigFields.__annotations__) == fields


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Override, "Override: expected a sparsity, a pattern or both"),
        (lambda: Override(1.5), "Override: sparsity: expected a number from 0"),
        (lambda: Override(0.5, cast(Any, "2:4")), r"Override: pattern: expected Unstructured\(\)"),
        (lambda: Override(0.6, NM(2, 4)), "Override: sparsity: expected 0.5, .* pattern 2:4; got 0.6"),
    ],
)
def test_overrides_refuse_nonsense(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_override_settles_under_a_configuration() -> None:
    config = PruningConfig(0.75, pattern=Block(2, 2))
    assert Override(0.5).resolved(config.target_sparsity, config.pattern) == (0.5, Block(2, 2))
    assert Override(pattern=Slices(0)).resolved(config.target_sparsity, config.pattern) == (0.75, Slices(0))
    assert Override(pattern=NM(2, 4)).resolved(config.target_sparsity, config.pattern) == (0.5, NM(2, 4))
    assert Override(0.5, Slices(0)).at(0.25) == Override(0.25, Slices(0))
    assert Override(0.5).scaled(0.5) == Override(0.25)
    assert Override(pattern=Slices(0)).scaled(0.5) == Override(pattern=Slices(0))
    assert (
        Override(pattern=NM(2, 4)).scaled(0.5)
        == Override(pattern=NM(2, 4)).at(0.1)
        == Override(0.5, NM(2, 4))
    )


def test_a_function_sets_the_target() -> None:
    assert PruningConfig(schedule=lambda p: 0.9 * p, num_iterations=3).target_sparsity == 0.9
    with pytest.raises(ValueError, match=r"target_sparsity: expected 0.9, schedule\(1.0\); got 0.5"):
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
    assert config.overrides == {
        "fc*": Override(0.25),
        "conv": Override(pattern=Block(2, 2)),
        "head": Override(0.5, NM(2, 4)),
    }
    assert type(config.overrides["fc*"].sparsity) is float
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
