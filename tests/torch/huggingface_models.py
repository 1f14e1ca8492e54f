"""Small models of Hugging Face transformers, pruned and accelerated, and their inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch_cases import count_packed
from torch_cases import pruned as _pruned
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import torch
from sparsam.torch import accelerate
from torch import Tensor, nn

NAME = "model.safetensors"


VOCABULARY = 99


def pruned(model: Any) -> Any:
    """Any: what transformers adds to modules has no types here."""
    return _pruned(model)


def bert() -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )


def gpt2() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )


def llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )


def mixtral() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        pad_token_id=0,
    )


def t5() -> T5Config:
    return T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)


def wav2vec2() -> Wav2Vec2Config:
    return Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(4, 2),
        conv_kernel=(8, 4),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )


MODELS: dict[str, tuple[type[Any], Callable[[], Any]]] = {
    "BertForMaskedLM": (BertForMaskedLM, bert),
    "BertForSequenceClassification": (BertForSequenceClassification, bert),
    "GPT2LMHeadModel": (GPT2LMHeadModel, gpt2),
    "LlamaForCausalLM": (LlamaForCausalLM, llama),
    "MixtralForCausalLM": (MixtralForCausalLM, mixtral),
    "T5ForConditionalGeneration": (T5ForConditionalGeneration, t5),
    "Wav2Vec2Model": (Wav2Vec2Model, wav2vec2),
}


def example(model: Any) -> dict[str, Tensor]:
    if isinstance(model, Wav2Vec2Model):
        return {"input_values": torch.randn(2, 400)}
    ids = torch.randint(1, VOCABULARY, (2, 7))
    more = {"decoder_input_ids": ids[:, :3]} if isinstance(model, T5ForConditionalGeneration) else {}
    return {"input_ids": ids, **more}


@torch.no_grad()
def outputs(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**x)[0]
    return found


def accelerated(name: str) -> tuple[Any, dict[str, Tensor]]:
    kind, config = MODELS[name]
    model = pruned(kind(config()))
    x = example(model)
    accelerate(model, x, verbose=False)
    assert count_packed(model) > 3
    return model, x


def save_bert(folder: Path) -> tuple[Path, Any, dict[str, Tensor]]:
    """The folder with an accelerated BERT in it, the model, and an input of it."""
    model, x = accelerated("BertForMaskedLM")
    model.save_pretrained(folder)
    return folder, model, x
