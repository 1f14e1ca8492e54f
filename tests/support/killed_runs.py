"""Runs that are killed at random moments, by a script of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LOOP = Path(__file__).with_name("kill_loop.py")


def check_killed_runs(kind: str, folder: Path, *, times: int, seed: int) -> None:
    """Asserts that whatever was killed, the target was whole or absent, and that nothing was left."""
    command = [sys.executable, str(LOOP), kind, str(folder), str(seed), str(times)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["killed"] > times // 3
    assert found["moments"] > 40
