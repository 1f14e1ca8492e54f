"""What `import sparsam` takes in a fresh process: `pytest benchmarks/bench_import.py`.

Beside it, in the same group, what a process takes that imports nothing, and one that imports only NumPy,
without which sparsam cannot be.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture


@pytest.mark.parametrize("module", ["sys", "numpy", "sparsam"])
def test_import(benchmark: BenchmarkFixture, module: str) -> None:
    benchmark.group = "a process that imports"
    command = [sys.executable, "-c", f"import {module}; print({module}.__name__)"]

    def start() -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    pedantic: Callable[..., str] = benchmark.pedantic
    assert pedantic(start, rounds=10, warmup_rounds=1) == f"{module}\n"
