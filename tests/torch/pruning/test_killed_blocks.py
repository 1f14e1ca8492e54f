"""Pruning with calibration, from file to file, killed at random moments."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from killed_runs import check_killed_runs


@pytest.mark.skipif(sys.platform != "linux", reason="this machine cannot fork a run and kill it")
@pytest.mark.parametrize(("kind", "times"), [("blocks", 60), ("trained", 40)])
def test_killed_again_and_again(kind: str, times: int, tmp_path: Path) -> None:
    check_killed_runs(kind, tmp_path, times=times, seed=2)
