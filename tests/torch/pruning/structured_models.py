"""Small models of real classes, with inputs, whose structures can be cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

import torch
from torch import nn


def bert() -> tuple[Any, Any]:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    ids = torch.randint(0, 50, (2, 7))
    return transformers.BertModel(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def gpt2() -> tuple[Any, Any]:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 50, (2, 7))}


def llama(keys: int = 2) -> tuple[Any, Any]:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=keys,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 50, (2, 7))}


def vit() -> tuple[Any, Any]:
    config: Any = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    )
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def resnet() -> tuple[Any, Any]:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[2, 2], layer_type="basic"
    )
    model: Any = transformers.ResNetForImageClassification(config)
    norms: list[Any] = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 1.5)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}


def mlp() -> tuple[Any, Any]:
    # A sigmoid is 0.5 at 0, which the next layer must not read of a neuron that is gone.
    layers = nn.Linear(12, 20), nn.Sigmoid(), nn.Linear(20, 16, bias=False), nn.ReLU(), nn.Linear(16, 3)
    return nn.Sequential(*layers).eval(), torch.randn(4, 12)


def cnn() -> tuple[Any, Any]:
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.PReLU(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 6, 1),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 6 * 6, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    )
    return nn.Sequential(*layers).eval(), torch.randn(2, 3, 16, 16)


class Dense(nn.Module):
    """Two branches that are concatenated, one of which is added to what comes later."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv1d(2, 4, 1), nn.Conv1d(2, 6, 1)
        self.both, self.last = nn.Conv1d(10, 4, 1), nn.Conv1d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = self.left(x).relu()
        both = self.both(torch.cat([left, self.right(x)], 1))
        found: torch.Tensor = self.last((both + left).relu())
        return found


def dense() -> tuple[Any, Any]:
    return Dense().eval(), torch.randn(2, 2, 5)


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    make.__name__: make for make in (bert, gpt2, llama, vit, resnet, mlp, cnn, dense)
}


def make(name: str) -> tuple[Any, Any]:
    """The model, in eval mode, and example inputs; always the same."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return model.eval(), inputs


def first(outputs: Any) -> torch.Tensor:
    """The tensor that matters among a model's outputs."""
    found = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    assert isinstance(found, torch.Tensor)
    return found


@torch.no_grad()
def run(model: nn.Module, inputs: Any) -> torch.Tensor:
    return first(model(**inputs) if isinstance(inputs, dict) else model(inputs))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
