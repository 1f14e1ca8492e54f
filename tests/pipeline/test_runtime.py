from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import sparsam
from sparsam import _core


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_build_info_names_everything() -> None:
    info = sparsam.build_info()
    assert info.version == sparsam.__version__ == _core.__version__
    assert info.isa in info.available_isas
    assert set(info.available_isas) <= set(info.compiled_isas)
    assert info.compiled_isas[-1] == "generic"
    text = str(info)
    for word in (
        info.version,
        info.compiler,
        info.isa,
        "threads",
        "runtime",
        info.threading,
        "compiled",
        "detected",
        "active",
    ):
        assert word in text


def test_use_isa_switches_and_restores() -> None:
    before = sparsam.isa()
    with sparsam.use_isa("generic"):
        assert sparsam.isa() == "generic"
    assert sparsam.isa() == before
    sparsam.use_isa("generic")
    assert sparsam.isa() == "generic"
    sparsam.use_isa(before)


@pytest.mark.parametrize("name", ["", "sse9", "AVX2"])
def test_unknown_isa_raises(name: str) -> None:
    before = sparsam.isa()
    with pytest.raises(ValueError, match=r"expected one that this machine runs \(.*generic"):
        sparsam.use_isa(name)
    assert sparsam.isa() == before


def test_environment_forces_the_isa() -> None:
    for name in sparsam.available_isas():
        assert run("import sparsam; print(sparsam.isa())", SPARSAM_ISA=name).stdout.strip() == name
    bad = run("import sparsam", SPARSAM_ISA="sse9")
    assert bad.returncode != 0
    assert "environment variable SPARSAM_ISA: instruction set: expected one" in bad.stderr
    assert not run("import sparsam", SPARSAM_INT8_ISA="generic").returncode
    bad = run("import sparsam", SPARSAM_ISA="generic", SPARSAM_INT8_ISA="avx512vnni")
    assert bad.returncode != 0
    assert "environment variable SPARSAM_INT8_ISA: instruction set of int8 values: expected" in bad.stderr


def test_environment_sets_the_threads() -> None:
    show = "import sparsam; print(sparsam.num_threads())"
    assert run(show, SPARSAM_NUM_THREADS="3").stdout.strip() == "3"
    for bad in ("0", "-1", "two", "99999"):
        assert "SPARSAM_NUM_THREADS" in run(show, SPARSAM_NUM_THREADS=bad).stderr
    assert run(show, OMP_NUM_THREADS="1").stdout.strip() == "1"


def test_default_threads_respect_the_affinity_mask() -> None:
    pin = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    assert run(f"{pin}; import sparsam; print(sparsam.num_threads())").stdout.strip() == "1"


@pytest.mark.parametrize("first", ["sparsam.num_threads()", ""])
def test_limits_of_threadpoolctl_hold_while_they_last(first: str) -> None:
    pytest.importorskip("threadpoolctl")
    script = f"""
import numpy, sparsam
from threadpoolctl import threadpool_limits
{first}
with threadpool_limits(1):
    inside = sparsam.num_threads()
with threadpool_limits(1, user_api="blas"):
    blas = sparsam.num_threads()
print(inside, blas == sparsam.num_threads() == min(2, len(__import__("os").sched_getaffinity(0))))
"""
    assert run(script, OMP_NUM_THREADS="2").stdout.split() == ["1", "True"]


def test_set_num_threads() -> None:
    sparsam.set_num_threads(np.int64(2))
    assert sparsam.num_threads() == 2
    sparsam.set_num_threads(3)
    assert sparsam.num_threads() == 3
    sparsam.set_num_threads(None)
    assert sparsam.num_threads() == _core.default_num_threads()
    for bad in (0, -1, 1.5, True, "2", 10**9):
        with pytest.raises(ValueError, match="expected a number of threads"):
            sparsam.set_num_threads(bad)  # type: ignore[arg-type]


PRELUDE = """
import numpy as np
def work():
    x = np.random.default_rng(0).standard_normal(3_000_000, dtype=np.float32)
    import sparsam
    return sparsam.threshold(x, 0.5)
"""

FORK = """
import os, sys
expected = work()
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        import sparsam
        serial = "serial in this forked child" in str(sparsam.build_info())
        os._exit(0 if work() == expected and serial and sparsam.num_threads() == 1 else 1)
    _, status = os.waitpid(pid, 0)
    assert status == 0, status
assert work() == expected
"""


def test_fork_after_use_does_not_hang() -> None:
    result = run(PRELUDE + FORK, SPARSAM_NUM_THREADS="2")
    assert result.returncode == 0, result.stderr


def test_fork_after_import_alone_does_not_hang() -> None:
    """Something else in the process may have used the same OpenMP runtime before the fork."""
    script = """
import os, signal
import numpy as np, sparsam
x = np.random.default_rng(0).standard_normal(3_000_000, dtype=np.float32)
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    sparsam.threshold(x, 0.5)
    os._exit(0 if sparsam.num_threads() == 1 else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    result = run(script)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("first", ["torch", "sparsam"])
def test_beside_torch(first: str, start: str, tmp_path: Any) -> None:
    pytest.importorskip("torch")
    second = "sparsam" if first == "torch" else "torch"
    script = tmp_path / "beside.py"
    script.write_text(
        f"""
import multiprocessing, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import {first}
import {second}
import numpy as np, torch, sparsam
def work(seed):
    x = np.random.default_rng(seed).standard_normal(1_000_000, dtype=np.float32)
    return tuple(sparsam.threshold(x, 0.5)), sparsam.select(x, 0.9).count
if __name__ == "__main__":
    a = torch.randn(300, 300)
    before = (a @ a).sum(), work(1)
    with multiprocessing.get_context("{start}").Pool(2) as pool:
        results = pool.map(work, [1, 2, 1])
    assert results[0] == results[2] == before[1], results
    assert (a @ a).sum() == before[0]
    print("done")
"""
    )
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.stdout.strip() == "done", result.stderr


def test_many_python_threads_at_once() -> None:
    x = np.random.default_rng(0).standard_normal(700_000, dtype=np.float32)
    expected = sparsam.select(x, 0.5)
    with ThreadPoolExecutor(8) as pool:
        assert all(mask == expected for mask in pool.map(lambda _: sparsam.select(x, 0.5), range(40)))


def test_import_is_light() -> None:
    heavy = ["typer", "rich", "sklearn", "torch", "matplotlib"]
    script = f"import json, sys, sparsam; print(json.dumps([m for m in {heavy!r} if m in sys.modules]))"
    assert json.loads(run(script).stdout) == []


def test_public_names_are_exported_and_documented() -> None:
    for name in sparsam.__all__:
        thing = getattr(sparsam, name)
        assert name == "__version__" or (thing.__doc__ or "").strip(), name
    assert len(sparsam.__all__) <= 40


def test_threads_that_cannot_be_made_leave_one() -> None:
    """As under `ulimit -v` or a limit on processes; OpenMP's runtime would end the process."""
    script = """
import resource, sys
import numpy as np, sparsam
x = np.random.default_rng(0).standard_normal(3_000_000, dtype=np.float32)
sparsam.set_num_threads(1)
expected = sparsam.threshold(x, 0.5)
sparsam.set_num_threads(16)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), -1))
assert sparsam.threshold(x, 0.5) == expected
assert "serial where the system makes no more threads" in str(sparsam.build_info())
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert sparsam.threshold(x, 0.5) == expected
assert "serial" not in str(sparsam.build_info())
print("done")
"""
    result = run(script)
    assert result.stdout.strip() == "done", result.stderr


@pytest.mark.parametrize("size", ["400G", "1000000M", "9999999999"])
def test_stacks_that_no_thread_can_have_leave_one(size: str) -> None:
    script = """
import numpy as np, sparsam
x = np.random.default_rng(0).standard_normal(3_000_000, dtype=np.float32)
sparsam.set_num_threads(2)
print(sparsam.select(x, 0.5).count)
"""
    result = run(
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, (64 << 30, -1))\n{script}",
        OMP_STACKSIZE=size,
    )
    assert result.stdout.strip() == "1500000", result.stderr


def test_fork_in_the_midst_of_calls_does_not_hang() -> None:
    script = """
import os, signal, threading
import numpy as np, sparsam
from sparsam import NM, Block
x = np.random.default_rng(0).standard_normal((1000, 3000), dtype=np.float32)
calls = [lambda: sparsam.threshold(x, 0.5), lambda: sparsam.select(x, 0.5, NM(2, 4)),
         lambda: sparsam.select(x, 0.5, Block(4, 4)), lambda: sparsam.select(x, 0.5, scope="row"),
         lambda: sparsam.prune({"a": x, "b": x[:9].copy()}, target_sparsity=0.5).report.total.pruned_params]
expected = [call() for call in calls]
stop = threading.Event()
def work():
    while not stop.is_set():
        for call in calls: call()
workers = [threading.Thread(target=work) for _ in range(3)]
for worker in workers: worker.start()
for _ in range(10):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        os._exit(0 if [call() for call in calls] == expected else 1)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
for worker in workers: worker.join()
print("done")
"""
    result = run(script, PYTHONWARNINGS="ignore", SPARSAM_NUM_THREADS="2")
    assert result.stdout.strip() == "done", result.stderr
