"""The state of an iterative run on disk, such that a kill at any moment loses at most the iteration at hand.

Each iteration writes its weights and masks into a folder of their own (`sparsam-0003`), then replaces
`state.json`, which names that folder, and only then removes the folder of the one before. So what
`state.json` names is always whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsam import checkpoint, scores
from sparsam._atomic import publish
from sparsam.config import PruningConfig
from sparsam.masks import Mask

_VERSION = 1
_CHUNK = 1 << 18
_WEIGHTS = "weights.safetensors"
_MASKS = "masks.safetensors"


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


class StateDir:
    """A folder that holds the progress of one run."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Makes the folder if needed; `identity` is what `identify` says of the run."""
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._state = path / "state.json"
        self._identity = identity
        self._folder: str | None = None

    def load(self) -> Progress | None:
        """Returns the progress that the folder holds, None if it holds none.

        Raises:
            ValueError: It belongs to another run, or is no state of ours.
        """
        if not self._state.exists():
            return None
        try:
            state = json.loads(self._state.read_bytes())
            version, identity = state["sparsam_state"], dict(state["identity"])
        except (ValueError, TypeError, KeyError) as error:
            msg = f"{self._state} is not the state of an iterative run; name another state_dir"
            raise ValueError(msg) from error
        if version != _VERSION:
            msg = f"{self._state} has version {version}, not {_VERSION}; name another state_dir"
            raise ValueError(msg)
        differences = _differences(identity, self._identity)
        if differences:
            msg = f"{self._path} holds another run, name another state_dir: {'; '.join(differences)}"
            raise ValueError(msg)
        self._folder = state["folder"]
        self._remove_others()
        history = tuple(HistoryRow(*row) for row in state["history"])
        failed = HistoryRow(*state["failed"]) if state["failed"] else None
        if self._folder is None:
            return Progress(state["dense_score"], history, failed)
        weights = checkpoint.load(self._path / self._folder / _WEIGHTS).weights
        masks = checkpoint.load(self._path / self._folder / _MASKS).weights
        names = list(self._identity["weights"])
        return Progress(
            state["dense_score"],
            history,
            failed,
            {name: weights[name] for name in names},
            {name: Mask.from_bytes(masks[name].tobytes()) for name in names if name in masks},
        )

    def save(self, progress: Progress) -> None:
        """Puts `progress` in the place of what the folder holds, wholly or not at all."""
        folder = f"sparsam-{len(progress.history):04d}"
        if progress.weights is not None and progress.masks is not None and folder != self._folder:
            (self._path / folder).mkdir()
            packed = {name: np.frombuffer(mask.to_bytes(), np.uint8) for name, mask in progress.masks.items()}
            checkpoint.save(self._path / folder / _WEIGHTS, progress.weights)
            checkpoint.save(self._path / folder / _MASKS, packed)
            self._folder = folder
        state = {
            "sparsam_state": _VERSION,
            "identity": self._identity,
            "dense_score": progress.dense_score,
            "history": progress.history,
            "failed": progress.failed,
            "folder": self._folder,
        }
        publish({self._state: lambda path: path.write_text(json.dumps(state, indent=1), encoding="utf-8")})
        self._remove_others()

    def _remove_others(self) -> None:
        """Removes what earlier iterations and killed processes left behind."""
        for folder in self._path.glob("sparsam-[0-9]*"):
            if folder.name != self._folder:
                shutil.rmtree(folder)
        for temporary in self._path.glob(".state.json.*.tmp"):
            temporary.unlink()


def identify(
    config: PruningConfig, schedule: Sequence[float], weights: Mapping[str, NDArray[Any]]
) -> dict[str, Any]:
    """Returns what makes a run the same: its configuration, its schedule as numbers, its dense weights."""
    return {
        "method": _described(scores.resolve(config.method)),
        "pattern": str(config.pattern),
        "scope": config.scope,
        "allocation": config.allocation,
        "exclude": list(config.exclude),
        "overrides": [[pattern, repr(value)] for pattern, value in config.overrides.items()],
        "schedule": list(schedule),
        "weights": {name: _digest(array) for name, array in weights.items()},
    }


def _described(value: object) -> str:
    """The repr of a value, or the name of its class where the repr would hold an address."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}" if kind.__repr__ is object.__repr__ else repr(value)


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
