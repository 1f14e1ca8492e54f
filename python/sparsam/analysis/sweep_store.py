"""The state of a sensitivity sweep on disk: one JSON file, replaced whole after each evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparsam.analysis.sensitivity_report import SensitivityPoint
from sparsam.checkpoint.atomic import check_target, publish
from sparsam.training.saved_run import _differences

_VERSION = 1


class SweepStore:
    """The file that holds the points of one sweep."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Takes the file and what the sweep is: weights, configuration, groups."""
        self._path = path
        self._identity = identity

    def load(self) -> list[SensitivityPoint]:
        """Returns the points that the file holds, none if there is none.

        Raises:
            ValueError: It belongs to another sweep, is damaged, or is no state of ours.
            OSError: It cannot be read, or there is no folder for it.
        """
        check_target(self._path)
        if not self._path.exists():
            return []
        try:
            content = json.loads(self._path.read_bytes())
            version, identity = content["sparsam_sweep"], dict(content["identity"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            msg = f"{self._path} is not the state of a sensitivity sweep; name another file"
            raise ValueError(msg) from error
        if version != _VERSION:
            msg = f"{self._path} has version {version!r}, not {_VERSION}; name another file"
            raise ValueError(msg)
        if differences := _differences(identity, self._identity):
            msg = f"{self._path} holds another sweep, name another file: {'; '.join(differences)}"
            raise ValueError(msg)
        try:
            return [SensitivityPoint(str(n), float(s), int(p), float(v)) for n, s, p, v in content["points"]]
        except (ValueError, TypeError, KeyError) as error:
            msg = f"{self._path} is damaged; delete it to start anew, or name another file: {error}"
            raise ValueError(msg) from error

    def save(self, points: Iterable[SensitivityPoint]) -> None:
        """Puts the points in the place of what the file holds, wholly or not at all."""
        rows = [[*point[:3], repr(point.score)] for point in points]
        text = json.dumps({"sparsam_sweep": _VERSION, "identity": self._identity, "points": rows}, indent=1)
        publish({self._path: lambda path: path.write_text(text, encoding="utf-8")})
