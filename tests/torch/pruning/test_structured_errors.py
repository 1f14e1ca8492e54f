"""`shrink`: what cannot be cut, what is refused, and that the model is then as it was."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
from structured_models import hooks, make, run

import sparsam.torch
import torch
from sparsam import PruningConfig, Slices, Tied
from sparsam.torch import ShrinkReport, head_importance, shrink
from torch import nn


class Interleaved(nn.Module):
    """Queries, keys and values of a head beside each other: heads that are not where they are expected."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], -1, 12).transpose(1, 2).chunk(3, dim=-1)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        found: torch.Tensor = self.out(y.reshape(*y.shape[:2], -1))
        return found


def test_a_model_that_would_compute_something_else_stays_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), Interleaved()).eval()
    before, tensors = copy.deepcopy(model), {n: id(p) for n, p in model.named_parameters()}
    x = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"^3: expected outputs .* heads zeroed; got .*exclude '3'"):
        shrink(model, 0.5, x, seconds=0)
    assert {n: id(p) for n, p in model.named_parameters()} == tensors
    assert torch.equal(run(model, x), run(before, x))
    report = shrink(model, PruningConfig(0.5, exclude="3"), x, seconds=0)
    assert [row.name for row in report.structures] == ["0"]


class Interrupted(nn.Linear):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        if self.out_features < 20:
            raise KeyboardInterrupt
        return super().forward(x)


def test_an_interrupt_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(Interrupted(12, 20), nn.ReLU(), nn.Linear(20, 3)).eval()
    tensors = {n: id(p) for n, p in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        shrink(model, 0.5, torch.randn(2, 12), seconds=0)
    assert {n: id(p) for n, p in model.named_parameters()} == tensors
    assert model[0].out_features == model[2].in_features == 20
    assert hooks(model) == 0


def test_what_cannot_be_cut_says_why() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.grouped = nn.Conv1d(8, 8, 1, groups=2)
            self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 6)
            self.third, self.last = nn.Linear(6, 4), nn.Linear(4, 2)
            self.second.weight = nn.Parameter(torch.randn(6, 6))
            self.twin = nn.Linear(6, 6)
            self.twin.weight = self.second.weight
            self.unused = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.attention(x, x, x, need_weights=False)[0]
            x = self.grouped(x.transpose(1, 2)).transpose(1, 2)
            x = self.twin(self.second(self.first(x)).relu())
            found: torch.Tensor = self.last(self.third(x))
            return found

    torch.manual_seed(0)
    model = Model().eval()
    report = shrink(model, 0.5, torch.randn(2, 5, 8), seconds=0)
    assert [row.name for row in report.structures] == ["third"]
    assert report.left["attention"] == "nn.MultiheadAttention takes as many heads as make up its width"
    assert "groups" in report.left["grouped"]
    assert "shared with another module" in report.left["first"]
    assert "shared with another module" in report.left["second"]
    assert report.left["unused"] == "it does not run with the example inputs"
    assert report.left["last"] == "the model returns them"


def test_torch_pruning_is_needed_for_neurons_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    model, inputs = make("llama")
    with pytest.raises(ImportError, match=r"pip install 'sparsam\[structured\]'"):
        shrink(model, 0.5, inputs, seconds=0)
    assert shrink(model, 0.5, inputs, kinds=("heads",), seconds=0).structures


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            1.0,
            r"0: expected a sparsity that leaves one of the neurons .*, at most 0\.95; got 1 of",
        ),
        (1.5, "target_sparsity"),
        (PruningConfig(pattern=Slices(0)), "config: pattern: expected"),
        (PruningConfig(allocation="erk"), "config: allocation: expected"),
        (PruningConfig(ties=Tied({"0.weight": Slices(0)})), "config: ties: expected"),
        (PruningConfig(scope="row"), "config: scope: expected"),
        (PruningConfig(overrides={"9": 0.5}), "config: overrides: expected names of structures .* got '9'"),
        (PruningConfig(overrides={"0": (0.5, Slices(0))}), r"config: overrides\['0'\]: expected a sparsity"),
        (PruningConfig(exclude="*"), "expected heads or neurons or channels to cut; got none"),
    ],
)
def test_what_makes_no_sense_is_an_error(config: Any, message: str) -> None:
    model, inputs = make("mlp")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        shrink(model, config, inputs, seconds=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_wrong_arguments() -> None:
    model, inputs = make("mlp")
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module; got dict"):
        shrink({}, 0.5, inputs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kinds: expected some of 'heads', 'neurons', 'channels'"):
        shrink(model, 0.5, inputs, kinds=("layers",))
    with pytest.raises(ValueError, match=r"importance: expected names of structures .* got '5'"):
        shrink(model, 0.5, inputs, importance={"5": [1.0]})
    with pytest.raises(ValueError, match=r"importance\['0'\]: expected 20 finite numbers"):
        shrink(model, 0.5, inputs, importance={"0": [1.0]})
    unfit = r"example_inputs: expected what the model can be called with; got \w+: .*; pass the arguments of"
    for given in (torch.randn(2, 13), (), (inputs, inputs), {"y": inputs}):
        with pytest.raises(ValueError, match=unfit):
            shrink(model, 0.5, given)
        with pytest.raises(ValueError, match=unfit):
            head_importance(model, lambda _: 1.0, given)
    nn.init.constant_(model[0].bias, float("nan"))  # a bias does not count
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(ValueError, match=r"tensor '0\.weight': expected scores that are numbers; got NaN"):
        shrink(model, 0.5, inputs)


def test_a_packed_model_is_refused() -> None:
    model, inputs = make("mlp")
    sparsam.torch.pack(model[0])
    with pytest.raises(ValueError, match=r"0\.weight: expected dense weights; got packed ones"):
        shrink(model, 0.5, inputs)


def test_a_report_fits_only_the_model_of_before() -> None:
    model, inputs = make("mlp")
    other, _ = make("cnn")
    report = shrink(model, 0.5, inputs, seconds=0)
    for wrong in (model, other):
        before = {n: p.shape for n, p in wrong.named_parameters()}
        with pytest.raises(ValueError, match="expected"):
            report.apply(wrong)
        assert {n: p.shape for n, p in wrong.named_parameters()} == before
    with pytest.raises(ValueError, match="shrink report: expected what to_json wrote"):
        ShrinkReport.from_json("{}")
