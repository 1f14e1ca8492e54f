"""Pruning from file to file beside copying the file, both to the disk: `pytest benchmarks/bench_files.py`.

`SPARSAM_BENCH_MAX` is the number of weights: 2^26 (256 MiB) if it is left out, 2^28 in docs/scale.md.
The source is in the page cache; the target is a new file each time, flushed to the disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from sparsam import PruningConfig, checkpoint

WEIGHTS = int(os.environ.get("SPARSAM_BENCH_MAX", str(1 << 26)))
SIDE = min(2048, int(WEIGHTS**0.5) // 4 + 1)

PEAK = """
import sys
from sparsam import PruningConfig
from sparsam.checkpoint import prune_files  # imported on demand: not what is measured
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
before = peak()
prune_files(sys.argv[1], sys.argv[2], PruningConfig(0.8, scope="global"), memory=sys.argv[3])
print(peak() - before)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Square matrices of normal float32."""
    rng = np.random.default_rng(0)
    count = max(1, WEIGHTS // SIDE**2)
    weights = {f"w{i:03}": rng.standard_normal((SIDE, SIDE), dtype=np.float32) for i in range(count)}
    file = tmp_path_factory.mktemp("files") / "dense.safetensors"
    checkpoint.save(file, weights)
    return file


def timed(benchmark: BenchmarkFixture, source: Path, write: Callable[[Path], Any]) -> Path:
    """Writes a new file in each round."""
    benchmark.group = f"{source.stat().st_size / 2**20:.0f} MiB from file to file"
    target = source.with_name("target.safetensors")

    def setup() -> None:
        target.unlink(missing_ok=True)

    pedantic: Callable[..., Any] = benchmark.pedantic
    pedantic(write, args=(target,), setup=setup, rounds=5, warmup_rounds=1)
    return target


def test_copy(benchmark: BenchmarkFixture, source: Path) -> None:
    def copy(target: Path) -> None:
        shutil.copyfile(source, target)
        with target.open("rb") as handle:
            os.fsync(handle.fileno())

    assert timed(benchmark, source, copy).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_prune_files(benchmark: BenchmarkFixture, source: Path, scope: Any) -> None:
    config = PruningConfig(0.8, scope=scope)
    target = timed(benchmark, source, lambda target: checkpoint.prune_files(source, target, config))
    sizes, zeros = 0, 0
    for _, array in checkpoint.stream(target):
        sizes += array.size
        zeros += array.size - np.count_nonzero(array)
    assert (
        zeros == round(0.8 * sizes) if scope == "global" else zeros == sizes // SIDE**2 * round(0.8 * SIDE**2)
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this machine has no /proc")
def test_peak_memory(benchmark: BenchmarkFixture, source: Path) -> None:
    """No more than was allowed, an eighth of the file, or what one tensor takes where that is more."""
    allowed = max(source.stat().st_size // 8, 4 * SIDE**2 * 5 // 4 + (12 << 20))
    target = source.with_name("target.safetensors")
    command = [sys.executable, "-c", PEAK, str(source), str(target), str(allowed)]
    pedantic: Callable[..., str] = benchmark.pedantic
    peak = int(pedantic(lambda: subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    benchmark.extra_info["peak MiB"] = round(peak / 2**20)
    assert peak <= allowed
