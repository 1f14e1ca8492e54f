"""Weights with zeros, packed weights in one form alone, and processes to measure them in."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
from numpy.typing import NDArray

from sparsam._core import Packed

FORMS = ("bitmask", "panels", "slots")

HEAD = """
import gc, sys
import numpy as np
from sparsam._core import Packed

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

rng = np.random.default_rng(0)
"""


def weights(rows: int, cols: int, sparsity: float, *, tall: int = 1, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    pattern = np.repeat(rng.random((-(-rows // tall), cols)) >= sparsity, tall, axis=0)[:rows]
    return np.where(pattern, rng.standard_normal((rows, cols), dtype=np.float32), np.float32(0))


def only(packed: Packed, form: str) -> Packed:
    """The weight in that form alone."""
    packed.add(form)
    packed.keep([form])
    assert packed.forms == (form,)
    return packed


def run(code: str) -> str:
    """What the code prints in a process of its own."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(code)],
        capture_output=True, text=True, check=False, timeout=600, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
