"""Pruning checkpoints that do not fit into memory: shard by shard, tensor by tensor, from file to file."""

from __future__ import annotations

import hashlib
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from sparsam.checkpoint import companions
from sparsam.checkpoint.files import FILE_NAME, Shards, check_readable, resolve
from sparsam.checkpoint.json_state import decode
from sparsam.checkpoint.layout import Layout, read_layout
from sparsam.checkpoint.plan import FilePlan, Pooling, parse_size
from sparsam.checkpoint.ranking_passes import RUN, Counts, Cut, Found, Ranking, find_threshold
from sparsam.checkpoint.shard_passes import (
    CountTask,
    PruneTask,
    SampleTask,
    count_shard,
    prune_shard,
    sample_shard,
)
from sparsam.checkpoint.staging import open_staging
from sparsam.config import PruningConfig
from sparsam.inputs.float_mode import standard_floats
from sparsam.inputs.messages import LOGGER
from sparsam.pools import Pool
from sparsam.report import LayerStats, Report

__all__ = ["FILE_KINDS", "Progress", "name_files", "parts_of", "prune_files", "target_of"]

StrPath: TypeAlias = "str | os.PathLike[str]"
Progress: TypeAlias = Callable[[str, int, int], object]
"""Called with the name of the current pass, the bytes processed in it, and their total."""

_TaskT = TypeVar("_TaskT")
_ResultT = TypeVar("_ResultT")

_SAMPLED = 1 << 18
FILE_KINDS = {  # not written here: the command line writes the first five in other ways
    ".pt",
    ".pth",
    ".bin",
    ".npz",
    ".onnx",
    ".h5",
    ".hdf5",
    ".keras",
    ".gguf",
    ".ggml",
    ".msgpack",
    ".ckpt",
    ".ot",
    ".tflite",
    ".pb",
    ".pkl",
}


@standard_floats
def prune_files(
    src: StrPath,
    dst: StrPath,
    config: PruningConfig | None = None,
    *,
    executor: Executor | None = None,
    memory: int | str = "2GiB",
    progress: Progress | None = None,
) -> Report:
    """Prunes a checkpoint from file to file in bounded memory; the weights are bit for bit `sparsam.prune`'s.

    Shards keep their names, headers and metadata; tensors that are not pruned are copied byte for byte, those
    of dtypes that NumPy lacks included. In global scope, and for the allocations "global" and "lamp", the
    threshold is found by counting passes over the shards. Other files of a Hugging Face directory are copied.

    No file appears under its name until all are complete: they are written in a hidden folder beside `dst`. A
    run that was killed leaves that folder, and the same call continues in it: finished shards are not done
    again, nor is the part of a large shard up to the last flush, one per GiB.

    Args:
        src: As for `load`: a file, an index, or a directory.
        dst: The directory to write, new or not. If `src` is one file: also a file, whose name ends in
            .safetensors. It may be `src`.
        config: What to do; `PruningConfig()` if left out. Not with ties, nor with allocations that read
            weights, other than "global" and "lamp".
        executor: Runs the work on each shard: any of `concurrent.futures`, with processes or other machines
            that see the files under the same paths. None: in this process, one after the other.
        memory: How many bytes the call, or each task of an executor, may take in addition to what the process
            uses: a number, or text like 2GiB. The largest tensor that is pruned must fit, plus 20 % of its
            size; methods that compute scores take 64 bytes more for each of its weights.
        progress: Called with the name of the current pass, the bytes processed in it, and their total.

    Returns:
        The report of all tensors, by name.

    Raises:
        ValueError: As `load` and `prune`; memory is not enough; another run writes to `dst`; `dst` holds
            another kind of checkpoint.
        TypeError: A tensor to be pruned has a dtype that cannot be.
        OSError: Files cannot be read or written.
    """
    settings = PruningConfig() if config is None else config
    if not isinstance(settings, PruningConfig):
        msg = (
            f"config: expected a PruningConfig; got {config!r}; pass PruningConfig(target_sparsity=0.9), say"
        )
        raise TypeError(msg)
    limit = parse_size("memory", memory)
    file, shards = resolve(src)
    layouts = [read_layout(part) for part in parts_of(file, shards)]
    target, is_folder = target_of(dst, shards)
    plan = FilePlan.of(layouts, settings, stacklevel=3)
    plan.check_memory(limit)
    with open_staging(target, is_folder=is_folder, run=_identity(plan, src)) as staging:
        if staging.finished:
            return Report(msgspec.json.decode(staging.finished, type=tuple[LayerStats, ...]))
        run = _Run(plan, staging.files, executor, limit, progress or _silent)
        if staging.notes:
            LOGGER.info("%r: going on with a run that was interrupted", str(target))
        else:
            staging.note(msgspec.json.encode(run.find_thresholds()).decode())
        report = run.prune(decode(staging.notes, _Thresholds, str(target), "delete what the run left"))
        name_files(staging.files, file, shards, is_folder=is_folder)
        if is_folder and Path(src).is_dir():
            companions.copy(Path(src), staging.files, leave=target)
        staging.finish(msgspec.json.encode(report.layers).decode())
        return report


def name_files(files: Path, file: Path, shards: Shards | None, *, is_folder: bool) -> None:
    """Gives the shards in a folder, all of them complete, the names and the index of a checkpoint.

    Other files there, progress marks and leftovers of killed runs, are removed.
    """
    names = {part.name for part in parts_of(file, shards)}
    for path in [path for path in files.iterdir() if path.name not in names]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if shards is not None:
        (files / shards.index_name).write_bytes(file.read_bytes())
    elif is_folder:
        (files / file.name).rename(files / FILE_NAME)


def _silent(what: str, done: int, total: int) -> None:
    """The default progress function."""


def parts_of(file: Path, shards: Shards | None) -> list[Path]:
    """The files with tensors."""
    return [file] if shards is None else [file.parent / shard for shard in shards.metadata]


def target_of(dst: StrPath, shards: Shards | None) -> tuple[Path, bool]:
    """The file or folder to make, and whether it is a folder; ValueError if it would not be readable."""
    target = Path(dst)
    if target.exists() and not (target.is_file() or target.is_dir()):
        msg = f"{target}: expected a file or a directory to write; got a pipe or device; name another"
        raise ValueError(msg)
    if target.suffix.lower() in FILE_KINDS and not target.is_dir():
        msg = (
            f"{target}: expected a directory, or a file of a kind that is written; got a name in "
            f"{target.suffix}, which is not; name a directory, or a file in .safetensors"
        )
        raise ValueError(msg)
    if shards is None and target.is_file():
        return target, False
    if target.is_dir() or target.suffix not in {".safetensors", ".json"}:
        check_readable(target, shards)
        return target, True
    if shards is not None or target.suffix != ".safetensors":
        wanted = "a directory, for several shards" if shards else "a directory, or a name in .safetensors"
        msg = f"{target}: expected {wanted}; got a file's name; name a directory"
        raise ValueError(msg)
    return target, False


def _identity(plan: FilePlan, src: StrPath) -> str:
    """What identifies a run; unique if its configuration cannot be described."""
    try:
        settings = pickle.dumps(plan.config)
    except Exception:  # whatever a class of the user's may raise
        settings = secrets.token_bytes(16)
    digest = hashlib.blake2b(settings, digest_size=16)
    digest.update(os.fsencode(Path(src).resolve()))
    for layout in plan.layouts:
        digest.update(f"{layout.file.name} {layout.size} {layout.mtime_ns}".encode(errors="surrogateescape"))
        digest.update(layout.head)
    return digest.hexdigest()


class _Thresholds(msgspec.Struct):
    """The results of the passes over the shards, kept for a run that is continued. Floats are text.

    Attributes:
        shares: Tensor -> sparsity, of an allocation that reads the weights.
        cuts: Tensor -> threshold and ties kept, in global scope.
    """

    shares: dict[str, str] | None
    cuts: dict[str, tuple[str, int]]


class _Run:
    """The passes over the shards of one plan."""

    def __init__(
        self, plan: FilePlan, files: Path, executor: Executor | None, memory: int, progress: Progress
    ) -> None:
        self._plan = plan
        self._files = files
        self._executor = executor
        self._memory = memory
        self._progress = progress

    def find_thresholds(self) -> _Thresholds:
        """Finds, by passes over the shards, the thresholds that span several tensors."""
        plan = self._plan
        shares: dict[str, float] | None = None
        if pooling := plan.allocation_pooling():
            pruned = self._pruned(pooling)
            # As `Mask.sparsity` computes it.
            shares = {
                name: 1.0 - (size - pruned[name]) / size if size else pooling.sparsity
                for name, size in pooling.sizes.items()
            }
        cuts: dict[str, tuple[str, int]] = {}
        for pool in plan.pools(shares):
            if pooling := plan.pooling(pool):
                found = self._threshold(pooling).cuts(pooling.k, pooling.names)
                cuts |= {name: (cut.value.hex(), cut.ties_kept) for name, cut in found.items()}
        words = None if shares is None else {name: share.hex() for name, share in shares.items()}
        return _Thresholds(words, cuts)

    def prune(self, thresholds: _Thresholds) -> Report:
        """Prunes every shard into the folder of the files."""
        shares = thresholds.shares
        numbers = None if shares is None else {name: float.fromhex(share) for name, share in shares.items()}
        alone: dict[str, Pool] = {}
        cuts: dict[str, tuple[Cut, Ranking]] = {}
        shown: dict[str, str] = {}
        for pool in self._plan.pools(numbers):
            shown |= dict.fromkeys(pool.names, str(pool.pattern))
            if pooling := self._plan.pooling(pool):
                for name in pool.names:
                    value, ties = thresholds.cuts[name]
                    cuts[name] = Cut(float.fromhex(value), ties), pooling.ranking
            else:
                scope = "layer" if pool.scope == "global" else pool.scope
                alone |= {name: replace(pool, names=(name,), scope=scope) for name in pool.names}
        run = secrets.token_hex(4)
        tasks = []
        for layout in self._plan.layouts:
            names = [entry.name for entry in layout.entries]
            tasks.append(
                PruneTask(
                    layout,
                    self._files / layout.file.name,
                    self._plan.method,
                    {name: alone[name] for name in names if name in alone},
                    {name: cuts[name] for name in names if name in cuts},
                    {name: shown[name] for name in names if name in shown},
                    self._memory,
                    run,
                )
            )
        layers = [layer for part in self._map("pruning", prune_shard, tasks) for layer in part]
        return Report(sorted(layers, key=lambda layer: layer.name))

    def _pruned(self, pooling: Pooling) -> dict[str, int]:
        """How many of each tensor a threshold prunes."""
        found = self._threshold(pooling)
        cuts = found.cuts(pooling.k, pooling.names)
        return {n: found.below[n] + found.equal[n] - cuts[n].ties_kept for n in pooling.names}

    def _threshold(self, pooling: Pooling) -> Found:
        """The threshold of tensors in several shards."""
        sizes, total = pooling.sizes, sum(pooling.sizes.values())
        layouts = [
            layout for layout in self._plan.layouts if any(entry.name in sizes for entry in layout.entries)
        ]
        room = max(self._memory // 64, 1 << 14)  # float32 in a sixteenth of the memory
        drawn = (
            min(max(_SAMPLED, 9 * (total // room) ** 2), room, 1 << 24)
            if pooling.ranking.reads_weights
            else _SAMPLED
        )
        wanted = {
            name: max(RUN, drawn * size // max(total, 1)) if size else 0 for name, size in sizes.items()
        }
        rooms = {name: 64 + room * size // max(total, 1) for name, size in sizes.items()}

        def sample(attempt: int) -> NDArray[np.float64]:
            tasks = [
                SampleTask(layout, pooling.ranking, _of(wanted, layout), attempt * len(layouts) + i)
                for i, layout in enumerate(layouts)
            ]
            return np.concatenate(self._map("sampling", sample_shard, tasks))

        def count(low: float, high: float) -> dict[str, Counts]:
            tasks = [CountTask(layout, pooling.ranking, low, high, _of(rooms, layout)) for layout in layouts]
            parts = self._map("counting", count_shard, tasks)
            together = {name: counts for part in parts for name, counts in part.items()}
            return {name: together[name] for name in pooling.names}

        return find_threshold(pooling.k, sizes, sample, count)

    def _map(self, what: str, function: Callable[..., _ResultT], tasks: Sequence[_TaskT]) -> list[_ResultT]:
        """The results of tasks, one for each shard, in their order."""
        sizes = [task.layout.size for task in tasks]  # type: ignore[attr-defined]
        total, done = sum(sizes), 0

        def advance(size: int) -> None:
            nonlocal done
            done += size
            self._progress(what, min(done, total), total)

        advance(0)
        if self._executor is None:
            results = []
            for i, task in enumerate(tasks):
                results.append(function(task, advance))
                done = sum(sizes[:i])
                advance(sizes[i])
            return results
        futures = {self._executor.submit(function, task): i for i, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                future.result()
                advance(sizes[futures[future]])
        finally:
            for future in futures:
                future.cancel()
        return [future.result() for future in futures]


def _of(values: dict[str, int], layout: Layout) -> dict[str, int]:
    return {entry.name: values[entry.name] for entry in layout.entries if entry.name in values}
