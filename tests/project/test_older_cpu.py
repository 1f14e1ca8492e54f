"""`benchmarks/older_cpu/run.py`: a process whose libraries see AVX2 and nothing newer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPUINFO = Path("/proc/cpuinfo")
CAN = CPUINFO.exists() and " cpuid_fault " in CPUINFO.read_text() and shutil.which("cc") is not None

pytestmark = pytest.mark.skipif(not CAN, reason="this machine cannot let CPUID fault, or has no C compiler")

PRODUCTS = """
import threading
import numpy as np
import sparsam
assert "avx2" in sparsam.available_isas() and "avx512" not in sparsam.available_isas(), sparsam.build_info()
weights = np.random.default_rng(0).integers(-3, 4, (512, 512)).astype(np.float32)
packed, x = sparsam.SparseMatrix.from_dense(weights), np.ones((16, 512), np.float32)
seen = []
def multiply():
    seen.append((sparsam.available_isas(), (packed.linear(x) == x @ weights.T).all()))
threads = [threading.Thread(target=multiply) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(seen) == 3 and all("avx512" not in isas and right for isas, right in seen), seen
print("done")
"""
ENDS = "import ctypes; ctypes.string_at(8)"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "benchmarks" / "older_cpu" / "run.py"
    return subprocess.run(
        [sys.executable, script, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_products_on_threads_see_avx2() -> None:
    done = run(sys.executable, "-c", PRODUCTS)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


def test_children_see_avx2() -> None:
    code = "import sparsam, sys; sys.exit('avx512' in sparsam.available_isas())"
    done = run("sh", "-c", f'"{sys.executable}" -c "{code}"')
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [(), ("-X", "faulthandler")])
def test_a_true_fault_ends_the_process(options: tuple[str, ...]) -> None:
    done = run(sys.executable, *options, "-c", f"import numpy; {ENDS}")
    assert done.returncode == 128 + signal.SIGSEGV
    assert ("Fatal Python error: Segmentation fault" in done.stderr) == bool(options)


def test_what_a_command_ends_with_is_returned() -> None:
    assert run("sh", "-c", "exit 7").returncode == 7


@pytest.mark.parametrize(
    ("command", "environment", "said"),
    [
        (("no-such-command",), {}, "expected a command; got 'no-such-command', which is not there"),
        (("true",), {"CC": "no-such-compiler"}, "expected a C compiler; got 'no-such-compiler'"),
        ((), {}, "expected a command"),
    ],
)
def test_errors_say_what_is_missing(command: tuple[str, ...], environment: dict[str, str], said: str) -> None:
    done = run(*command, **environment)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
