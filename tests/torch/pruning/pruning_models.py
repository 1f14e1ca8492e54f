"""Small models of real classes, with calibration for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

import torch
from torch import Tensor, nn

WORDS = 160


def ids(seed: int, samples: int = 8, tokens: int = 12) -> Tensor:
    return torch.randint(0, WORDS, (samples, tokens), generator=torch.Generator().manual_seed(seed))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
}


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.down: nn.Module = nn.Identity()
        if stride > 1:
            down = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.down = nn.Sequential(down, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.down(x)
        result: Tensor = self.relu(y)
        return result


def convnet() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        Block(8, 8, 1),
        Block(8, 12, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    model.train()
    for seed in range(4):
        model(normal(seed, 16, 3, 12, 12))
    return model.eval()


class Tagger(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 16)
        self.layers = kind(16, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(24, 5)

    def forward(self, words: Tensor) -> Tensor:
        result: Tensor = self.out(self.layers(self.table(words))[0])
        return result


class Steps(nn.Module):
    """A cell that is called once for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 12)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        result: Tensor = self.out(state)
        return result


Build = Callable[[], tuple[nn.Module, Callable[[int], Any]]]


def words(model: nn.Module) -> tuple[nn.Module, Callable[[int], Any]]:
    return model, lambda seed: {"input_ids": ids(seed), "attention_mask": (ids(seed + 99) > 20).long()}


MODELS: dict[str, Build] = {
    "bert": lambda: words(
        hf.BertModel(
            hf.BertConfig(**SIZES, vocab_size=WORDS, max_position_embeddings=64, initializer_range=0.3)
        )
    ),
    "gpt2": lambda: (
        hf.GPT2LMHeadModel(
            hf.GPT2Config(
                n_embd=32,
                n_head=4,
                n_layer=2,
                vocab_size=WORDS,
                n_positions=32,
                bos_token_id=0,
                eos_token_id=0,
            )
        ),
        ids,
    ),
    "llama": lambda: words(
        hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=WORDS))
    ),
    "neox": lambda: words(hf.GPTNeoXModel(hf.GPTNeoXConfig(**SIZES, vocab_size=WORDS))),
    "albert": lambda: words(hf.AlbertModel(hf.AlbertConfig(**SIZES, embedding_size=16, vocab_size=WORDS))),
    "t5": lambda: (
        hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=WORDS)
        ),
        lambda seed: {"input_ids": ids(seed), "decoder_input_ids": ids(seed + 50, tokens=6)},
    ),
    "vit": lambda: (
        hf.ViTModel(hf.ViTConfig(**SIZES, image_size=16, patch_size=4)),
        lambda seed: {"pixel_values": normal(seed, 8, 3, 16, 16)},
    ),
    "resnet": lambda: (
        hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
        lambda seed: normal(seed, 4, 3, 32, 32),
    ),
    "encoder": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2),
        lambda seed: normal(seed, 8, 12, 32),
    ),
    "transformer": lambda: (
        nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
        lambda seed: (normal(seed, 8, 12, 16), normal(seed + 50, 8, 6, 16)),
    ),
    "convnet": lambda: (convnet(), lambda seed: (normal(seed, 8, 3, 12, 12), torch.zeros(8))),
    "conv1d": lambda: (
        nn.Sequential(
            nn.Conv1d(3, 16, 5, padding="same"),
            nn.ReLU(),
            nn.Conv1d(16, 16, 3, groups=4, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv1d(16, 8, 3, stride=2, dilation=2),
        ),
        lambda seed: normal(seed, 8, 3, 40),
    ),
    "lstm": lambda: (Tagger(nn.LSTM), ids),
    "gru": lambda: (Tagger(nn.GRU), ids),
    "cell": lambda: (Steps(), lambda seed: normal(seed, 16, 6, 8)),
}


def model_and_batches(name: str, batches: int = 12) -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    return model.eval(), [batch(seed) for seed in range(batches)]


def output(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        if isinstance(batch, dict):
            result = model(**batch)
        elif isinstance(batch, tuple):
            result = model(*batch[: 2 if isinstance(model, nn.Transformer) else 1])
        else:
            result = model(batch)
    found: Tensor = result if isinstance(result, Tensor) else result[0]
    return found


def distance(model: nn.Module, dense: nn.Module, batches: list[Any]) -> float:
    """The squared difference of outputs as a share of their variance."""
    a = torch.cat([output(model, batch).reshape(-1) for batch in batches])
    b = torch.cat([output(dense, batch).reshape(-1) for batch in batches])
    return float((a - b).square().mean() / b.var())


def tiny_bert() -> hf.BertConfig:
    """Two layers of 16, and 40 words."""
    return hf.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
