from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from sparsam.config import PruningConfig
from sparsam.patterns import Block, Slices, Tied, as_ties


def test_tied_compares_by_value_and_travels() -> None:
    given: dict[str, Any] = {"fc1.weight": Slices(0), "fc1.bias": Slices(0), "fc2.weight": Slices(1)}
    tied = Tied(given)
    assert tied.members == given
    assert tied == Tied(dict(reversed(given.items())))
    assert hash(tied) == hash(Tied(dict(reversed(given.items()))))
    assert tied not in {Tied(given, scored="fc2.weight"), Tied({**given, "fc2.weight": Slices(0)})}
    assert pickle.loads(pickle.dumps(tied)) == copy.deepcopy(tied) == tied
    given.clear()
    assert list(tied.members) == ["fc1.weight", "fc1.bias", "fc2.weight"]
    with pytest.raises(TypeError):
        tied.members["fc1.bias"] = Slices(1)  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        tied.scored = None  # type: ignore[misc]


def test_scored_is_a_tuple_of_members() -> None:
    members = {"bn.weight": Slices(0), "conv.weight": Slices(0)}
    assert Tied(members).scored is None
    assert Tied(members, scored="bn.weight").scored == ("bn.weight",)
    assert Tied(members, scored=["conv.weight", "bn.weight"]).scored == ("conv.weight", "bn.weight")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (({},), r"Tied: members: expected a mapping from tensor names to Slices; got \{\}"),
        ((["fc1.weight"],), "Tied: members: expected a mapping from tensor names to Slices; got"),
        (({3: Slices(0)},), "Tied: members: expected names of tensors as keys; got 3"),
        (({"a": Block(1, 4)},), r"Tied: member 'a': expected Slices\(axis, size\); got Block"),
        (({"a": 0},), r"Tied: member 'a': expected Slices\(axis, size\); got 0"),
        (({"a": Slices(0)}, ["b"]), r"Tied: scored: expected some of the members \['a'\]; got \['b'\]"),
        (({"a": Slices(0)}, []), r"Tied: scored: expected some of the members \['a'\]; got \[\]"),
    ],
)
def test_tied_refuses_nonsense(fields: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tied(*fields)


def test_ties_of_a_configuration() -> None:
    tied = Tied({"a": Slices(0)})
    assert PruningConfig().ties == ()
    assert PruningConfig(ties=[tied]).ties == (tied,)
    assert as_ties(tied) == (tied,)
    assert hash(PruningConfig(ties=[tied])) == hash(PruningConfig(ties=(tied,)))
    assert pickle.loads(pickle.dumps(PruningConfig(ties=[tied]))) == PruningConfig(ties=[tied])
    assert dataclasses.replace(PruningConfig(ties=[tied]), scope="global").ties == (tied,)
    for wrong in (3, "a", {"a": Slices(0)}, [{"a": Slices(0)}], [Tied]):
        with pytest.raises(ValueError, match="ties: expected Tied objects, such as"):
            PruningConfig(ties=wrong)  # type: ignore[arg-type]
