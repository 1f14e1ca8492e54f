"""How times are taken where other work takes the CPUs away."""

from __future__ import annotations

import time

import pytest

import torch
from sparsam.torch.acceleration.measurement import Budget, Interruptions
from sparsam.torch.acceleration.model_runner import ModelRunner, Seconds, as_examples
from torch import Tensor, nn


class Waits(nn.Module):
    """Is kept waiting, as by other work on its CPU."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.05)
        return x


def test_waiting_takes_no_time_of_the_cpu() -> None:
    model = nn.Sequential(Waits(), Waits())
    with ModelRunner(model, as_examples([torch.ones(1), torch.ones(2)])) as runner:
        whole, parts = runner.seconds(), runner.module_seconds({"first": model[0], "second": model[1]})
    assert whole.wall >= 4 * 0.05
    assert whole.cpu < whole.wall / 2
    assert len(parts) == 2
    for seconds in (found[name] for found in parts for name in ("first", "second")):
        assert seconds.wall >= 0.05
        assert seconds.cpu < seconds.wall / 2


@pytest.mark.parametrize("busy", [False, True])
def test_times_of_a_busy_machine_are_those_of_the_cpu(busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interruptions, "many", lambda _: busy)
    assert Budget(1.0).choose(Seconds(wall=3.0, cpu=2.0)) == (2.0 if busy else 3.0)
