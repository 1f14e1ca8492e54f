"""Small models whose blocks can be fused, packed, and how often their fused modules compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_models import VOCABULARY, bert, llama
from torch_cases import pruned
from transformers import (
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

import torch
from sparsam.torch.fused import fused_forward
from sparsam.torch.fused.installation import fused_modules
from torch import Tensor, nn

__all__ = ["CASES", "Counter", "PreNorm", "counted", "fused_names", "made", "padded", "unpadded"]


class PreNorm(nn.Module):
    """A block as in ViT, with a gate in its MLP, written without transformers."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=i != 1) for i in range(3))
        self.out = nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, 48), nn.Linear(width, 48)
        self.down = nn.Linear(48, width)
        self.act = nn.SiLU()
        self.scale = 0.5
        self.doubled = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        y = self.before(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=self.scale)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        y = self.after(x)
        x = x + self.down(self.act(self.gate(y)) * self.up(y))
        return x + x if self.doubled else x, None


class Two(nn.Module):
    """Two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([PreNorm(), PreNorm()])
        self.head = nn.Conv1d(32, 4, 1)  # what is no step

    def forward(self, src: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            src, _ = block(src, mask)
        found: Tensor = self.head(src.transpose(1, 2))
        return found


def unpadded() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))}


def padded() -> dict[str, Tensor]:
    seen = torch.ones(2, 12, dtype=torch.int64)
    seen[1, 7:] = 0
    return unpadded() | {"attention_mask": seen}


def distilbert() -> Any:
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=32
    )
    return DistilBertModel(config)


def roberta() -> Any:
    return RobertaModel(RobertaConfig(**{**bert().to_dict(), "model_type": "roberta", "pad_token_id": 1}))


def vit() -> Any:
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTModel(ViTConfig(**sizes, intermediate_size=64, image_size=16, patch_size=4))


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def rows() -> dict[str, Tensor]:
    return {"src": torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))}


_LLAMA = ("input_layernorm", "mlp", "post_attention_layernorm")
CASES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]], tuple[str, ...]]] = {
    "BERT": (lambda: BertModel(bert()), unpadded, ("encoder",)),
    "DistilBERT": (distilbert, unpadded, ("transformer",)),
    "RoBERTa": (roberta, unpadded, ("encoder",)),
    "ViT": (vit, pixels, ("layers.0", "layers.1")),
    "Llama": (
        lambda: LlamaForCausalLM(llama()),
        unpadded,
        (*sorted(f"model.layers.{i}.{name}" for i in (0, 1) for name in _LLAMA), "model.norm"),
    ),
    "own blocks": (Two, rows, ("blocks.0", "blocks.1")),
}


def made(name: str) -> tuple[Any, dict[str, Tensor], tuple[str, ...]]:
    """A pruned model, its inputs, and the modules that can be fused."""
    make, inputs, modules = CASES[name]
    torch.manual_seed(0)
    return pruned(make()), inputs(), modules


def fused_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the fused modules."""
    return tuple(sorted(fused_modules(model)))


class Counter:
    """How often fused modules were called, and how often they computed."""

    def __init__(self) -> None:
        self.called = self.computed = 0


@contextmanager
def counted() -> Iterator[Counter]:
    """Counts in the block."""
    counter, run = Counter(), fused_forward.FusedForward.run

    def noted(self: Any, args: Any, kwargs: Any) -> Any:
        found = run(self, args, kwargs)
        counter.called += 1
        counter.computed += found is not NotImplemented
        return found

    fused_forward.FusedForward.run = noted  # type: ignore[method-assign]
    try:
        yield counter
    finally:
        fused_forward.FusedForward.run = run  # type: ignore[method-assign]
