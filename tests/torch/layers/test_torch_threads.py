"""One pool of threads for PyTorch and for packed layers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sparsam import _core

THREADS = """
import sys
{imports}
import sparsam.torch
linear = torch.nn.Linear(1024, 1024)
layer = sparsam.torch.pack(__import__('copy').deepcopy(linear))
torch.set_num_threads(1)
assert sparsam.num_threads() == 1, sparsam.num_threads()
torch.set_num_threads(2)
assert sparsam.num_threads() == min(2, len(__import__("os").sched_getaffinity(0)))
sparsam.set_num_threads(3)
assert sparsam.num_threads() == 3
x = torch.randn(64, 1024)
with torch.no_grad():
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-4)
print(sparsam.build_info().threading)
"""


@pytest.mark.parametrize("imports", ["import torch, sparsam", "import sparsam, torch"])
def test_threads_are_those_of_pytorch(imports: str) -> None:
    run = [sys.executable, "-c", THREADS.format(imports=imports)]
    out = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert out.startswith("OpenMP")
    assert not _core.adopt_runtime("no-such-library.so")


POOLS = """
import os, sys
import numpy as np
{first}
def work(): return sparsam.select(np.ones(1 << 22, np.float32), 0.5)
{second}
torch.mm(torch.ones(512, 512), torch.ones(512, 512)); torch.ones(1 << 22).sum()
import threading
before = len(os.listdir("/proc/self/task"))
work()
after = len(os.listdir("/proc/self/task"))
print(before == after, sparsam.num_threads() == torch.get_num_threads(), sparsam.build_info().threading)
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("import sparsam, torch", ""),
        ("import torch, sparsam", ""),
        ("import sparsam", "import torch"),
    ],
)
def test_without_sparsam_torch_there_is_one_pool_too(first: str, second: str) -> None:
    script = POOLS.format(first=first, second=second)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    same, equal, runtime = done.stdout.split(maxsplit=2)
    assert (same, equal) == ("True", "True")
    assert runtime.startswith("OpenMP")


def test_a_pool_of_our_own_gives_way_to_that_of_pytorch() -> None:
    script = POOLS.format(first="import sparsam", second="work(); import torch")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["True", "True"]


def test_a_runtime_that_cannot_be_adopted_is_told_once() -> None:
    script = """
import warnings
import torch
from sparsam import _core
_core.adopt_runtime = lambda _: False
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import sparsam.torch
    import sparsam.torch.layers
    import sparsam.torch
print([(w.category.__name__, "threads of its own" in str(w.message)) for w in caught
       if "sparsam" in str(w.message)])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[('RuntimeWarning', True)]"
