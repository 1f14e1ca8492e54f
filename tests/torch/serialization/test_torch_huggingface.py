"""Folders of Hugging Face transformers with packed weights, by the real library."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
from huggingface_models import (
    MODELS,
    NAME,
    accelerated,
    bert,
    example,
    gpt2,
    llama,
    outputs,
    pruned,
    save_bert,
)
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch_cases import count_packed, state
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

import sparsam.torch.huggingface
import torch
from sparsam.torch import PackedTensor, accelerate, pack, restore
from sparsam.torch.acceleration.memory import parameter_bytes
from torch import Tensor

pytestmark = pytest.mark.usefixtures("clock", "one_thread")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Any, dict[str, Tensor]]:
    return save_bert(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_by_transformers(name: str, tmp_path: Path) -> None:
    model, x = accelerated(name)
    wanted, before = outputs(model, x), state(model)["parameters"]
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "sparsam", "version": "accelerated 3"}
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert count_packed(loaded) == count_packed(model)
    assert torch.equal(outputs(loaded, x), wanted)
    assert repr(loaded) == repr(model)
    assert parameter_bytes(loaded) <= parameter_bytes(model)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    loaded.save_pretrained(tmp_path / "again")  # the same folder
    assert (tmp_path / "again" / NAME).stat().st_size == (tmp_path / NAME).stat().st_size
    again = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(outputs(again, x), wanted)
    assert state(model)["parameters"] == before
    assert restore(loaded) == restore(model)
    for one, other in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1]), one[0]


def test_a_restored_model_is_saved_dense(saved: tuple[Path, Any, dict[str, Tensor]]) -> None:
    folder, model, x = saved
    loaded = AutoModel.from_pretrained(folder)
    assert count_packed(loaded) == 12
    for one in (model, BertForMaskedLM.from_pretrained(folder)):
        restore(one)
        assert not hasattr(one, "hf_quantizer")
        assert not hasattr(one.config, "quantization_config")
        one.save_pretrained(folder / "dense")
        assert "quantization_config" not in (folder / "dense" / "config.json").read_text()
        dense = safetensors.torch.load_file(folder / "dense" / NAME)
        assert all(torch.equal(dense[name], one.state_dict()[name]) for name in dense)
        assert not any(name.endswith("_bits") for name in dense)
        assert torch.equal(outputs(BertForMaskedLM.from_pretrained(folder / "dense"), x), outputs(one, x))


def test_parts_and_other_heads(saved: tuple[Path, Any, dict[str, Tensor]]) -> None:
    """A base model from a model with a head, a head on a base model, and a model inside another."""
    folder, model, x = saved
    base = BertModel.from_pretrained(folder, add_pooling_layer=False)
    assert torch.equal(outputs(base, x), outputs(model.bert, x))
    base.save_pretrained(folder / "base")
    headed = BertForMaskedLM.from_pretrained(folder / "base")
    assert torch.equal(outputs(headed.bert, x), outputs(base, x))
    model.bert.save_pretrained(folder / "inner")
    inner = BertModel.from_pretrained(folder / "inner", add_pooling_layer=False)
    assert torch.equal(outputs(inner, x), outputs(base, x))
    assert count_packed(inner) == count_packed(base) == count_packed(headed) == 12


def test_shards(tmp_path: Path) -> None:
    model, x = accelerated("LlamaForCausalLM")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert count_packed(loaded) == count_packed(model)
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    with safetensors.safe_open(shards[1], "pt") as handle:
        metadata = handle.metadata()
    safetensors.torch.save_file(
        safetensors.torch.load_file(shards[1]), shards[1], metadata | {"layers": "{}"}
    )
    with pytest.raises(
        ValueError, match=r"00002-of-.*expected the metadata of model-00001-of-.*; got others"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "auto"},
        {"dtype": torch.float32},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"use_safetensors": True},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], saved: tuple[Path, Any, dict[str, Tensor]]) -> None:
    folder, model, x = saved
    loaded = BertForMaskedLM.from_pretrained(folder, **options)
    assert count_packed(loaded) == count_packed(model)
    if "attn_implementation" in options:
        torch.testing.assert_close(outputs(loaded, x), outputs(model, x))
    else:
        assert torch.equal(outputs(loaded, x), outputs(model, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, saved: tuple[Path, Any, dict[str, Tensor]]) -> None:
    folder, model, x = saved
    loaded = BertForMaskedLM.from_pretrained(folder, dtype=dtype)
    wanted = copy.deepcopy(model).to(dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert count_packed(loaded) == count_packed(model)
    assert torch.equal(outputs(loaded, x), outputs(wanted, x))
    loaded.save_pretrained(folder / "narrow")
    again = BertForMaskedLM.from_pretrained(folder / "narrow")
    assert torch.equal(outputs(again, x), outputs(wanted, x))


def test_values_that_are_stored_rounded(tmp_path: Path) -> None:
    model = pruned(LlamaForCausalLM(llama()))
    x = example(model)
    accelerate(model, x, dtype=torch.bfloat16, verbose=False)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    found = [p for p in loaded.parameters() if isinstance(p, PackedTensor)]
    assert {(p.dtype, p.packed.dtype) for p in found} == {(torch.float32, torch.bfloat16)}


def test_weights_that_are_tied_in_the_model_and_differ(tmp_path: Path) -> None:
    model = pruned(GPT2LMHeadModel(gpt2()))
    x = example(model)
    pack(model.lm_head)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    sparsam.torch.huggingface.attach(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(GPT2LMHeadModel.from_pretrained(tmp_path), x), outputs(model, x))


def test_weights_that_the_user_tied_are_written_twice(tmp_path: Path) -> None:
    model = pruned(BertForMaskedLM(bert()))
    layers = model.bert.encoder.layer
    layers[0].attention.self.key.weight = layers[1].attention.self.key.weight
    layers[0].output.LayerNorm.weight = layers[1].output.LayerNorm.weight
    x = example(model)
    accelerate(model, x, verbose=False)
    model.save_pretrained(tmp_path)
    kind: Any = BertForMaskedLM
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(outputs(loaded, x), outputs(model, x))


def test_layers_packed_by_hand_are_saved_dense_until_attach_says_otherwise(tmp_path: Path) -> None:
    model = pruned(BertForMaskedLM(bert()))
    x = example(model)
    pack(model.bert.encoder.layer[0].intermediate.dense)
    model.save_pretrained(tmp_path / "dense")
    assert count_packed(BertForMaskedLM.from_pretrained(tmp_path / "dense")) == 0
    sparsam.torch.huggingface.attach(model)
    model.save_pretrained(tmp_path / "packed")
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "packed")
    assert count_packed(loaded) == 1
    assert torch.equal(outputs(loaded, x), outputs(model, x))


def test_a_weight_without_any_values(tmp_path: Path) -> None:
    model = pruned(BertForMaskedLM(bert()))
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight.zero_()
            layer.output.dense.weight.zero_()
    x = example(model)
    accelerate(model, x, verbose=False)
    model.save_pretrained(tmp_path)
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, x), outputs(model, x))


def test_an_accelerated_model_is_copied_pickled_and_cast_as_before() -> None:
    model, x = accelerated("BertForMaskedLM")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other, x), outputs(model, x))
        restore(other)
        assert not hasattr(other, "hf_quantizer")
    model.bfloat16().float().half().float()
    assert model.dequantize() is model
    assert count_packed(model) == 0
    assert not hasattr(model.config, "quantization_config")


def test_sentence_transformers(tmp_path: Path) -> None:
    letters = [chr(ord("a") + i) for i in range(26)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(dense)
    pruned(BertModel(bert())).save_pretrained(dense)
    word_vectors = Transformer(str(dense))
    model = SentenceTransformer(modules=[word_vectors, Pooling(32)], device="cpu")
    sentences = ["a cat sat", "two dogs ran in the sun"]
    accelerate(word_vectors.auto_model, dict(word_vectors.tokenize(sentences)), verbose=False)
    assert count_packed(model) > 3
    wanted = model.encode(sentences)
    model.save(str(packed))
    loaded = SentenceTransformer(str(packed), device="cpu")
    assert count_packed(loaded) == count_packed(model)
    assert np.array_equal(loaded.encode(sentences), wanted)
    restore(loaded)
    np.testing.assert_allclose(loaded.encode(sentences), wanted, atol=1e-5)
