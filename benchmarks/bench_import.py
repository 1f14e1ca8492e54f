"""What `import sparsam` takes in a fresh process: `pytest benchmarks/bench_import.py`.

Beside it, in the same group, what a process takes that imports nothing, and one that imports only NumPy,
without which sparsam cannot be. The second group has the CPU time of one import after what it needs: the
goals are 150 ms for sparsam after NumPy, and 100 ms for sparsam.torch after sparsam and PyTorch. Those
numbers are printed with `-s`, and stand as `cpu_ms` in the files of `--benchmark-json`. Modules come from
bytecode, as pip installs them, in a cache of the benchmark's own: with PYTHONDONTWRITEBYTECODE the sources
would be compiled each time, which takes longer than the import. Garbage is collected before the clock starts:
else a full collection of what PyTorch made, 70 ms, falls due while sparsam is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

CPU = """
import gc, time
import {before}
gc.collect()
start = time.process_time()
import {module}
print(1e3 * (time.process_time() - start))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For processes that keep the bytecode of what they import."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("bytecode"))}


@pytest.mark.parametrize("module", ["sys", "numpy", "sparsam"])
def test_import(benchmark: BenchmarkFixture, environment: dict[str, str], module: str) -> None:
    benchmark.group = "a process that imports"
    command = [sys.executable, "-c", f"import {module}; print({module}.__name__)"]

    def start() -> str:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    pedantic: Callable[..., str] = benchmark.pedantic
    assert pedantic(start, rounds=10, warmup_rounds=1) == f"{module}\n"


@pytest.mark.parametrize(
    ("before", "module"),
    [("numpy", "sparsam"), ("torch, sparsam", "sparsam.torch"), ("torch", "sparsam.torch")],
)
def test_cpu_time_of_an_import(
    benchmark: BenchmarkFixture, environment: dict[str, str], before: str, module: str
) -> None:
    benchmark.group = "a process that imports one module after another"
    command = [sys.executable, "-c", CPU.format(before=before, module=module)]
    seen: list[float] = []

    def start() -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        seen.append(float(done.stdout))

    pedantic: Callable[..., None] = benchmark.pedantic
    pedantic(start, rounds=5, warmup_rounds=1)
    assert min(seen) > 0
    benchmark.extra_info["cpu_ms"] = round(min(seen), 1)
    sys.stdout.write(f"\n{module} after {before}: {min(seen):.0f} ms of CPU time, the least of {len(seen)}\n")
