"""The content of a checkpoint that is not safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from sparsam.checkpoint.files import Checkpoint

__all__ = ["Foreign"]


@dataclass(frozen=True)
class Foreign:
    """The content of a file.

    Attributes:
        weights: Name -> array.
        whole: The object that torch.load or onnx returned, with the weights in it; None otherwise.
        cut: The division of the weights into safetensors shards like those of PyTorch's; None for one file.
        transposed: The names of weights that are stored as (in, out), where the file tells.
        tables: The names of weights that are embeddings according to the file.
        constants: The names of tensors that have the shape of a weight but are not a layer's.
    """

    weights: dict[str, NDArray[Any]]
    whole: Any = None
    cut: Checkpoint | None = None
    transposed: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
