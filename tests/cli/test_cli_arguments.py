"""Patterns, overrides and methods as text."""

from __future__ import annotations

from typing import Any

import pytest

from sparsam.cli.arguments import parse_method, parse_override, parse_pattern
from sparsam.patterns import NM, Block, Slices, Unstructured
from sparsam.scores import Magnitude, Random


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", Unstructured()),
        ("2:4", NM(2, 4)),
        ("16:32", NM(16, 32)),
        ("2:4:channels", NM(2, 4, "channels")),
        ("block:4x1", Block(4, 1)),
        ("slices:0", Slices(0)),
        ("slices:-1", Slices(-1)),
        ("slices:1:64", Slices(1, 64)),
    ],
)
def test_patterns(text: str, pattern: Any) -> None:
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "text",
    ["", "2:", "2:4:8", "2:4:rows", "Block:2x2", "block:2", "block:2x2x2", "slices", "slices:a", "2:4 "],
)
def test_texts_that_are_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match=r"pattern: expected unstructured, N:M .*; got"):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=0.5", ("a", 0.5)),
        ("*.k=1", ("*.k", 1.0)),
        ("a=1e-1", ("a", 0.1)),
        ("a=b=0", ("a=b", 0.0)),
        ("[ab].*=2:4", ("[ab].*", NM(2, 4))),
        ("a=slices:0:8", ("a", Slices(0, 8))),
        ("a=2:4:channels", ("a", NM(2, 4, "channels"))),
        ("layers[0].weight=0.5", ("layers[0].weight", 0.5)),
        ("a=0.75,block:4x1", ("a", (0.75, Block(4, 1)))),
    ],
)
def test_overrides(text: str, value: Any) -> None:
    assert parse_override(text) == value


@pytest.mark.parametrize(
    "text", ["", "a", "=0.5", "a=", "a=x", "a=0.5,0.6", "a=2:4,0.5", "a=0.5,2:4,2:4", "a=1:2:3"]
)
def test_texts_that_are_no_override(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_override(text)


def test_methods() -> None:
    assert parse_method("magnitude", None, None) == "magnitude"
    assert parse_method("magnitude", 2, None) == Magnitude(2)
    assert parse_method("random", None, 3) == Random(3)
    with pytest.raises(ValueError, match="--norm: expected --method magnitude; got random"):
        parse_method("random", 2, None)
    with pytest.raises(ValueError, match="--seed: expected --method random; got magnitude"):
        parse_method("magnitude", None, 0)
