"""Writes shards with the new values of pruned weights, and everything else unchanged."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sparsam import scores
from sparsam.checkpoint.shard_passes import PruneTask, prune_shard
from sparsam.checkpoint.streaming import Progress
from sparsam.report import LayerStats
from sparsam.torch.layers.packed_weight import to_array
from sparsam.torch.pruning.from_files.job import Job
from sparsam.torch.pruning.from_files.parts_in_turn import PartsInTurn
from sparsam.torch.pruning.layer_fits import NewLayer
from sparsam.torch.pruning.pruning_report import PrunedWeight, described
from torch import dtype

__all__ = ["write_shards"]


def write_shards(
    job: Job,
    known: Mapping[str, NewLayer],
    parts: PartsInTurn,
    folder: Path,
    memory: int,
    progress: Progress,
    distilled: Iterable[str] = (),
) -> list[PrunedWeight]:
    """Writes the shards into a folder, except those that are there already, which are complete.

    Args:
        job: The plan of the run.
        known: Name -> the fit of the weight, without values.
        parts: The parts, with the new values.
        folder: The folder to write to.
        memory: Bytes for buffers.
        progress: Called with "writing", the bytes written and their total.
        distilled: The names of Parameters that were trained.

    Returns:
        The report's rows, in the order of the model.
    """
    changed: dict[str, Callable[[], NDArray[Any]]] = {}
    shown: dict[str, str] = {}
    for weight in known:
        shown[job.source.stored[weight]] = str(job.plan.pool_of[weight].pattern)
        for name in parts.changed(weight):
            if name in job.source:
                values = partial(_values, parts, weight, name, job.source.dtype(name))
                changed[job.source.stored[name]] = values
    for name in distilled:
        changed[job.source.stored[name]] = partial(_trained, parts, name, job.source.dtype(name))
    total, done = sum(layout.size for layout in job.layouts), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress("writing", min(done, total), total)

    found: dict[str, LayerStats] = {}
    for layout in job.layouts:
        names = [entry.name for entry in layout.entries]
        task = PruneTask(
            layout,
            folder / layout.file.name,
            scores.resolve("magnitude"),
            {},
            {},
            {name: shown[name] for name in names if name in shown},
            memory,
            secrets.token_hex(4),
            {name: changed[name] for name in names if name in changed},
        )
        found |= {stats.name: stats for stats in prune_shard(task, advance)}
    parts.close()
    return list(_rows(job, known, found))


def _values(parts: PartsInTurn, weight: str, name: str, kind: dtype) -> NDArray[Any]:
    """A tensor that changed with a weight, in the dtype of its file."""
    return to_array(parts.pruned(weight)[name].to(kind).contiguous())


def _trained(parts: PartsInTurn, name: str, kind: dtype) -> NDArray[Any]:
    """A Parameter that was trained, in the dtype of its file."""
    return to_array(parts.tensor(name).to(kind).contiguous())


def _rows(job: Job, known: Mapping[str, NewLayer], found: Mapping[str, LayerStats]) -> Iterator[PrunedWeight]:
    for name, _ in job.model.named_parameters(remove_duplicate=False):
        reason = job.dense.get(name, "")
        if (name in job.plan.weights or reason) and not reason.startswith("the same as"):
            stats = replace(found[job.source.stored[name]], name=name)
            yield described(stats, known.get(name), reason)
