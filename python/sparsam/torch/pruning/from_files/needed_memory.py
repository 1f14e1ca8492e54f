"""The memory that pruning a model part by part takes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from sparsam.torch.pruning.from_files.model_parts import Part
from sparsam.torch.pruning.prunable import PrunableWeight
from torch import nn

__all__ = ["check_memory"]


def check_memory(
    memory: int,
    model: nn.Module,
    parts: Sequence[Part],
    weights: Mapping[str, PrunableWeight],
    *,
    reconstructs: bool,
    targets: bool,
    skip: Collection[str] = (),
    groups: Sequence[Sequence[str]] | None = None,
    parallel: bool = False,
) -> None:
    """Raises ValueError if a part, and the work on its widest weight or group of weights, do not fit.

    The estimate counts float64 matrices, their number measured and rounded up: for a layer with n inputs two
    of n^2 numbers, its second moments, or for each group of a grouped convolution; for a fit six more of
    these, including the inverse, and four of the size of the weight (six if several are fitted at the same
    time); for targets five more of that size.

    Args:
        memory: The available bytes.
        model: The model.
        parts: Its parts.
        weights: Name -> the weights that are pruned.
        reconstructs: Whether the method fits weights.
        targets: Whether it fits them to the dense network's outputs.
        skip: Names of parts that are never in memory.
        groups: The names of weights that are fitted together, such as gate and up; None: each by itself.
        parallel: Whether an executor may fit all weights of a group at the same time.
    """
    most, which = 0, ""
    for part in parts:
        if part.name in skip:
            continue
        module = model.get_submodule(part.name)
        tables = {id(one.weight) for one in module.modules() if type(one) is nn.Embedding}  # read row by row
        size = sum(one.nbytes for one in module.parameters() if id(one) not in tables)
        works = [
            _work(
                [weights[name] for name in names],
                reconstructs=reconstructs,
                targets=targets,
                parallel=parallel,
            )
            for names in (groups or [[name] for name in weights])
            if any(name.startswith(f"{part.name}.") for name in names)
        ]
        most, which = max((most, which), (size + max(works, default=0), part.name))
    if most > memory:
        msg = (
            f"memory: expected at least {math.ceil(most / 2**20)}MiB, for {which!r} and the work on it, and "
            f"more for activations; got {memory / 2**20:g}MiB; raise it"
        )
        raise ValueError(msg)


def _work(weights: Sequence[PrunableWeight], *, reconstructs: bool, targets: bool, parallel: bool) -> int:
    """Bytes for fitting weights with the same inputs: moments once, the rest for each fit that may run."""
    rows = inputs = 0
    for weight in weights:
        shape = weight.parameter.shape
        own, inputs = (shape[-1], shape[0]) if weight.transposed else (shape[0], math.prod(shape[1:]))
        rows += own
    groups = max(weight.groups for weight in weights)
    fits = len(weights) * groups if parallel else 1
    moments, copies = (2 * groups + 6 * fits, 6 if parallel else 4) if reconstructs else (2 * groups, 0)
    return 8 * inputs * (moments * inputs + (copies + 5 * targets) * rows)
