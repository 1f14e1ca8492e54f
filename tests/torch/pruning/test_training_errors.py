"""`Pruner`: what it refuses, before training and during it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from training_cases import (
    made,
    mlp,
    train,
)

import torch
from sparsam import NM, Block, Slices
from sparsam.torch import Pruner, pack
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end": None}, "end: expected the step at which schedule 'cubic' reaches 0.8; got None"),
        ({"begin": -1}, "begin: expected a step of at least 0; got -1"),
        ({"begin": 9, "end": 4}, "end: expected a step of at least begin, 9; got 4"),
        ({"every": 0}, "every: expected an integer of at least 1; got 0"),
        ({"initial_sparsity": 0.9}, "schedule, iteration 2: expected at least 0.9"),
        ({"initial_sparsity": 2}, "initial_sparsity: expected a number from 0"),
        ({"schedule": lambda p: 0.8 * (1 - p)}, "target_sparsity|schedule"),
        ({"pattern": NM(2, 4), "target_sparsity": 0.5, "schedule": "cubic"}, "schedule: expected 'one_shot'"),
        ({"pattern": NM(2, 3), "target_sparsity": None}, "tensor '0.weight'.* multiple of 3"),
        ({"pattern": Slices(0, 3)}, "0.weight"),
        ({"regrow": "grow"}, "regrow: expected 'set', 'rigl'"),
        ({"regrow": "rigl", "pattern": Block(2, 2)}, "pattern: expected Unstructured"),
        ({"regrow": "set", "scope": "row"}, "regrow: expected scope 'layer' or 'global'"),
        ({"method": "wanda"}, "method: expected an object that has its data; got the name 'wanda'"),
        ({"overrides": {"nope": 0.5}}, "overrides: expected names or patterns of tensors; got 'nope'"),
        ({"exclude": ("0.weight", "2")}, "model: expected weights to prune; got none in Sequential"),
    ],
)
def test_errors_come_before_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_errors_while_training() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module; got dict"):
        Pruner({}, target_sparsity=0.5, end=3)  # type: ignore[arg-type]
    model, opt, pruner = made(method="movement")
    opt.zero_grad()
    with pytest.raises(ValueError, match=r"tensor '0.weight': expected a gradient.*before zero_grad"):
        pruner.step()
    model, opt, pruner = made(regrow="rigl", every=1, optimizer=None)
    with pytest.raises(ValueError, match=r"optimizer: expected the optimizer.*pass optimizer="):
        train(model, opt, pruner, range(3))
    model, opt, pruner = made(end=2)
    with torch.no_grad():
        model.get_parameter("0.weight")[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"tensor '0.weight'.*NaN"):
        train(model, opt, pruner, range(3))
    assert pruner.sparsity == 0


def test_states_of_others_are_refused() -> None:
    _, _, pruner = made()
    with pytest.raises(ValueError, match=r"state: expected what state_dict\(\) returned"):
        pruner.load_state_dict({"steps": 3})
    for options, word in (({"end": 31}, "end was 31, now 30"), ({"scope": "row"}, "scope was 'row'")):
        _, _, other = made(**options)
        with pytest.raises(ValueError, match=f"expected that of this pruner; got another's: .*{word}"):
            pruner.load_state_dict(other.state_dict())
    wide = Pruner(nn.Sequential(nn.Linear(20, 33), nn.Linear(33, 8)), target_sparsity=0.8, end=30, every=5)
    with pytest.raises(ValueError, match=r"masks of the tensors of this model; got others for"):
        pruner.load_state_dict(wide.state_dict())


@pytest.mark.parametrize(
    "replace",
    [
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        lambda model: pack(model[0]),
    ],
)
def test_parameters_that_were_replaced_are_noticed(replace: Any) -> None:
    model = mlp()
    pruner = Pruner(model, target_sparsity=0.5, end=0)
    pruner.step()
    layer, weight = model[0], model.get_parameter("0.weight")
    model[0] = nn.Sequential(layer)  # another name, the same Parameter
    pruner.step()
    assert int((weight.detach() == 0).sum()) == 320
    model[0] = layer
    replace(model)
    with pytest.raises(ValueError, match=r"weight '0.weight': expected the Parameter that the pruner"):
        pruner.step()
    assert pruner.steps == 2
