"""Fused modules of real models: chosen where they win, right for any call, saved, copied and undone."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
from fused_models import CASES, counted, fused_names, made, padded
from huggingface_models import MODELS, example
from torch_cases import Clock, pruned, state

import torch
from sparsam.torch import accelerate, load, restore, save
from sparsam.torch.acceleration import fused_modules as choice
from sparsam.torch.fused.fused_forward import FusedForward
from sparsam.torch.fused.installation import unfuse
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("fusing", "one_thread")


@torch.no_grad()
def outputs(model: nn.Module, x: dict[str, Tensor]) -> Any:
    found = model(**x)
    return found if isinstance(found, Tensor) else found[0]


@pytest.mark.parametrize("name", CASES)
def test_chosen_where_they_win_and_undone_by_restore(name: str) -> None:
    model, x, modules = made(name)
    before, wanted = state(model), outputs(model, x)
    report = accelerate(model, x, verbose=False)
    assert report.fused is not None
    assert tuple(sorted(report.fused.modules)) == modules
    assert (report.fused.plain_ms, report.fused.fused_ms, report.fused.swapped) == (2000.0, 1000.0, True)
    several = "module" if len(modules) == 1 else "modules"
    shown = f"fused    {len(modules)} {several} as one call of the core each: the model takes 1,000.00 ms"
    assert shown in str(report)
    assert report.to_dict()["fused"]["modules"] == list(report.fused.modules)
    assert fused_names(model) == modules
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with counted() as calls:
            found = outputs(other, x)
        assert calls.computed == calls.called == len(modules)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        if other is not model:
            restore(other)
            assert fused_names(other) == ()
            torch.testing.assert_close(outputs(other, x), wanted, atol=0, rtol=0)
    restore(model)
    assert torch.equal(outputs(model, x), wanted)
    assert state(model) == before


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_with_rounded_values(name: str, values: Literal["int8", "int4"]) -> None:
    model, x, modules = made(name)
    report = accelerate(model, x, values=values, tolerance=2.0, verbose=False)
    assert report.fused is not None
    assert fused_names(model) == modules
    fused = outputs(model, x)
    unfuse(model)
    difference = (outputs(model, x) - fused).abs().max() / fused.abs().max()
    assert difference < 2e-2


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, x, modules = made(name)
    accelerate(model, x, verbose=False)
    wanted = outputs(model, x)
    save(model, tmp_path)
    loaded = [made(name)[0]]
    load(tmp_path, loaded[0])
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(tmp_path / "folder")
        loaded.append(type(model).from_pretrained(tmp_path / "folder"))
    for one in loaded:
        with counted() as calls:
            assert torch.equal(outputs(one, x), wanted)
        assert calls.computed == len(modules)
        assert fused_names(one) == modules
        restore(one)
        assert fused_names(one) == ()


@pytest.mark.parametrize("name", ["BERT", "DistilBERT", "RoBERTa"])
def test_with_a_mask_that_no_example_had(name: str) -> None:
    model, x, _ = made(name)
    wanted = outputs(model, padded())
    accelerate(model, x, verbose=False)
    with counted() as calls:
        found = outputs(model, padded())
    assert calls.computed == 1
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1, :7], wanted[1, :7], atol=1e-5, rtol=1e-4)


def test_not_chosen_where_they_gain_nothing(clock: Clock) -> None:
    clock.fused = 1.0078125
    model, x, modules = made("BERT")
    report = accelerate(model, x, verbose=False)
    assert report.fused == choice.FusedRow(
        modules, 1007.8125, 1000.0, swapped=False, reason="gain under 1.01"
    )
    assert fused_names(model) == ()
    assert "fused    no module is: gain under 1.01; the model takes 1,000.00 ms with that" in str(report)


def test_not_chosen_where_nothing_is_packed(clock: Clock) -> None:
    clock.model = 0.5
    model, x, modules = made("BERT")
    before = state(model)
    report = accelerate(model, x, verbose=False)
    assert report.fused == choice.FusedRow(
        modules, 2000.0, 1000.0, swapped=False, reason="no layer is packed"
    )
    assert fused_names(model) == ()
    assert state(model) == before


def test_not_chosen_with_other_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = made("own blocks")
    monkeypatch.setattr(choice, "agrees", lambda _: True)
    monkeypatch.setattr(
        FusedForward, "run", lambda _self, args, kwargs: ((args or [*kwargs.values()])[0], None)
    )
    report = accelerate(model, x, verbose=False)
    assert report.fused is not None
    assert not report.fused.swapped
    assert report.fused.reason.startswith("outputs differ by ")
    assert fused_names(model) == ()


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, modules = made("BERT")
    before = state(model)

    def interrupted(*_: Any, **__: Any) -> Any:
        assert fused_names(model) == modules
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsam.torch.acceleration.measurement.model_times", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model, x, verbose=False)
    assert state(model) == before
    assert fused_names(model) == ()


def test_compiled_and_exported() -> None:
    model, x, _ = made("BERT")
    accelerate(model, x, verbose=False)
    wanted = outputs(model, x)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled, x), wanted)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about masks in graphs
        program: Any = torch.export.export(model, (), x)
    torch.testing.assert_close(program.module()(**x)[0], wanted)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration", "MixtralForCausalLM"])
def test_models_of_which_little_is_understood(name: str) -> None:
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = pruned(kind(config()))
    x = example(model)
    wanted = outputs(model, x)
    accelerate(model, x, verbose=False)
    torch.testing.assert_close(outputs(model, x), wanted, atol=1e-5, rtol=1e-4)
    other = {key: value[:1, :-1] for key, value in x.items()}
    found = outputs(model, other)
    restore(model)
    torch.testing.assert_close(found, outputs(model, other), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_hidden_states_and_attentions() -> None:
    model, x, _ = made("BERT")
    accelerate(model, x, verbose=False)
    plain = copy.deepcopy(model)
    unfuse(plain)
    for one in (model, plain):
        one.set_attn_implementation("eager")
    for options in ({}, {"output_hidden_states": True}, {"output_attentions": True}):
        found, wanted = (one(**x, **options).to_tuple() for one in (model, plain))
        assert len(found) == len(wanted)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


class Adapted(nn.Module):
    """A layer with a product of low rank beside it, as LoRA puts it in."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x) + self.up(self.down(x))
        return found


@torch.no_grad()
def test_adapters_that_are_put_in_afterwards() -> None:
    model, x, _ = made("BERT")
    accelerate(model, x, verbose=False)
    before = outputs(model, x)
    for owner in [one for one in model.modules() if hasattr(one, "query")]:
        owner.query, owner.value = Adapted(owner.query), Adapted(owner.value)
    with counted() as calls:
        found = outputs(model.eval(), x)
    assert calls.computed == 0
    unfuse(model)
    assert torch.equal(found, outputs(model, x))
    assert not torch.allclose(found, before)


def test_a_file_that_names_what_cannot_be_fused(tmp_path: Path) -> None:
    model, x, _ = made("own blocks")
    accelerate(model, x, verbose=False)
    wanted = outputs(model, x)
    save(model, tmp_path)
    other = made("own blocks")[0]
    other.blocks[0].doubled = True  # what it then computes at the end is another step
    other.blocks[1].scale = torch.tensor(0.5)
    with pytest.warns(UserWarning, match=r"fused module 'blocks.1': expected one that the core computes"):
        load(tmp_path, other)
    assert fused_names(other) == ("blocks.0",)
    other.blocks[0].doubled = False
    torch.testing.assert_close(outputs(other, x), wanted, atol=1e-5, rtol=1e-4)
    restore(other)


@pytest.mark.parametrize(
    "wrong",
    [
        {"blocks.0": [{"positional": [], "keywords": []}]},
        {"blocks.0": [{"positional": [{"kind": "rows", "shape": [-1, 1 << 40]}], "keywords": []}]},
        {"blocks.0": [{"positional": [{"kind": "steps"}], "keywords": []}]},
        {"blocks.0": "linear"},
    ],
)
def test_a_damaged_file(wrong: Any, tmp_path: Path) -> None:
    model, x, _ = made("own blocks")
    accelerate(model, x, verbose=False)
    save(model, tmp_path)
    file = tmp_path / "sparsam.safetensors"
    known = metadata(tmp_path) | {"modules": json.dumps(wrong)}
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(tensors, file, known)
    with pytest.raises(ValueError, match=r"modules|call|argument"):
        load(tmp_path, made("own blocks")[0])


def test_a_file_that_calls_them_otherwise(tmp_path: Path) -> None:
    model, x, _ = made("own blocks")
    accelerate(model, x, verbose=False)
    wanted = outputs(model, x)
    save(model, tmp_path)
    calls = {
        "blocks.0": [{"positional": [{"kind": "rows", "shape": [-1, -1, 31]}], "keywords": []}],
        "blocks.7": [{"positional": [{"kind": "rows", "shape": [-1, 32]}], "keywords": []}],
    }
    file = tmp_path / "sparsam.safetensors"
    known = metadata(tmp_path) | {"modules": json.dumps(calls)}
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, known)
    other = made("own blocks")[0]
    with pytest.warns(UserWarning, match="fused module 'blocks"):
        load(tmp_path, other)
    assert fused_names(other) == ()
    torch.testing.assert_close(outputs(other, x), wanted, atol=1e-5, rtol=1e-4)


def metadata(folder: Path) -> dict[str, str]:
    with safetensors.safe_open(folder / "sparsam.safetensors", "pt") as handle:
        found: dict[str, str] = handle.metadata()
    return found


def test_what_a_file_says_of_them(tmp_path: Path) -> None:
    model, x, _ = made("own blocks")
    accelerate(model, x, verbose=False)
    save(model, tmp_path)
    found = json.loads(metadata(tmp_path)["modules"])
    assert list(found) == ["blocks.0", "blocks.1"]
    restore(model)
    save(model, tmp_path)
    assert "modules" not in metadata(tmp_path)
