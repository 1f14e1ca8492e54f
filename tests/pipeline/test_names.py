from __future__ import annotations

import glob
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparsam
from sparsam.inputs.names import NamePatterns, closest, matching
from sparsam.patterns import NM, Slices, Tied

TEXT = st.text("ab.*?[]!1", max_size=5)


@given(st.lists(TEXT, max_size=6), TEXT)
def test_the_last_match_is_found(patterns: list[str], name: str) -> None:
    slow = [pattern for pattern in patterns if pattern == name or fnmatchcase(name, pattern)]
    assert NamePatterns(patterns).last(name) == (slow[-1] if slow else None)
    assert NamePatterns(patterns).matches(name) == bool(slow)


@given(TEXT, st.lists(TEXT, max_size=6, unique=True))
def test_matching_keeps_the_order_of_the_names(pattern: str, names: list[str]) -> None:
    slow = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
    assert matching(pattern, names) == slow
    assert matching(pattern, dict.fromkeys(names)) == slow


@given(TEXT, TEXT)
def test_an_escaped_name_matches_itself_alone(name: str, other: str) -> None:
    if glob.escape(name) != other:
        assert NamePatterns([glob.escape(name)]).matches(other) == (name == other)


def test_the_closest_names() -> None:
    assert closest("fc1", ["fc2", "fc1.w"]) == "the closest names are 'fc1.w', 'fc2'"
    assert closest("fc1", []) == "there are no tensors"


NAMES = ("layers[0].weight", "layers[1].weight", "a*b", "what?")


@pytest.mark.parametrize("name", NAMES)
def test_exact_names_match_everywhere(name: str) -> None:
    weights = {own: np.arange(1.0, 17).reshape(4, 4) for own in NAMES}

    def pruned(**changes: Any) -> list[float]:
        masks = sparsam.prune(weights, **changes).masks
        return [masks[own].sparsity if own in masks else 0.0 for own in NAMES]

    at = NAMES.index(name)
    others = [i for i in range(len(NAMES)) if i != at]
    found = pruned(exclude=name)
    assert found[at] == 0
    assert [found[i] for i in others] == [0.5] * 3
    found = pruned(overrides={name: 0.75})
    assert found[at] == 0.75
    assert [found[i] for i in others] == [0.5] * 3
    found = pruned(allocation={name: 0.75})
    assert found[at] == 0.75
    assert sum(found) == 2.0
    assert sparsam.allocate(weights, 0.5, {name: 0.75})[name] == 0.75
    found = pruned(ties=Tied({name: Slices(0)}), overrides={name: 0.75})
    assert found[at] == 0.75
    report = sparsam.sensitivity(weights, lambda _: 1.0, [0.5], groups={"group": name})
    assert [curve.tensors for curve in report.curves] == [((name, 16),)]
    result = sparsam.find_smallest(weights, lambda _: 1.0, 0.5, allocation=lambda total: {name: total})
    assert result.masks[name].sparsity == 1.0
    assert pruned(transposed=name, pattern=NM(2, 4)) == [0.5] * 4


def test_a_pattern_means_more_than_its_own_text() -> None:
    weights = {"fc*": np.ones((2, 2)), "fc1": np.ones((2, 2)), "x": np.ones((2, 2))}
    assert list(sparsam.prune(weights, exclude="fc*").masks) == ["x"]
    assert list(sparsam.prune(weights, exclude=glob.escape("fc*")).masks) == ["fc1", "x"]
