"""Every specimen of the zoo: pruned, accelerated, and the same model still."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
from torch_cases import state
from zoo_models import ZOO
from zoo_specimen import TINY, Specimen, exported_file, from_exported, magnitude_pruned, stays

import torch
from sparsam.torch import accelerate, load, restore, save
from sparsam.torch.acceleration.model_runner import as_examples, difference
from torch import nn

pytestmark = [
    pytest.mark.usefixtures("clock", "one_thread"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self.net._flat_weights"),  # exporting an LSTM
]


@torch.no_grad()
def run(model: nn.Module, example: Any) -> Any:
    args, kwargs = as_examples(example)[0].fresh()
    return model(*args, **kwargs)


def same(model: nn.Module, example: Any, wanted: Any) -> bool:
    """Whether the outputs are the same to the last bit."""
    return difference(run(model, example), wanted) == 0


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def copies(model: nn.Module, *, pickled: bool) -> list[nn.Module]:
    """The model again, in all ways in which models are copied."""
    found = [copy.deepcopy(model)]
    if pickled:
        found += [pickle.loads(pickle.dumps(model)), through_file(model)]
    return found


@pytest.mark.parametrize("specimen", ZOO, ids=lambda specimen: specimen.name)
def test_specimen(specimen: Specimen, tmp_path: Any) -> None:
    model, example = specimen.build(TINY)
    dense = run(magnitude_pruned(model), example)
    before = state(model)
    values = {name: value.clone() for name, value in model.state_dict().items()}

    report = accelerate(model, example)
    assert stays(report.layers) == specimen.dense
    assert report.swapped == len(report.layers) - sum(specimen.dense.values()) > 0
    outputs = run(model, example)
    assert float(difference(outputs, dense) or 0) < 1e-5

    if specimen.computed:  # what torch.nn.utils.parametrize computes, PyTorch refuses to pickle
        with pytest.raises(RuntimeError, match="Serialization of parametrized modules is only supported"):
            pickle.dumps(model)
    for other in copies(model, pickled=not specimen.computed):
        assert same(other, example, outputs)
        assert restore(other) == report.swapped
        assert same(other, example, dense)

    found = model.state_dict()
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], value) for name, value in values.items())
    model.load_state_dict(values)
    assert same(model, example, outputs)

    save(model, tmp_path / "saved")
    loaded = specimen.build(TINY)[0].eval()
    assert load(tmp_path / "saved", loaded) == report.swapped
    assert same(loaded, example, outputs)
    assert restore(loaded) == report.swapped
    assert same(loaded, example, dense)

    program = exported_file(model, example)
    assert restore(model) == report.swapped
    assert float(difference(run(from_exported(program), example), outputs) or 0) < 1e-5
    assert state(model) == before
    assert same(model, example, dense)
