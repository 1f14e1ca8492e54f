"""Runs over files that are killed at random moments: the target is whole or absent, and nothing is left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from killed_runs import check_killed_runs


@pytest.mark.skipif(sys.platform != "linux", reason="this machine cannot fork a run and kill it")
def test_killed_again_and_again(tmp_path: Path) -> None:
    check_killed_runs("prune", tmp_path, times=100, seed=1)
