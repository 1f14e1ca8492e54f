"""Output layers of language models that share the weight of the embedding, and have no zeros."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from torch_cases import Clock
from transformers import LlamaConfig, LlamaForCausalLM

import torch
from sparsam.torch import PackedTensor, accelerate, load, restore, save

pytestmark = pytest.mark.usefixtures("clock", "one_thread")


def made() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model: torch.nn.Module = LlamaForCausalLM(config)
    return model.eval(), {"input_ids": torch.randint(50, (1, 3))}


@torch.no_grad()
def test_with_int4_it_is_int8_and_the_embedding_stays(tmp_path: Path) -> None:
    model, x = made()
    shared, wanted = model.model.embed_tokens.weight, model(**x).logits
    before = copy.deepcopy(model)
    report = accelerate(model, x, values="int4", verbose=False)
    assert [row.name for row in report.layers if row.swapped] == ["lm_head"]
    weight = model.lm_head.weight
    assert isinstance(weight, PackedTensor)
    assert weight.packed.dtype == torch.int8
    assert model.model.embed_tokens.weight is shared
    assert torch.equal(shared, before.model.embed_tokens.weight)
    found = model(**x).logits
    assert 0 < (found - wanted).abs().max() <= 0.02 * wanted.abs().max()
    save(model, tmp_path)
    loaded = copy.deepcopy(before)
    load(tmp_path, loaded)
    assert torch.equal(loaded(**x).logits, found)
    restore(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is shared
    assert torch.equal(model(**x).logits, wanted)


def test_not_where_it_is_no_faster(clock: Clock) -> None:
    clock.gains["lm_head"] = 1.0
    model, x = made()
    report = accelerate(model, x, values="int4", verbose=False)
    assert report.swapped == 0
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("values", [None, "int8"])
def test_otherwise_it_stays(values: Any) -> None:
    model, x = made()
    report = accelerate(model, x, values=values, verbose=False)
    assert not any(row.swapped for row in report.layers if row.name == "lm_head")
