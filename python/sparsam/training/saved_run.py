"""The state of an iterative run on disk: a kill at any moment loses at most the current iteration.

Each iteration writes its weights and masks into a folder of their own (`sparsam-0003`), then replaces
`state.json`, whose history says which folder counts, and only then removes the folder of the one before. So
the folder that `state.json` names is always complete. docs/formats.md describes the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparsam import checkpoint
from sparsam.checkpoint.atomic import open_folder, publish, remove_abandoned
from sparsam.checkpoint.json_state import (
    Count,
    Document,
    Number,
    Seconds,
    Share,
    from_number,
    read,
    to_number,
)
from sparsam.checkpoint.locks import locked
from sparsam.inputs.checks import is_number
from sparsam.masks import Mask
from sparsam.training.run_identity import RunIdentity

_WEIGHTS = "weights.safetensors"
_MASKS = "masks.safetensors"
_ANOTHER = "name another state_dir"
_REMEDY = f"delete it to start again, or {_ANOTHER}"
_FOLDER = re.compile(r"sparsam-\d{4,}")
# The content of a folder: the two files, and temporary ones that a killed process may leave.
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
    """The progress of a run.

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
            if value is not None and (not is_number(value) or math.isnan(value)):
                msg = f"{name}: expected a number; got {value!r}; pass a score, or leave it out"
                raise ValueError(msg)
        if self.max_drop is not None and self.max_drop < 0:
            msg = (
                f"max_drop: expected a drop of at least 0; got {self.max_drop!r}; pass how far the score may "
                "fall"
            )
            raise ValueError(msg)

    def fails(self, score: float, dense_score: float) -> bool:
        """Whether a score is too low."""
        too_low = self.min_score is not None and not score >= self.min_score
        return too_low or (self.max_drop is not None and not dense_score - score <= self.max_drop)

    def applied(self, progress: Progress) -> Progress:
        """The progress under these limits, which may stop it earlier or later than those of the first run."""
        rows = progress.rows()
        bad = next((row for row in rows if self.fails(row.score, progress.dense_score)), None)
        if bad is None or bad is progress.failed:
            return replace(progress, failed=bad)
        if bad is rows[0]:
            return Progress(progress.dense_score, failed=bad)
        msg = (
            f"state_dir: expected scores within min_score={self.min_score} and max_drop={self.max_drop}; got "
            f"{bad.score} in iteration {bad.iteration} of {len(rows)}, and the weights before it are gone; "
            f"loosen the limits, or {_ANOTHER}"
        )
        raise ValueError(msg)


Row: TypeAlias = tuple[Count, Share, Number, Seconds]
"""A `HistoryRow` as JSON holds it."""


class _State(Document, frozen=True):
    """The content of `state.json`."""

    WHAT: ClassVar[str] = "the state of an iterative run"
    MARK: ClassVar[str] = "sparsam_state"

    identity: RunIdentity
    dense_score: Number
    history: list[Row]
    failed: Row | None


class StateDir(AbstractContextManager["StateDir"]):
    """A folder that holds the progress of one run, and that one run at a time may use: a context manager."""

    def __init__(self, path: Path, identity: RunIdentity) -> None:
        """Makes the folder if needed and locks it.

        Raises:
            ValueError: Another run is using it, or it is a file.
        """
        open_folder("state_dir", path)
        self._path = path
        self._state = path / "state.json"
        self._identity = identity
        self._lock = locked(path / "state.lock")
        if not self._lock.__enter__():
            msg = f"{path}: expected a free folder; got one in use by another run; wait, or {_ANOTHER}"
            raise ValueError(msg)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, trace)

    def load(self, dense: Mapping[str, NDArray[Any]], pruned: Collection[str]) -> Progress | None:
        """Returns the progress that the folder holds, None if it holds none.

        Args:
            dense: The weights of the run.
            pruned: The names of those that have masks.

        Raises:
            ValueError: It belongs to another run, is damaged, or is not a saved state.
        """
        if not self._state.exists():
            return None
        state = _State.from_json(read(self._state, _REMEDY), str(self._state), _REMEDY)
        if differences := self._identity.differences(state.identity):
            listed = "; ".join(differences)
            msg = f"{self._path}: expected the state of this run; got another run's: {listed}; {_ANOTHER}"
            raise ValueError(msg)
        progress = self._read(state, dense, pruned)
        self._remove_others(len(progress.history))
        return progress

    def save(self, progress: Progress) -> None:
        """Replaces the content of the folder by `progress`, atomically."""
        if progress.weights is not None and progress.masks is not None and not progress.failed:
            folder = self._folder(len(progress.history))
            folder.mkdir(exist_ok=True)
            packed = {name: np.frombuffer(mask.to_bytes(), np.uint8) for name, mask in progress.masks.items()}
            checkpoint.save(folder / _WEIGHTS, progress.weights)
            checkpoint.save(folder / _MASKS, packed)
        text = _State(
            identity=self._identity,
            dense_score=to_number(progress.dense_score),
            history=[_stored(row) for row in progress.history],
            failed=None if progress.failed is None else _stored(progress.failed),
        ).to_json()
        publish({self._state: lambda path: path.write_text(text, encoding="utf-8")})
        self._remove_others(len(progress.history))

    def _folder(self, iteration: int) -> Path:
        return self._path / f"sparsam-{iteration:04d}"

    def _read(self, state: _State, dense: Mapping[str, NDArray[Any]], pruned: Collection[str]) -> Progress:
        """The progress from the fields and the files; ValueError if they contradict each other."""
        rows = state.history if state.failed is None else [*state.history, state.failed]
        for i, (iteration, *_) in enumerate(rows, start=1):
            if iteration != i:
                field = "failed[0]" if i > len(state.history) else f"history[{i - 1}][0]"
                msg = f"{self._state}: field {field}: expected iteration {i}; got {iteration}; {_REMEDY}"
                raise ValueError(msg)
        history = tuple(map(_restored, state.history))
        failed = None if state.failed is None else _restored(state.failed)
        progress = Progress(from_number(state.dense_score), history, failed)
        if not history:
            return progress
        folder = self._folder(len(history))
        try:
            weights = checkpoint.load(folder / _WEIGHTS).weights
            packed = checkpoint.load(folder / _MASKS).weights
            masks = {name: Mask.from_bytes(packed[name].tobytes()) for name in dense if name in packed}
        except (ValueError, TypeError, OverflowError, OSError) as error:
            msg = f"{folder}: expected the weights and masks of {self._state}; got {error}; {_REMEDY}"
            raise ValueError(msg) from error
        if _kinds(weights) != _kinds(dense):
            msg = f"{folder / _WEIGHTS}: expected the tensors of the run; got others; {_REMEDY}"
            raise ValueError(msg)
        if {name: mask.shape for name, mask in masks.items()} != {name: dense[name].shape for name in pruned}:
            msg = f"{folder / _MASKS}: expected the masks of the run; got others; {_REMEDY}"
            raise ValueError(msg)
        return replace(progress, weights={name: weights[name] for name in dense}, masks=masks)

    def _remove_others(self, iteration: int) -> None:
        """Removes folders of earlier iterations and files of killed processes, and nothing else."""
        for folder in self._path.glob("sparsam-[0-9]*"):
            ours = _FOLDER.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
            if ours and folder != self._folder(iteration):
                for file in folder.iterdir():
                    if _OURS.fullmatch(file.name):
                        _remove(file)
                with suppress(OSError):
                    folder.rmdir()
        for temporary in self._path.glob(".state.json.????????.tmp"):
            _remove(temporary)


def _remove(path: Path) -> None:
    """Removes a file, or a folder of temporary files whose process is gone."""
    if path.is_dir() and not path.is_symlink():
        remove_abandoned(path)
    else:
        path.unlink()


def _stored(row: HistoryRow) -> Row:
    return row.iteration, row.sparsity, to_number(row.score), row.seconds


def _restored(row: Row) -> HistoryRow:
    iteration, sparsity, score, seconds = row
    return HistoryRow(iteration, sparsity, from_number(score), seconds)


def _kinds(weights: Mapping[str, NDArray[Any]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (array.dtype.name, array.shape) for name, array in weights.items()}
