"""`accelerate` chooses the attention of Hugging Face models: the real classes, kept only where it wins."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from huggingface_models import MODELS, VOCABULARY, bert, example, llama, outputs
from torch_cases import Clock, count_packed, pruned, state
from transformers import (
    BertModel,
    BloomConfig,
    BloomModel,
    CLIPConfig,
    CLIPModel,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

import torch
from sparsam.torch import accelerate, load, restore, save
from sparsam.torch.acceleration import attention as choice
from sparsam.torch.layers import attention
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")

Inputs = dict[str, Tensor]


def padded_ids() -> Inputs:
    ids = torch.randint(5, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(ids)
    seen[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": seen}


def vit() -> Any:
    return ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
        )
    )


def many_headed_llama() -> Any:
    config = llama()
    config.num_key_value_heads = config.num_attention_heads = config.hidden_size // 16
    config.head_dim = 16
    return LlamaForCausalLM(config)


def clip() -> Any:
    one = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = {**one, "vocab_size": VOCABULARY, "eos_token_id": 1}
    return CLIPModel(
        CLIPConfig(
            text_config=text, vision_config={**one, "image_size": 16, "patch_size": 4}, projection_dim=16
        )
    )


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Inputs], tuple[str, ...]]] = {
    "BERT": (lambda: BertModel(bert()), padded_ids, ("",)),
    "Llama, as many heads of keys": (many_headed_llama, padded_ids, ("", "model")),
    "ViT": (vit, lambda: {"pixel_values": torch.randn(2, 3, 16, 16)}, ("",)),
    "CLIP": (
        clip,
        lambda: padded_ids() | {"pixel_values": torch.randn(2, 3, 16, 16)},
        ("", "text_model", "vision_model"),
    ),
}


def made(name: str) -> tuple[Any, Inputs, tuple[str, ...]]:
    make, inputs, models = CASES[name]
    return pruned(make()), inputs(), models


def implementation(model: Any) -> str:
    found: str = model.config._attn_implementation
    return found


def metadata(folder: Path) -> dict[str, str]:
    with safetensors.safe_open(folder / "sparsam.safetensors", "pt") as handle:
        found: dict[str, str] = handle.metadata()
    return found


def computed(model: nn.Module, x: Inputs, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a run of the model computes with the core's attention."""
    calls = []
    run = attention._attend

    def counted(*args: Any) -> Tensor:
        calls.append(0)
        return run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "_attend", counted)
        outputs(model, x)
    return len(calls)


@pytest.mark.parametrize("name", CASES)
def test_chosen_where_it_wins_and_undone_by_restore(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, models = made(name)
    before, wanted = state(model), outputs(model, x)
    assert implementation(model) == "sdpa"
    assert computed(model, x, monkeypatch) == 0
    report = accelerate(model, x, verbose=False)
    assert report.attention == choice.AttentionRow(models, 2000.0, 1000.0, swapped=True)
    shown = "attention sparsam_sdpa: the model takes 1,000.00 ms with it, 2,000.00 without"
    assert shown in str(report)
    assert shown in report._repr_html_()
    assert report.to_dict()["attention"]["models"] == list(models)
    assert implementation(model) == "sparsam_sdpa"
    assert computed(model, x, monkeypatch) == 2
    torch.testing.assert_close(outputs(model, x), wanted, atol=1e-5, rtol=1e-4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other, x), outputs(model, x))
        assert computed(other, x, monkeypatch) == 2
        restore(other)
        assert implementation(other) == "sdpa"
        assert computed(other, x, monkeypatch) == 0
    assert computed(model, x, monkeypatch) == 2
    restore(model)
    assert torch.equal(outputs(model, x), wanted)
    assert state(model) == before
    assert not any("_sparsam" in key for module in model.modules() for key in vars(module))


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = made(name)
    accelerate(model, x, verbose=False)
    wanted = outputs(model, x)
    save(model, tmp_path)
    model.save_pretrained(tmp_path / "folder")
    loaded = pruned(CASES[name][0]())
    load(tmp_path, loaded)
    for one in (loaded, type(model).from_pretrained(tmp_path / "folder")):
        assert computed(one, x, monkeypatch) == 2
        assert torch.equal(outputs(one, x), wanted)
        save(one, tmp_path / "again")
        assert metadata(tmp_path / "again") == metadata(tmp_path)
        restore(one)
        assert implementation(one) == "sdpa"


def test_a_part_of_a_model_and_a_model_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = made("Llama, as many heads of keys")
    accelerate(model, x, verbose=False)
    model.model.save_pretrained(tmp_path / "part")
    model.save_pretrained(tmp_path / "whole")
    kind: Any = type(model)
    for one in (
        type(model.model).from_pretrained(tmp_path / "part"),
        type(model.model).from_pretrained(tmp_path / "whole"),
        kind.from_pretrained(tmp_path / "part"),
    ):
        assert computed(one, x, monkeypatch) == 2


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "LlamaForCausalLM"])
def test_models_whose_attention_the_core_does_not_compute(name: str) -> None:
    """T5 adds positions to its scores; this Llama has fewer heads of keys than of queries."""
    kind, config = MODELS[name]
    model = pruned(kind(config()))
    report = accelerate(model, example(model), verbose=False)
    assert count_packed(model) > 3
    assert implementation(model) == "sdpa"
    assert report.attention is not None
    assert (report.attention.swapped, report.attention.core_ms) == (False, None)
    assert "attention sdpa stays: no call that the core computes" in str(report)


def test_models_that_compute_otherwise_are_left_alone() -> None:
    """Eager attention, which the user chose, and Bloom's, which cannot be exchanged."""
    eager: Any = pruned(BertModel(bert()))
    eager.set_attn_implementation("eager")
    bloom = pruned(BloomModel(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2)))
    for model in (eager, bloom, pruned(nn.Sequential(nn.Linear(16, 16)))):
        x = torch.randn(2, 16) if isinstance(model, nn.Sequential) else padded_ids()
        before = None if isinstance(model, nn.Sequential) else implementation(model)
        report = accelerate(model, x, verbose=False)
        assert report.swapped > 0
        assert report.attention is None
        assert report.to_dict()["attention"] is None
        assert "attention" not in str(report).replace("attention.", "")
        assert before is None or implementation(model) == before


def test_not_chosen_where_it_gains_nothing(clock: Clock) -> None:
    clock.sdpa = 1.0078125
    model, x, models = made("BERT")
    report = accelerate(model, x, verbose=False)
    assert report.attention == choice.AttentionRow(
        models, 1007.8125, 1000.0, swapped=False, reason="gain under 1.01"
    )
    assert implementation(model) == "sdpa"
    assert count_packed(model) > 3
    assert restore(model) > 3


def test_not_chosen_where_nothing_is_packed(clock: Clock) -> None:
    model, x, models = made("BERT")
    before = state(model)
    clock.model = 0.5
    report = accelerate(model, x, verbose=False)
    assert report.swapped == 0
    assert report.attention == choice.AttentionRow(
        models, 2000.0, 1000.0, swapped=False, reason="no layer is packed"
    )
    assert implementation(model) == "sdpa"
    assert state(model) == before
    clock.gains = dict.fromkeys((row.name for row in report.layers), 1.0)
    assert accelerate(model, x, verbose=False).attention is None
    assert accelerate(model, verbose=False).attention is None  # nothing is timed without inputs


def test_not_chosen_with_other_outputs_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run = attention._attend
    model, x, _ = made("BERT")
    for wrong, said in (
        (lambda *args: run(*args) + 1, "with sparsam_sdpa, outputs differ by "),
        (lambda *_: 1 / 0, "does not run with sparsam_sdpa: ZeroDivisionError"),
    ):
        monkeypatch.setattr(attention, "_attend", wrong)
        report = accelerate(model, x, verbose=False)
        assert report.attention is not None
        assert not report.attention.swapped
        assert report.attention.reason.startswith(said)
        assert implementation(model) == "sdpa"
        assert restore(model) > 3


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = made("CLIP")
    before = state(model)

    def interrupted(*_: Any, **__: Any) -> Any:
        assert implementation(model) == "sparsam_sdpa"
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsam.torch.acceleration.measurement.model_times", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model, x, verbose=False)
    assert {implementation(one) for one in (model, model.text_model, model.vision_model)} == {"sdpa"}
    assert state(model) == before
    assert not any("_sparsam" in key for module in model.modules() for key in vars(module))


def test_what_the_user_chose_afterwards_is_neither_saved_nor_undone(tmp_path: Path) -> None:
    model, x, _ = made("BERT")
    accelerate(model, x, verbose=False)
    save(model, tmp_path / "core")
    model.set_attn_implementation("eager")
    save(model, tmp_path / "eager")
    restore(model)
    assert implementation(model) == "eager"
    load(tmp_path / "core", model)  # that was told to be eager
    assert implementation(model) == "eager"
    restore(model)
    model.set_attn_implementation("sdpa")
    load(tmp_path / "eager", model)
    assert implementation(model) == "sdpa"
    restore(model)
    model.set_attn_implementation("sparsam_sdpa")
    load(tmp_path / "core", model)
    restore(model)
    assert implementation(model) == "sparsam_sdpa"


def test_a_model_that_cannot_take_it_loads_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, _ = made("BERT")
    accelerate(model, x, verbose=False)
    wanted = outputs(model, x)
    save(model, tmp_path)
    model.save_pretrained(tmp_path / "folder")
    monkeypatch.setattr(BertModel, "_can_set_attn_implementation", classmethod(lambda _: False))
    said = "attention of 'the model': expected a model of transformers that can compute with 'sparsam_sdpa'"
    other = pruned(BertModel(bert()))
    with pytest.warns(UserWarning, match=said):
        load(tmp_path, other)
    with pytest.warns(UserWarning, match=said):
        folder = BertModel.from_pretrained(tmp_path / "folder")
    for one in (other, folder):
        assert implementation(one) == "sdpa"
        assert count_packed(one) == count_packed(model)
        torch.testing.assert_close(outputs(one, x), wanted, atol=1e-5, rtol=1e-4)


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
    assert str(program.graph).count("sparsam.attention") == 2
    torch.testing.assert_close(program.module()(**x)[0], wanted)


def test_with_int8_values() -> None:
    model, x, _ = made("BERT")
    report = accelerate(model, x, values="int8", verbose=False)
    assert report.attention is not None
    assert report.attention.swapped
    assert report.difference is not None
    assert report.difference < 0.1


def test_inside_another_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = BertModel(bert())

        def forward(self, **x: Tensor) -> tuple[Tensor]:
            hidden: Tensor = self.inner(**x).last_hidden_state
            return (hidden.mean(1),)

    model, x = pruned(Encoder()), padded_ids()
    report = accelerate(model, x, verbose=False)
    assert report.attention is not None
    assert report.attention.models == ("inner",)
    save(model, tmp_path)
    loaded = pruned(Encoder())
    load(tmp_path, loaded)
    assert computed(loaded, x, monkeypatch) == 2
    assert torch.equal(outputs(loaded, x), outputs(model, x))
