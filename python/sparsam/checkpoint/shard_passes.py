"""Work on one shard: draw a sample of it, count its scores, prune it into another file.

Each is a task that any executor can run: it takes paths and numbers, and returns numbers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from sparsam import _core
from sparsam.checkpoint.atomic import publish, short
from sparsam.checkpoint.direct_writes import DirectWrites, block_for, write_all
from sparsam.checkpoint.json_state import decode
from sparsam.checkpoint.layout import Entry, Layout
from sparsam.checkpoint.locks import locked
from sparsam.checkpoint.ranking_passes import RUN, Counts, Cut, Ranking, run_starts
from sparsam.config import Scorer
from sparsam.inputs.dtypes import check_dtype
from sparsam.inputs.weights import warn_of_flags
from sparsam.pools import Pool
from sparsam.pruner import prune_pools
from sparsam.report import LayerStats, count_nonzero, measure

__all__ = [
    "Advance",
    "CountTask",
    "PruneTask",
    "SampleTask",
    "count_shard",
    "needed",
    "prune_shard",
    "read_tensor",
    "sample_shard",
]

PIECE = 1 << 24
"""Neighbouring tensors are read and written in pieces of this many bytes, less than a shared cache."""

_BLOCK = 1 << 18
"""This many bytes, of whole elements, are counted at a time: they stay in the cache of a core."""

_MARK = 1 << 30
"""After this many bytes the file is flushed, and a resumed run continues from there."""


Advance: TypeAlias = Callable[[int], object]
"""Called with the number of bytes of a file that were processed since the last call."""


def _nothing(size: int) -> None:
    """The default progress function."""


class Part(NamedTuple):
    """A tensor, or a stretch of one that is only copied; `begin` and `end` count bytes of the file."""

    entry: Entry
    begin: int
    end: int


@dataclass(frozen=True)
class SampleTask:
    """Draw from the tensors of a pool: name -> how many scores."""

    layout: Layout
    ranking: Ranking
    wanted: Mapping[str, int]
    seed: int


@dataclass(frozen=True)
class CountTask:
    """Count the scores of a pool around two values; `room`: name -> how many between may be collected."""

    layout: Layout
    ranking: Ranking
    low: float
    high: float
    room: Mapping[str, int]


@dataclass(frozen=True)
class PruneTask:
    """Prune a shard.

    Attributes:
        layout: The shard.
        target: The file to make, complete or not at all.
        method: The scorer.
        pools: Tensor -> its pool, for those that are decided by themselves.
        cuts: Tensor -> what is pruned of it, and its ranking, for those of a global threshold.
        shown: Tensor -> its pattern as text.
        memory: Bytes for the buffers.
        run: A string unique to this run, for the names of temporary files.
        values: Tensor -> a function that returns its new values, in its shape and dtype, for fitted ones.
    """

    layout: Layout
    target: Path
    method: Scorer
    pools: Mapping[str, Pool]
    cuts: Mapping[str, tuple[Cut, Ranking]]
    shown: Mapping[str, str]
    memory: int
    run: str
    values: Mapping[str, Callable[[], NDArray[Any]]] = field(default_factory=dict)


def sample_shard(task: SampleTask, advance: Advance = _nothing) -> NDArray[np.float64]:
    """Returns scores of a shard, as magnitudes in float64."""
    drawn: list[NDArray[np.float64]] = []
    entries = [entry for entry in task.layout.entries if task.wanted.get(entry.name)]
    with task.layout.file.open("rb", buffering=0) as source:
        for i, entry in enumerate(entries):
            wanted, seed = task.wanted[entry.name], task.seed * 1_000_003 + i
            if task.ranking.reads_weights:
                runs = _read_runs(source, entry, wanted, seed)
            else:
                values = task.ranking.values(entry.name, read_tensor(source, entry)).reshape(-1)
                starts = run_starts(values.size, wanted, seed)
                runs = values[np.minimum(starts[:, None] + np.arange(RUN), values.size - 1)].reshape(-1)
            drawn.append(np.abs(runs.astype(np.float64)))
            advance(entry.nbytes)
    found = np.concatenate(drawn) if drawn else np.empty(0)
    return found[~np.isnan(found)]


def count_shard(task: CountTask, advance: Advance = _nothing) -> dict[str, Counts]:
    """Returns the counts of the scores of each tensor of a shard around two values."""
    counts: dict[str, Counts] = {}
    entries = [entry for entry in task.layout.entries if entry.name in task.room]
    whole = [entry.nbytes for entry in entries if not task.ranking.reads_weights]
    buffer = np.empty(max(whole, default=0), np.uint8)
    with task.layout.file.open("rb", buffering=0) as source:
        for entry in entries:
            room, found = task.room[entry.name], None
            if task.ranking.reads_weights:
                found = _count_blocks(task, entry, _blocks(source, entry), room)
            if found is None:
                array = read_tensor(source, entry, buffer if entry.nbytes <= buffer.size else None)
                found = task.ranking.count(entry.name, array, task.low, task.high, room)
            counts[entry.name] = found
            advance(entry.nbytes)
    return counts


def _blocks(source: BinaryIO, entry: Entry) -> Iterator[NDArray[Any]]:
    """The elements of a tensor in blocks, each read into the memory of the last one, which stays cached.

    They are not mapped: a file that is cut short meanwhile would end the process (SIGBUS).
    """
    kind = np.dtype(entry.numpy_dtype)
    buffer = np.empty(min(_BLOCK, entry.nbytes), np.uint8)
    for begin in range(entry.begin, entry.end, _BLOCK):
        block = buffer[: min(_BLOCK, entry.end - begin)]
        _read_into(source, begin, block)
        yield block.view(kind)


def _count_blocks(task: CountTask, entry: Entry, blocks: Iterator[NDArray[Any]], room: int) -> Counts | None:
    """Counts a tensor block by block; None if it has NaN, of which the whole tensor tells the place."""
    check_dtype(entry.name, np.empty(0, entry.numpy_dtype))
    below = equal = inside = 0
    parts: list[NDArray[Any]] = []
    for block in blocks:
        counted = _core.bracket(block, task.low, task.high, room)
        if counted is None:
            return None
        below, equal, inside = below + counted[0], equal + counted[1], inside + counted[2]
        if counted[3] is not None and inside <= room:
            parts.append(counted[3].copy())
    if inside > room:
        return Counts(below, equal, inside, None)
    empty = np.empty(0, entry.numpy_dtype)
    return Counts(below, equal, inside, np.concatenate(parts) if parts else empty)


class _Progress(msgspec.Struct):
    """How far a file is written: bytes that are on the disk, and the statistics of the tensors in them."""

    written: int
    layers: list[LayerStats]


def prune_shard(task: PruneTask, advance: Advance = _nothing) -> list[LayerStats]:
    """Writes a shard with its weights pruned and all else unchanged; returns the statistics of its tensors.

    The file is flushed to the disk before it gets its name. It continues what a killed run wrote of it.
    """
    done = task.target.with_name(_stem(task) + ".done")
    if task.target.exists() and done.exists():
        return decode(done.read_bytes(), _Progress, str(done), "delete it").layers
    part = task.target.with_name(f"{_stem(task)}.{task.run}.part")
    begun = _take_over(task, part)
    with locked(part), part.open("r+b" if part.exists() else "w+b", buffering=0) as target:
        target.truncate(begun.written)
        layers = _write_shard(task, target, begun, part, advance)
    _write_json(done, _Progress(task.layout.size, layers))
    part.replace(task.target)
    _mark_of(part).unlink(missing_ok=True)
    return layers


def _stem(task: PruneTask) -> str:
    """What the names of files beside the target begin with; they fit into the 255 bytes of a name."""
    name = task.target.name
    return name if len(os.fsencode(name)) <= 200 else short(name)


def _take_over(task: PruneTask, part: Path) -> _Progress:
    """Renames what a killed run has left of this shard to `part`, and returns how far it is complete."""
    for mark in part.parent.glob(f"{escape(_stem(task))}.*.part.mark"):
        other = mark.with_suffix("")
        if not other.is_file():
            continue
        with locked(other) as free:
            if not free:  # a worker that outlived its run still writes it; it will end with the same bytes
                continue
            begun = decode(mark.read_bytes(), _Progress, str(mark), "delete it")
            if begun.written <= other.stat().st_size:
                mark.replace(_mark_of(part))
                other.replace(part)
                return begun
    return _Progress(0, [])


def _mark_of(part: Path) -> Path:
    return part.with_name(part.name + ".mark")


def _write_shard(
    task: PruneTask, target: BinaryIO, begun: _Progress, part: Path, advance: Advance
) -> list[LayerStats]:
    """Writes what is missing of a shard to the disk, reading and pruning a piece while another is written."""
    layers, at = list(begun.layers), begun.written
    if not at:
        write_all(target, task.layout.head)
        at = len(task.layout.head)
    marked = at
    pieces = list(_pieces(task, len(layers)))
    largest = max((piece[-1].end - piece[0].begin for piece in pieces), default=0)
    buffers = [block_for(largest) for _ in range(2 if needed(largest, 2) <= task.memory else 1)]
    writes: list[Future[None]] = []
    copied: dict[str, int] = {}
    with (
        closing(DirectWrites(target)) as output,
        task.layout.file.open("rb", buffering=0) as source,
        ThreadPoolExecutor(1) as writer,
    ):
        for i, piece in enumerate(pieces):
            if i >= len(buffers):
                writes[i - len(buffers)].result()
            begin = piece[0].begin
            data = output.room(buffers[i % len(buffers)], begin, piece[-1].end - begin)
            _read_into(source, begin, data)
            layers += _prune_piece(task, piece, data, copied)
            writes.append(writer.submit(output.write, data, begin))
            advance(len(data))
            at = piece[-1].end
            if at - marked >= _MARK and at == piece[-1].entry.end:
                writes[-1].result()
                os.fsync(target.fileno())
                _write_json(_mark_of(part), _Progress(at, layers))
                marked = at
        for write in writes[-len(buffers) :]:
            write.result()
        os.fsync(target.fileno())  # before `output` closes: that ends this process's lock on the file
    return layers


def needed(largest: int, buffers: int = 1) -> int:
    """Returns the bytes of the buffers, and of what pruning one of them needs in addition."""
    return buffers * largest + largest // 5


def _write_json(file: Path, progress: _Progress) -> None:
    text = msgspec.json.encode(progress)
    publish({file: lambda path: path.write_bytes(text)})


def _pieces(task: PruneTask, done: int) -> Iterator[list[Part]]:
    """The tensors except the first `done`, in pieces; large ones that are only copied are divided."""
    limit = min(PIECE, max(task.memory // 4, 1 << 16))
    piece: list[Part] = []
    for entry in task.layout.entries[done:]:
        chosen = any(entry.name in those for those in (task.pools, task.cuts, task.values))
        step = max(entry.nbytes if chosen else limit, 1)
        for begin in range(entry.begin, max(entry.end, entry.begin + 1), step):
            part = Part(entry, begin, min(begin + step, entry.end))
            if piece and part.end - piece[0].begin > limit:
                yield piece
                piece = []
            piece.append(part)
    if piece:
        yield piece


def _prune_piece(
    task: PruneTask, piece: Sequence[Part], data: NDArray[np.uint8], copied: dict[str, int]
) -> list[LayerStats]:
    """Prunes the tensors of a piece in place; returns the statistics of those that end in it."""
    start = piece[0].begin
    arrays = {part.entry.name: _view(data[part.begin - start : part.end - start], part) for part in piece}
    alone = {name: array for name, array in arrays.items() if name in task.pools}
    warn_of_flags(arrays, [name for name in arrays if name in task.shown], stacklevel=2)
    pools = [task.pools[name] for name in alone]
    masks, nonzero = prune_pools(alone, pools, task.method, alone, checked=True)
    pruned = {name: mask.size - mask.count for name, mask in masks.items()}
    nonzero = dict(nonzero)
    for name, array in arrays.items():
        if name in task.cuts:
            cut, ranking = task.cuts[name]
            pruned[name], nonzero[name] = ranking.apply(name, array, cut)
        elif name in task.values:
            array[...] = task.values[name]()
            nonzero[name] = count_nonzero(array)
            pruned[name] = array.size - nonzero[name] if name in task.shown else 0
    layers = []
    for entry, begin, end in piece:
        name, kind = entry.name, entry.numpy_dtype
        if kind is not None and (begin, end) != (entry.begin, entry.end):
            copied[name] = copied.get(name, 0) + count_nonzero(arrays[name])
        if end < entry.end:
            continue
        if kind is None:
            params, size = math.prod(entry.shape), entry.nbytes
            shown = entry.dtype.lower()
            layers.append(LayerStats(name, params, 0, 0.0, entry.shape, shown, "dense", size, size))
            continue
        array = np.broadcast_to(np.zeros((), kind), entry.shape) if name in copied else arrays[name]
        known = nonzero.get(name, copied.pop(name, None))
        pattern = task.shown.get(name, "dense")
        layers.append(measure(name, array, pruned=pruned.get(name, 0), nonzero=known, pattern=pattern))
    return layers


def _view(data: NDArray[np.uint8], part: Part) -> NDArray[Any]:
    """The bytes of a part as an array of their dtype, uint8 if NumPy lacks it."""
    kind = part.entry.numpy_dtype
    if kind is None:
        return data
    whole = (part.begin, part.end) == (part.entry.begin, part.entry.end)
    return data.view(kind).reshape(part.entry.shape if whole else -1)


def read_tensor(source: BinaryIO, entry: Entry, buffer: NDArray[np.uint8] | None = None) -> NDArray[Any]:
    """A tensor of a file; it lies in the buffer, if one is given."""
    data = np.empty(entry.nbytes, np.uint8) if buffer is None else buffer[: entry.nbytes]
    _read_into(source, entry.begin, data)
    return _view(data, Part(entry, entry.begin, entry.end))


def _read_runs(source: BinaryIO, entry: Entry, wanted: int, seed: int) -> NDArray[Any]:
    """Runs of a tensor's elements, without reading the others."""
    kind = np.dtype(entry.numpy_dtype)
    starts = run_starts(entry.nbytes // kind.itemsize, wanted, seed)
    found = np.empty((len(starts), min(RUN, entry.nbytes // kind.itemsize)), kind)
    for row, start in zip(found.view(np.uint8), starts.tolist(), strict=True):
        _read_into(source, entry.begin + start * kind.itemsize, row)
    return found.reshape(-1)


def _read_into(source: BinaryIO, begin: int, data: NDArray[np.uint8]) -> None:
    source.seek(begin)
    view, done = memoryview(data), 0  # type: ignore[arg-type]
    while done < len(view):
        count = source.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise ValueError(_cut_short(source))
        done += count


def _cut_short(source: BinaryIO) -> str:
    return f"{source.name}: expected a file that stays as it is; got one that was cut short; run it again"
