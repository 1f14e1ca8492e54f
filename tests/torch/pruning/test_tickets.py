from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from training_cases import batch, loss_of, mlp

import torch
from sparsam import PruningConfig
from sparsam.torch import find_ticket
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def train(model: nn.Module, hold: Callable[[], None], seed: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for step in range(20):
        optimizer.zero_grad()
        loss_of(model, 1000 * seed + step).backward()
        optimizer.step()
        hold()


def score(model: nn.Module) -> float:
    model.train(False)
    inputs, targets = batch(99, 64)
    with torch.no_grad():
        return -float((model(inputs) - targets).square().mean())


def network() -> nn.Module:
    first, act, last = mlp()
    return nn.Sequential(first, nn.BatchNorm1d(32), act, last)


def test_a_ticket_of_a_model_with_buffers() -> None:
    model = network()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[str] = []
    result = find_ticket(
        model, train, score, rounds=2, fraction=0.5, seeds=(0, 1), callback=lambda what, *_: seen.append(what)
    )
    assert set(result.masks) == {"0.weight", "3.weight"}
    assert result.sparsity == pytest.approx(0.75, abs=1e-2)
    assert len(result.ticket_scores) == 2
    assert set(result.control_scores) == {"reinitialised", "random mask"}
    assert {"dense", "ticket", "reinitialised", "random mask"} == set(seen)
    for name, tensor in model.state_dict().items():
        keep = result.masks[name].to_array() if name in result.masks else np.True_
        np.testing.assert_array_equal(tensor.numpy(), np.where(keep, start[name].numpy(), 0))
        assert (result.trained[name] != 0)[~keep].sum() == 0 if name in result.masks else True
    assert result.trained["1.num_batches_tracked"] == 20
    again = find_ticket(network(), train, score, rounds=2, fraction=0.5, seeds=(0, 1))
    assert again.masks == result.masks
    assert again.ticket_scores == result.ticket_scores
    train(model, lambda: None, 0)


def test_the_model_has_its_initial_weights_after_a_failure() -> None:
    model = network()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail(model: nn.Module, hold: Callable[[], None], seed: int) -> None:
        train(model, hold, seed)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_ticket(model, fail, score)
    with pytest.raises(ValueError, match=r"rewind: expected the model's state_dict; got none of '0.bias'"):
        find_ticket(model, train, score, rewind={"0.weight": start["0.weight"]})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[name]), name


def test_rewinding_and_what_stays_dense() -> None:
    model = network()
    train(model, lambda: None, 5)
    early = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = PruningConfig(exclude=("3.weight",))
    result = find_ticket(model, train, score, rounds=1, rewind=early, config=config, controls=())
    assert list(result.masks) == ["0.weight"]
    keep = result.masks["0.weight"].to_array()
    np.testing.assert_array_equal(result.weights["0.weight"], np.where(keep, early["0.weight"].numpy(), 0))
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module; got dict"):
        find_ticket({}, train, score)  # type: ignore[arg-type]
