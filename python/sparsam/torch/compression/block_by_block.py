"""compress for a model that does not fit into memory: pruned block by block, from directory to directory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from sparsam.checkpoint import files, streaming
from sparsam.checkpoint.layout import read_layout
from sparsam.config import PruningConfig
from sparsam.inputs.dtypes import is_weight_dtype
from sparsam.inputs.system import available_memory
from sparsam.torch.compression.model_directory import (
    ModelDirectory,
    copy_companions,
    model_folder,
    read_directory,
)
from sparsam.torch.compression.texts import batches_of
from sparsam.torch.compression.workflow import SAMPLES, check_minutes, read_arguments, texts_of
from sparsam.torch.pruning.from_files.workflow import prune_files
from sparsam.torch.pruning.pruning_report import PruningReport

__all__ = ["compress_files", "outgrows_memory"]

_COPIES = 3  # of the weights in float32: the dense model, the one that is pruned, and its new weights


def outgrows_memory(model: Path) -> bool:
    """Whether the safetensors of a directory are so large that `compress` would not fit into memory."""
    inner = model / model_folder(model)
    found = [inner / name for name in (files.FILE_NAME, files.INDEX_NAME) if (inner / name).is_file()]
    available = available_memory()
    if len(found) != 1 or available is None:
        return False
    layouts = [read_layout(part) for part in streaming.parts_of(*files.resolve(found[0]))]
    shapes = [
        entry.shape
        for layout in layouts
        for entry in layout.entries
        if entry.numpy_dtype is not None and is_weight_dtype(entry.numpy_dtype)
    ]
    return _COPIES * 4 * sum(map(math.prod, shapes)) > available


def compress_files(
    model: str | Path,
    calibration: str | Path | Sequence[str],
    output: str | Path,
    config: PruningConfig | None = None,
    *,
    memory: int | str | None = None,
    distill_minutes: float = 0.0,
    distill_steps: int | None = None,
    progress: streaming.Progress | None = None,
) -> PruningReport:
    """Prunes a Hugging Face model block by block from its files, which need not fit into memory.

    The pruning is that of `compress`. The result is a directory like the source, with zeros: nothing is
    packed, or measured on the whole model. A call that was interrupted continues when it is repeated.

    Args:
        model: As for `compress`, with its weights in safetensors.
        calibration: As for `compress`.
        output: As for `compress`.
        config: As for `compress`.
        memory: As for `prune_files`.
        distill_minutes: How long to train after pruning, block by block, on the calibration; 0: no limit if
            there are `distill_steps`, else not at all.
        distill_steps: As for `prune_files`.
        progress: As for `prune_files`.

    Returns:
        Each weight's sparsity and error on held-out texts.

    Raises:
        ValueError: As for `compress` and `prune_files`.
        ImportError: transformers is not installed.
    """
    target, given = read_arguments(model, output, config)
    check_minutes(distill_minutes)
    texts = texts_of(calibration)
    source = read_directory(Path(model), target, loaded=False)
    batches = batches_of(texts, source.tokenizer, running=source.causal, longest=source.longest)
    return prune_files(
        source.model,
        source.path / source.part,
        target,
        batches.calibration,
        given,
        calibration_samples=SAMPLES[batches.unit],
        memory=memory,
        distill_steps=distill_steps,
        distill_seconds=60 * distill_minutes or None,
        progress=progress,
        copy_beside=lambda _, place: _complete(source, place),
    )


def _complete(source: ModelDirectory, place: Path) -> None:
    """Makes a directory with nothing but the new weights one like the source."""
    if source.part != ".":
        weights = list(place.iterdir())
        (place / source.part).mkdir()
        for file in weights:
            file.rename(place / source.part / file.name)
    copy_companions(source.path, place, source.part)
