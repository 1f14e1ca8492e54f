"""Small pruned models, a clock that says what a test wants, and the checks that every model goes through."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Collection
from typing import Any

import sparsam.torch
import torch
from sparsam.torch import restore
from sparsam.torch.acceleration.fusion import Fused
from sparsam.torch.acceleration.installation import LayerSwap
from sparsam.torch.acceleration.measurement import Budget, LayerTime, Times
from sparsam.torch.acceleration.model_runner import ModelRunner, as_examples, difference
from sparsam.torch.acceleration.workflow import accelerate
from sparsam.torch.fused.installation import FusedSwitch
from sparsam.torch.layers.packing import PackedLayer, is_packed, packed_layers
from sparsam.torch.transformers_switch import AttentionSwitch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}


class Clock:
    """Says how long things take, in place of a clock."""

    def __init__(self) -> None:
        self.gains: dict[str, float] = {}
        self.model = 2.0
        self.sdpa = 2.0
        self.fused = 1.0
        self.wider = 1.0

    def layer_times(self, _model: nn.Module, _runner: ModelRunner, swap: LayerSwap, _budget: Budget) -> Times:
        swap.show(swap.layers)
        return Times({name: LayerTime(self.gains.get(name, 2.0), 1.0) for name in swap.layers}, {})

    def model_times(
        self, _runner: ModelRunner, swap: LayerSwap, names: Collection[str], _budget: Budget, **_: Any
    ) -> tuple[float, float]:
        swap.show(names)
        return self.model, 1.0

    def attention_times(
        self, _runner: ModelRunner, switch: AttentionSwitch, _budget: Budget
    ) -> tuple[float, float]:
        switch.show(core=True)
        return self.sdpa, 1.0

    def fused_times(self, _runner: ModelRunner, switch: FusedSwitch, _budget: Budget) -> tuple[float, float]:
        switch.show(fused=True)
        return self.fused, 1.0

    def wider_times(
        self, _runner: ModelRunner, show: Callable[[bool], None], _budget: Budget
    ) -> tuple[float, float]:
        show(True)
        return self.wider, 1.0

    def compare(self, layer: Any, _activation: Any, x: Tensor, _seconds: float) -> tuple[float, float]:
        layer.install()
        layer.layer(x)
        return self.gains.get(str(len(x)), 2.0), 1.0


def pruned(model: nn.Module, sparsity: float = 0.75) -> nn.Module:
    """The model in eval mode, with random zeros in its matrices."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(torch.rand_like(parameter) >= sparsity).add_(0.0)  # no -0.0
    return model.eval()


def mlp(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return pruned(nn.Sequential(nn.Linear(24, 32), activation(), nn.Linear(32, 16), activation()))


def conv_net() -> nn.Module:
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 9, 10),
    ]
    return pruned(nn.Sequential(*layers))


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that must come back: objects by name, values, flags."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {
            name: {key: repr(value) for key, value in vars(module).items() if not key.startswith("_")}
            for name, module in model.named_modules()
        },
        "values": {name: value.numpy().tobytes() for name, value in model.state_dict().items()},
    }


def row(report: sparsam.torch.AccelerationReport, name: str) -> sparsam.torch.LayerRow:
    return next(row for row in report.layers if row.name == name)


def packed(model: nn.Module, name: str) -> PackedLayer:
    """A packed layer of a model."""
    layer = PackedLayer.find(model.get_submodule(name))
    assert layer is not None
    return layer


def count_packed(model: nn.Module) -> int:
    """How many layers of a model are packed."""
    return len(packed_layers(model))


@torch.no_grad()
def check_round_trip(model: nn.Module, *examples: Any) -> sparsam.torch.AccelerationReport:
    """Accelerates; outputs agree, copies and pickles too, and restoring gives back the very same."""
    before = state(model)
    calls = [as_examples(example)[0] for example in examples]
    training = [module.training for module in model.modules()]
    model.eval()
    dense = [model(*call.fresh().args, **call.fresh().kwargs) for call in calls]
    for module, flag in zip(model.modules(), training, strict=True):
        module.training = flag
    report = accelerate(model, list(examples))
    assert {name: m.training for name, m in model.named_modules()} == before["training"]
    copies = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for accelerated in copies:
        assert count_packed(accelerated) == report.swapped
        outputs = [accelerated.eval()(*call.fresh().args, **call.fresh().kwargs) for call in calls]
        assert (difference(outputs, dense) or 0) < 1e-5
        model.train(mode=False)
    for other in copies[1:]:
        assert restore(other) == report.swapped
        assert not any(is_packed(m) or isinstance(m, Fused) for m in other.modules())
        assert {n: v.numpy().tobytes() for n, v in other.state_dict().items()} == before["values"]
    for (_, module), flag in zip(model.named_modules(), training, strict=True):
        module.training = flag
    assert restore(model) == report.swapped
    assert state(model) == before
    assert restore(model) == 0
    return report
