"""The progress of a distillation: steps, losses, its position in the batches, and the file of its state."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sparsam.checkpoint.atomic import publish
from sparsam.torch.pruning.calibration import Batch, to_batch
from sparsam.torch.pruning.saved_progress import BatchDigest
from sparsam.torch.pruning.while_training import Pruner
from torch import Tensor, nn

__all__ = ["FILE", "DistillationRun"]

FILE = "distillation.pt"
_KEYS = ("identity", "progress", "batches", "student", "optimizer", "pruner", "random")


@dataclass
class DistillationRun:
    """The progress of a run, and its file.

    Attributes:
        student: The model that is trained.
        optimizer: Its optimizer.
        pruner: Its pruner, if there is one.
        folder: The folder of the file; None: nothing is saved.
        identity: The identity of the run, in plain values.
        step: The number of steps so far.
        seconds: Their time, in seconds.
        stopped: What ended the run: "steps", "seconds" or "batches".
        losses: The loss of each step.
        place: The number of batches used in the current pass over them.
    """

    student: nn.Module
    optimizer: torch.optim.Optimizer
    pruner: Pruner | None
    folder: Path | None
    identity: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    stopped: str = "batches"
    losses: list[float] = field(default_factory=list)
    place: int = 0
    _seen: str = ""
    _epoch_start: Tensor | None = None
    _random: Tensor | None = None

    @property
    def file(self) -> Path | None:
        """The file of the state."""
        return None if self.folder is None else self.folder / FILE

    def save(self) -> None:
        """Writes the file, completely or not at all."""
        if self.file is None:
            return
        state = {
            "identity": self.identity,
            "progress": [self.step, self.seconds, self.losses, self.place],
            "batches": self._seen,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
            "random": [self._epoch_start, torch.get_rng_state()],
        }
        publish({self.file: lambda path: torch.save(state, path)})

    def resume(self) -> bool:
        """Restores the state in the file, if there is one; returns whether there was.

        Raises:
            ValueError: It belongs to another run, or is not a state.
        """
        if self.file is None or not self.file.is_file():
            return False
        try:
            state = torch.load(self.file, weights_only=True)
            state = {key: state[key] for key in _KEYS}
            known = {"loss": "cosine"} | state["identity"]  # before there was a choice
            differing = [key for key, value in self.identity.items() if known[key] != value]
        except Exception as error:
            got = type(error).__name__
            msg = f"{self.file}: expected a state of distill; got {got}; delete it to start again"
            raise ValueError(msg) from error
        own = {name: tensor.shape for name, tensor in self.student.state_dict().items()}
        if own != {name: tensor.shape for name, tensor in state["student"].items()}:
            differing.append("student")
        if (self.pruner is None) != (state["pruner"] is None):
            differing.append("pruner")
        if differing:
            what = ", ".join(differing)
            msg = f"{self.file}: expected this run's state; got one of other {what}; name another state_dir"
            raise ValueError(msg)
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])
        self.step, self.seconds, self.losses, self.place = state["progress"]
        self._seen = state["batches"]
        self._epoch_start, self._random = state["random"]
        torch.set_rng_state(self._epoch_start)
        return True

    def _restore_random_state(self, seen: BatchDigest) -> None:
        """Restores the random state, once the batches of the interrupted run are skipped.

        Raises:
            ValueError: They differ from those of that run.
        """
        if self._random is None:
            return
        if seen.hex() != self._seen:
            msg = (
                f"batches: expected the {self.place} of this pass that the run in {self.file} has seen; got "
                "others; pass the same in the same order, or name another state_dir"
            )
            raise ValueError(msg)
        torch.set_rng_state(self._random)
        self._random = None

    def through(self, batches: Iterable[Any]) -> Iterator[Batch]:
        """Yields the batches as calls of the student, repeatedly, from the current position on."""
        signature = inspect.signature(self.student.forward)
        skip = self.place
        once = isinstance(batches, Iterator)
        while True:
            if not skip:
                self._epoch_start = torch.get_rng_state()
            count, seen = 0, BatchDigest()
            for given in batches:
                count += 1
                if count > skip:
                    self._restore_random_state(seen)
                batch = to_batch("batches", signature, given, count - 1)
                if self.folder is not None:
                    seen.add(batch)
                if count > skip:
                    self.place, self._seen = count, seen.hex()
                    yield batch
            if not count and not self.step:
                msg = "batches: expected at least one batch; got none; an iterator is read only once"
                raise ValueError(msg)
            self._restore_random_state(seen)
            if once or not count:
                return
            skip = self.place = 0
