"""What a specimen of the zoo is, how large, and what is done with each."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sparsam
import torch
from sparsam.torch import LayerRow
from torch import Tensor, nn

__all__ = [
    "REAL",
    "TINY",
    "Build",
    "Size",
    "Specimen",
    "Stays",
    "exported_file",
    "from_exported",
    "magnitude_pruned",
    "stays",
]


@dataclass(frozen=True)
class Size:
    """How large the models are.

    Attributes:
        width: Features of a token, channels of an image; a multiple of 32.
        layers: Blocks, one upon another.
        batch: Sentences, images, signals.
        tokens: Tokens of a sentence.
        image: Height and width of an image; a multiple of 32.
    """

    width: int
    layers: int
    batch: int
    tokens: int
    image: int

    @property
    def heads(self) -> int:
        """Heads of attention."""
        return max(4, self.width // 64)

    @property
    def wide(self) -> int:
        """Features between the layers of a block."""
        return 4 * self.width

    @property
    def words(self) -> int:
        """Different tokens; the first three have a meaning: padding, begin, end."""
        return 2 * self.width

    def ids(self) -> Tensor:
        """Random tokens without a meaning."""
        return torch.randint(3, self.words, (self.batch, self.tokens))

    def rows(self) -> Tensor:
        """Random features of tokens."""
        return torch.randn(self.batch, self.tokens, self.width)

    def images(self) -> Tensor:
        """Random images."""
        return torch.randn(self.batch, 3, self.image, self.image)

    def signals(self, channels: int) -> Tensor:
        """Random signals."""
        return torch.randn(self.batch, channels, 8 * self.tokens)


TINY = Size(width=32, layers=2, batch=2, tokens=6, image=32)
REAL = Size(width=512, layers=4, batch=4, tokens=64, image=96)

Build = Callable[[Size], tuple[nn.Module, Any]]
Stays = Mapping[tuple[str, str], int]


@dataclass(frozen=True)
class Specimen:
    """A class of models.

    Attributes:
        name: The class.
        family: What it is for.
        build: Makes a model of a size, and an example for it.
        dense: What a tiny one has of layers that stay dense: (kind, reason) -> how many.
        computed: How many of the others have a weight that torch.nn.utils.parametrize computes.
    """

    name: str
    family: str
    build: Build
    dense: Stays = field(default_factory=dict)
    computed: int = 0


def magnitude_pruned(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    """The model in eval mode, the smallest weights of each matrix zeroed; embeddings stay as they are."""
    modules = list(model.modules())
    embeddings = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    embeddings -= {id(module.weight) for module in modules if isinstance(module, nn.Linear)}
    weights = {
        name: parameter.detach().numpy()
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in embeddings
    }
    sparsam.prune(weights, target_sparsity=sparsity, inplace=True)
    return model.eval()


def stays(layers: Iterable[LayerRow]) -> Counter[tuple[str, str]]:
    """How many layers stayed dense, by kind and reason."""
    return Counter((row.kind, row.reason) for row in layers if not row.swapped)


def exported_file(model: nn.Module, example: Any) -> io.BytesIO:
    """The file that torch.export makes of the model."""
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    program = torch.export.export(model, args if isinstance(args, tuple) else (args,), kwargs)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return file


def from_exported(file: io.BytesIO) -> nn.Module:
    """The model as it comes out of a file of torch.export."""
    return torch.export.load(file).module()
