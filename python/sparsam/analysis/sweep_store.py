"""The state of a sensitivity sweep on disk: one JSON file, replaced atomically after each evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from sparsam.analysis.sensitivity_curve import SensitivityPoint
from sparsam.checkpoint.atomic import check_target, publish
from sparsam.checkpoint.json_state import Count, Document, Number, Share, from_number, read, to_number
from sparsam.training.run_identity import RunIdentity

_REMEDY = "delete it to start again, or name another file"


class _State(Document, frozen=True):
    """The content of the file: each point as [name, sparsity, pruned, score]."""

    WHAT: ClassVar[str] = "the state of a sensitivity sweep"
    MARK: ClassVar[str] = "sparsam_sweep"
    VERSION: ClassVar[int] = 2

    identity: RunIdentity
    points: list[tuple[str, Share, Count, Number]]


class SweepStore:
    """The file that holds the points of one sweep."""

    def __init__(self, path: Path, identity: RunIdentity) -> None:
        """Takes the file and the identity of the sweep: weights, configuration, groups."""
        self._path = path
        self._identity = identity

    def load(self) -> list[SensitivityPoint]:
        """Returns the points that the file holds, none if there is none.

        Raises:
            ValueError: It belongs to another sweep, is damaged, or is not a saved state.
            OSError: It cannot be read, or there is no folder for it.
        """
        check_target(self._path)
        if not self._path.exists():
            return []
        state = _State.from_json(read(self._path, _REMEDY), str(self._path), _REMEDY)
        if differences := self._identity.differences(state.identity):
            listed = "; ".join(differences)
            msg = (
                f"{self._path}: expected the state of this sweep; got another's: {listed}; name another file"
            )
            raise ValueError(msg)
        return [SensitivityPoint(name, s, pruned, from_number(v)) for name, s, pruned, v in state.points]

    def save(self, points: Iterable[SensitivityPoint]) -> None:
        """Replaces the content of the file by the points, atomically."""
        rows = [(p.name, p.sparsity, p.pruned, to_number(p.score)) for p in points]
        text = _State(identity=self._identity, points=rows).to_json()
        publish({self._path: lambda path: path.write_text(text, encoding="utf-8")})
