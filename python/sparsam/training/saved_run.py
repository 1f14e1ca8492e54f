"""The state of an iterative run on disk, such that a kill at any moment loses at most the iteration at hand.

Each iteration writes its weights and masks into a folder of their own (`sparsam-0003`), then replaces
`state.json`, whose history says which folder counts, and only then removes the folder of the one before. So
what `state.json` speaks of is always whole. docs/formats.md describes the files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsam import checkpoint, scores
from sparsam.checkpoint.atomic import publish
from sparsam.config import PruningConfig
from sparsam.masks import Mask
from sparsam.patterns import Tied
from sparsam.statistics import InputStatistics

_VERSION = 1
_CHUNK = 1 << 18
_WEIGHTS = "weights.safetensors"
_MASKS = "masks.safetensors"
_FIELDS = ("sparsam_state", "identity", "dense_score", "history", "failed")
_FOLDER = re.compile(r"sparsam-\d{4,}")
# What a folder holds: the two files, and what a killed process may leave of them.
_OURS = re.compile(r"(weights|masks)\.safetensors|\.(weights|masks)\.safetensors\.\w{8}\.tmp|\.tmp\w{6}")


class HistoryRow(NamedTuple):
    """One iteration.

    Attributes:
        iteration: Counts from 1.
        sparsity: The share of weights that are pruned, over the tensors that are being pruned.
        score: What `eval_fn` returned.
        seconds: What pruning, recovery and evaluation took together.
    """

    iteration: int
    sparsity: float
    score: float
    seconds: float


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        dense_score: The score of the dense weights.
        history: The good iterations.
        failed: The iteration that stopped the run.
        weights: The weights of the last good iteration; None before the first.
        masks: Their masks; None before the first.
    """

    dense_score: float
    history: tuple[HistoryRow, ...] = ()
    failed: HistoryRow | None = None
    weights: dict[str, NDArray[Any]] | None = None
    masks: dict[str, Mask] | None = None

    def rows(self) -> list[HistoryRow]:
        """All rows: the good iterations, and the one that stopped the run."""
        return [*self.history] + ([self.failed] if self.failed else [])


@dataclass(frozen=True)
class Limits:
    """When to stop. A score that is NaN fails every limit."""

    min_score: float | None
    max_drop: float | None

    def __post_init__(self) -> None:
        for name, value in (("min_score", self.min_score), ("max_drop", self.max_drop)):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value)
            ):
                msg = f"{name}: expected a number; got {value!r}"
                raise ValueError(msg)
        if self.max_drop is not None and self.max_drop < 0:
            msg = f"max_drop: expected a drop of at least 0; got {self.max_drop!r}"
            raise ValueError(msg)

    def fails(self, score: float, dense_score: float) -> bool:
        """Whether a score is too low."""
        too_low = self.min_score is not None and not score >= self.min_score
        return too_low or (self.max_drop is not None and not dense_score - score <= self.max_drop)

    def applied(self, progress: Progress) -> Progress:
        """The progress under these limits: other ones may have stopped it, or let it go on."""
        rows = progress.rows()
        bad = next((row for row in rows if self.fails(row.score, progress.dense_score)), None)
        if bad is None or bad is progress.failed:
            return replace(progress, failed=bad)
        if bad is rows[0]:
            return Progress(progress.dense_score, failed=bad)
        msg = (
            f"state_dir: iteration {bad.iteration} of {len(rows)} has the score {bad.score}, which fails "
            f"min_score={self.min_score} or max_drop={self.max_drop}, but the weights before it are gone; "
            "loosen the limits, or name another state_dir"
        )
        raise ValueError(msg)


class StateDir(AbstractContextManager["StateDir"]):
    """A folder that holds the progress of one run, and that one run at a time may use: a context manager."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Makes the folder if needed and locks it; `identity` is what `identify` says of the run.

        Raises:
            ValueError: Another run is using it.
        """
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._state = path / "state.json"
        self._identity = identity
        self._lock = (path / "state.lock").open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            msg = f"{path} is in use by another run; wait for that to end, or name another state_dir"
            raise ValueError(msg) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def load(self, dense: Mapping[str, NDArray[Any]], pruned: Collection[str]) -> Progress | None:
        """Returns the progress that the folder holds, None if it holds none.

        Args:
            dense: The weights of the run.
            pruned: The names of those that have masks.

        Raises:
            ValueError: It belongs to another run, is damaged, or is no state of ours.
        """
        if not self._state.exists():
            return None
        try:
            state = json.loads(self._state.read_bytes())
            version, identity = state["sparsam_state"], dict(state["identity"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            msg = f"{self._state} is not the state of an iterative run; name another state_dir"
            raise ValueError(msg) from error
        if version != _VERSION:
            msg = f"{self._state} has version {version}, not {_VERSION}; name another state_dir"
            raise ValueError(msg)
        differences = _differences(identity, self._identity)
        if differences:
            msg = f"{self._path} holds another run, name another state_dir: {'; '.join(differences)}"
            raise ValueError(msg)
        try:
            progress = self._read(state, dense, pruned)
        except (ValueError, TypeError, OverflowError, FileNotFoundError) as error:
            msg = f"{self._state} is damaged; delete it to start anew, or name another state_dir: {error}"
            raise ValueError(msg) from error
        self._remove_others(len(progress.history))
        return progress

    def save(self, progress: Progress) -> None:
        """Puts `progress` in the place of what the folder holds, wholly or not at all."""
        if progress.weights is not None and progress.masks is not None and not progress.failed:
            folder = self._folder(len(progress.history))
            folder.mkdir(exist_ok=True)
            packed = {name: np.frombuffer(mask.to_bytes(), np.uint8) for name, mask in progress.masks.items()}
            checkpoint.save(folder / _WEIGHTS, progress.weights)
            checkpoint.save(folder / _MASKS, packed)
        values = (_VERSION, self._identity, progress.dense_score, progress.history, progress.failed)
        text = json.dumps(dict(zip(_FIELDS, values, strict=True)), indent=1)
        publish({self._state: lambda path: path.write_text(text, encoding="utf-8")})
        self._remove_others(len(progress.history))

    def _folder(self, iteration: int) -> Path:
        return self._path / f"sparsam-{iteration:04d}"

    def _read(
        self, state: Mapping[str, Any], dense: Mapping[str, NDArray[Any]], pruned: Collection[str]
    ) -> Progress:
        """What the fields and the files say; an error for what cannot be right."""
        if absent := [field for field in _FIELDS if field not in state]:
            msg = f"it lacks {absent[0]!r}"
            raise ValueError(msg)
        history = tuple(_row(values, i) for i, values in enumerate(state["history"], start=1))
        failed = None if state["failed"] is None else _row(state["failed"], len(history) + 1)
        progress = Progress(float(state["dense_score"]), history, failed)
        if not history:
            return progress
        folder = self._folder(len(history))
        weights = checkpoint.load(folder / _WEIGHTS).weights
        packed = checkpoint.load(folder / _MASKS).weights
        masks = {name: Mask.from_bytes(packed[name].tobytes()) for name in dense if name in packed}
        if _kinds(weights) != _kinds(dense):
            msg = f"{folder / _WEIGHTS} holds other tensors than the run"
            raise ValueError(msg)
        if {name: mask.shape for name, mask in masks.items()} != {name: dense[name].shape for name in pruned}:
            msg = f"{folder / _MASKS} holds other masks than the run"
            raise ValueError(msg)
        return replace(progress, weights={name: weights[name] for name in dense}, masks=masks)

    def _remove_others(self, iteration: int) -> None:
        """Removes what earlier iterations and killed processes left behind, and nothing that is not ours."""
        for folder in self._path.glob("sparsam-[0-9]*"):
            ours = _FOLDER.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
            if ours and folder != self._folder(iteration):
                for file in folder.iterdir():
                    if _OURS.fullmatch(file.name):
                        file.unlink()
                with suppress(OSError):
                    folder.rmdir()
        for temporary in self._path.glob(".state.json.????????.tmp"):
            temporary.unlink()


def _row(values: Sequence[Any], iteration: int) -> HistoryRow:
    number, *measured = values
    sparsity, score, seconds = map(float, measured)
    if number != iteration:
        msg = f"iteration {number!r} stands in the place of {iteration}"
        raise ValueError(msg)
    return HistoryRow(iteration, sparsity, score, seconds)


def _kinds(weights: Mapping[str, NDArray[Any]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (array.dtype.name, array.shape) for name, array in weights.items()}


def identify(
    config: PruningConfig, schedule: Sequence[float], weights: Mapping[str, NDArray[Any]]
) -> dict[str, Any]:
    """Returns what makes a run the same: its configuration, its schedule as numbers, its dense weights."""
    return {
        "method": _described(scores.resolve(config.method)),
        "pattern": str(config.pattern),
        "scope": config.scope,
        "allocation": config.allocation
        if isinstance(config.allocation, str)
        else _content(config.allocation),
        "exclude": list(config.exclude),
        "overrides": [[pattern, repr(value)] for pattern, value in config.overrides.items()],
        "ties": [_tied(tied) for tied in config.ties],
        "schedule": list(schedule),
        "weights": {name: _digest(array) for name, array in weights.items()},
    }


def _tied(tied: Tied) -> dict[str, Any]:
    members = {name: str(slices) for name, slices in tied.members.items()}
    return {"members": members, "scored": None if tied.scored is None else sorted(tied.scored)}


def _described(value: object) -> str:
    """The repr of a value, or the name of its class where the repr would hold an address.

    Arrays and statistics that its fields hold by name are told apart by their content.
    """
    kind = type(value)
    if is_dataclass(value):
        held = [(field.name, getattr(value, field.name)) for field in fields(value) if field.init]
        if any(isinstance(content, Mapping) for _, content in held):
            inner = ", ".join(f"{name}={_content(content)}" for name, content in held)
            return f"{kind.__qualname__}({inner})"
    return f"{kind.__module__}.{kind.__qualname__}" if kind.__repr__ is object.__repr__ else repr(value)


def _content(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name!r}: {_content(entry)}' for name, entry in value.items())}}}"
    if isinstance(value, InputStatistics):
        return f"{value.count} inputs {_digest(value.sum_squares)}"
    if isinstance(value, (np.ndarray, list)) or hasattr(value, "__array__"):
        return _digest(np.asarray(value))
    return _described(value)


def _digest(array: NDArray[Any]) -> str:
    """A hash of dtype, shape and the elements in C order, whatever the memory layout."""
    digest = hashlib.blake2b(f"{array.dtype.name} {array.shape}".encode(), digest_size=16)
    for start in range(0, array.size, _CHUNK):
        digest.update(array.flat[start : start + _CHUNK].tobytes())
    return digest.hexdigest()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two runs, in words."""
    keys = [key for key in now if key != "weights" and before.get(key) != now[key]]
    fields = [f"{key} was {before.get(key)}, now {now[key]}" for key in keys]
    old, new = before.get("weights", {}), now["weights"]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return fields + ([f"the dense weights differ in {', '.join(map(repr, names[:5]))}"] if names else [])
