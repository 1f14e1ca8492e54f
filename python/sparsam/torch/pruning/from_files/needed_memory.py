"""The memory that pruning a model part by part takes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from sparsam.checkpoint.shard_passes import needed
from sparsam.torch.pruning.activations import Activations
from sparsam.torch.pruning.calibration import Batch
from sparsam.torch.pruning.from_files.model_parts import Part
from sparsam.torch.pruning.prunable import PrunableWeight
from torch import nn

__all__ = ["Demand", "Seen", "check_memory", "part_size"]


@dataclass(frozen=True)
class Demand:
    """What a run does, as far as memory depends on it.

    Attributes:
        reconstructs: Whether the method fits weights.
        targets: Whether it fits them to the dense network's outputs.
        parallel: Whether an executor may fit all weights of a group at the same time.
        trained: The names of blocks that are trained.
    """

    reconstructs: bool
    targets: bool
    parallel: bool
    trained: Collection[str] = ()


@dataclass(frozen=True)
class Seen:
    """What a first pass has shown.

    Attributes:
        groups: The names of weights that are fitted together, such as gate and up.
        activations: Part -> those of the first batch.
        sizes: How large each batch is, relative to the first.
        running: How many passes compute at the same time.
    """

    groups: Sequence[Sequence[str]]
    activations: Mapping[str, Activations] = field(default_factory=dict)
    sizes: Sequence[float] = ()
    running: int = 1

    @staticmethod
    def sizes_of(batches: Sequence[Batch]) -> list[float]:
        """The sizes of batches: by the numbers of their largest input, padding included."""
        numbers = [max(tensor.numel() for tensor in batch.tensors()) for batch in batches]
        return [number / max(numbers[0], 1) for number in numbers]


def check_memory(
    memory: int,
    model: nn.Module,
    parts: Sequence[Part],
    weights: Mapping[str, PrunableWeight],
    demand: Demand,
    *,
    skip: Collection[str] = (),
    seen: Seen | None = None,
) -> None:
    """Raises ValueError if a part, the work on its weights, and activations do not fit.

    The estimate counts float64 matrices, their number measured and rounded up: for a layer with n inputs two
    of n^2 numbers, its second moments, or for each group of a grouped convolution; for a fit six more of
    these, including the inverse; four of the size of the weight (six if several are fitted at the same
    time); for targets five more of that size, and the pruned weight beside the dense one. Of activations it
    counts what all batches hold while they wait, in both networks if there are targets, what is computed
    at the same time, and copies of the inputs and outputs of a batch. A block that is trained counts four
    times: values, gradients and two moments.

    Args:
        memory: The available bytes.
        model: The model.
        parts: Its parts.
        weights: Name -> the weights that are pruned.
        demand: What is done.
        skip: Names of parts that are never in memory.
        seen: What a first pass has shown; None: not yet, so each weight is fitted by itself, and activations
            are not counted.
    """
    most, which = 0, ""
    for part in parts:
        if part.name in skip:
            continue
        size = part_size(model, part)
        own = {name: weight for name, weight in weights.items() if name.startswith(f"{part.name}.")}
        pruned = sum(weight.parameter.nbytes for weight in own.values())
        groups = [
            names for names in (seen.groups if seen else [[name] for name in own]) if set(names) & set(own)
        ]
        works = [_work([weights[name] for name in names], demand) for names in groups]
        writing = max((needed(weight.parameter.nbytes) for weight in own.values()), default=0)
        held = _activations(part.name, demand, seen)
        twice = pruned if demand.targets or demand.trained else 0
        total = size + twice + max([writing, *(work + held for work in works)], default=0)
        if part.name in demand.trained:
            total = max(total, 4 * size + _training(part.name, seen))
        most, which = max((most, which), (max(total, size + held), part.name))
    if most > memory:
        known = f"{which!r}, the work on it, and activations"
        what = known if seen else f"{which!r} and the work on it, and more for activations"
        msg = (
            f"memory: expected at least {math.ceil(most / 2**20)}MiB, for {what}; got "
            f"{memory / 2**20:g}MiB; raise it"
        )
        raise ValueError(msg)


def part_size(model: nn.Module, part: Part) -> int:
    """The bytes of a part in memory, without the tables of embeddings, which are read row by row."""
    module = model.get_submodule(part.name)
    tables = {id(one.weight) for one in module.modules() if type(one) is nn.Embedding}
    return sum(one.nbytes for one in module.parameters() if id(one) not in tables)


def _activations(part: str, demand: Demand, seen: Seen | None) -> int:
    """Bytes of the activations of all batches in a part, and of the copies of one of them."""
    if seen is None or part not in seen.activations:
        return 0
    first = seen.activations[part]
    networks = 2 if demand.targets else 1
    largest = first.times(max(seen.sizes))
    computed = seen.running * max(largest.most - largest.held, 0)
    return int(networks * sum(seen.sizes) * first.held) + computed + largest.moved


def _training(part: str, seen: Seen | None) -> int:
    """Bytes of the activations while a block is trained, with one batch at a time."""
    if seen is None or part not in seen.activations:
        return 0
    largest = seen.activations[part].times(max(seen.sizes))
    held = int(2 * sum(seen.sizes) * seen.activations[part].held)
    return held + largest.made + largest.most


def _work(weights: Sequence[PrunableWeight], demand: Demand) -> int:
    """Bytes for fitting weights with the same inputs: moments once, the rest for each fit that may run."""
    rows = inputs = 0
    for weight in weights:
        shape = weight.parameter.shape
        own, inputs = (shape[-1], shape[0]) if weight.transposed else (shape[0], math.prod(shape[1:]))
        rows += own
    groups = max(weight.groups for weight in weights)
    fits = len(weights) * groups if demand.parallel else 1
    moments = 2 * groups + 6 * fits if demand.reconstructs else 2 * groups
    copies = 6 if demand.parallel else 4
    return 8 * inputs * (moments * inputs + (copies + 5 * demand.targets) * rows)
