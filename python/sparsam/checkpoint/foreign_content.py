"""What is read from a checkpoint that is no safetensors."""

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
        whole: What torch.load or onnx gave, of which the weights are a part; None otherwise.
        cut: How the weights are cut into shards of safetensors, as they were into torch's; None for one.
        transposed: The names of weights that are stored as (in, out), where the file tells.
        tables: The names of weights that the file itself says are embeddings.
        constants: The names of what is no weight of a layer, though it has a weight's shape.
    """

    weights: dict[str, NDArray[Any]]
    whole: Any = None
    cut: Checkpoint | None = None
    transposed: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
