"""Modules of plain PyTorch for the zoo: each does something that a packed layer could get wrong."""

from __future__ import annotations

from collections.abc import Callable

from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from torch import Tensor, nn

__all__ = ["Attention", "ConvNet", "Curious", "Scaled", "Signals", "Tagger", "Tied"]


class ConvNet(nn.Module):
    """Convolutions of all kinds: depthwise, dilated, grouped, circular, transposed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.depthwise = nn.Conv2d(width, width, 3, padding="same", groups=width)
        self.dilated = nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.circular = nn.Conv2d(width, width, 3, padding=1, padding_mode="circular")
        self.reflect = nn.Conv2d(width, width, (1, 3), padding=(0, 1), padding_mode="reflect", bias=False)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.head = nn.Conv2d(width, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x)).relu()
        x = self.grouped(self.dilated(x).relu()) + x
        x = self.up(self.reflect(self.circular(x).relu()))
        return self.head(x)  # type: ignore[no-any-return]


class Signals(nn.Module):
    """Causal dilated convolutions of signals, gated."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, width, 1)
        self.filters = nn.ModuleList(nn.Conv1d(width, 2 * width, 3, dilation=2**i) for i in range(layers))
        self.mixes = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.depthwise = nn.Conv1d(width, width, 5, padding=2, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for causal, mix in zip(self.filters, self.mixes, strict=True):
            before = causal.dilation[0] * (causal.kernel_size[0] - 1)  # type: ignore[index]
            value, gate = causal(functional.pad(x, (before, 0))).chunk(2, 1)  # type: ignore[arg-type]
            x = x + mix(value.tanh() * gate.sigmoid())
        return self.depthwise(x)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """nn.MultiheadAttention over itself, and over something of another width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(width, heads, batch_first=True)
        self.other = nn.MultiheadAttention(width, heads, batch_first=True, kdim=2 * width, vdim=2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.own(x, x, x, need_weights=False)[0]
        return self.out(x + self.other(x, memory, memory)[0])  # type: ignore[no-any-return]


class Tagger(nn.Module):
    """A recurrent network with a projection."""

    def __init__(self, kind: Callable[..., nn.RNNBase], width: int, layers: int, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.net = kind(width, width, layers, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, words)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.net(self.embedding(ids))[0])  # type: ignore[no-any-return]


class Tied(nn.Module):
    """One weight in two layers, and an embedding that is a head."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = functional.gelu(self.first(self.embedding(ids)))
        return self.head(self.second(x))  # type: ignore[no-any-return]


class Curious(nn.Module):
    """Reads in `forward` what its layers are, as code of others does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, width, 4, stride=2, padding=1)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = Conv1D(width, 2 * width)  # type: ignore[no-untyped-call]

    def lengths(self, length: int) -> int:
        conv = self.conv
        reach = conv.dilation[0] * (conv.kernel_size[0] - 1)
        return (length + 2 * int(conv.padding[0]) - reach - 1) // conv.stride[0] + 1

    def forward(self, x: Tensor) -> Tensor:
        own = next(self.parameters())
        x = x.to(own.device, own.dtype)
        length, conv = self.lengths(x.shape[-1]), self.conv
        x = conv(x)[..., :length].reshape(
            len(x), length * (conv.out_channels // conv.groups) // conv.in_channels, -1
        )
        x = functional.pad(x, (0, self.fc1.in_features - x.shape[-1]))
        x = self.fc1(x.to(self.fc1.weight.dtype)).relu()
        return self.fc2(x.to(self.fc2.weight.device)).reshape(len(x), -1, self.fc2.nf)  # type: ignore[no-any-return]


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias) * 0.5
