"""Runs over files that are killed at random moments: the target is whole or absent, and nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LOOP = Path(__file__).with_name("kill_loop.py")


@pytest.mark.skipif(sys.platform != "linux", reason="this machine cannot fork a run and kill it")
@pytest.mark.parametrize(("kind", "times", "seed"), [("prune", 100, 1), ("blocks", 60, 2)])
def test_killed_again_and_again(kind: str, times: int, seed: int, tmp_path: Path) -> None:
    command = [sys.executable, str(LOOP), kind, str(tmp_path), str(seed), str(times)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["killed"] > times // 3
    assert found["moments"] > 40
