"""The memory that `prune_files` takes: of a model of four blocks less than two of them."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import torch
from sparsam import checkpoint
from sparsam.torch import prune_files

BLOCKS, LAYERS, WIDTH = 4, 16, 1024  # blocks of 64 MiB

MEASURED = """
import sys, warnings
import torch
from torch import nn
from sparsam.torch import prune_files

def kib(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1])

def build(blocks, layers, width):
    with torch.device("meta"):
        def block():
            return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        return nn.Sequential(*(block() for _ in range(blocks)))

def pruned(source, target, blocks, layers, width):
    batches = [torch.randn(16, width) for _ in range(4)]
    dense = [f"*.{i}.weight" for i in range(1, layers)]
    options = {"target_sparsity": 0.5, "method": "wanda", "exclude": dense}
    prune_files(build(blocks, layers, width), source, target, batches, **options)

torch.set_num_threads(1)
warnings.simplefilter("ignore")
pruned(sys.argv[1] + "/small", sys.argv[1] + "/small-out", 2, 2, 64)  # what is imported is imported
before = kib("VmHWM")
pruned(sys.argv[1] + "/large", sys.argv[1] + "/large-out", *map(int, sys.argv[2:]))
print(kib("VmHWM") - before)
"""


def write(file: Path, blocks: int, layers: int, width: int) -> None:
    rng = np.random.default_rng(0)
    names = [f"{block}.{layer}.weight" for block in range(blocks) for layer in range(layers)]
    file.parent.mkdir()
    array = rng.standard_normal((width, width), np.float32) / np.float32(width**0.5)
    checkpoint.save(file, dict.fromkeys(names, array))


@pytest.mark.skipif(sys.platform != "linux", reason="this machine has no /proc")
def test_less_than_two_blocks(tmp_path: Path) -> None:
    write(tmp_path / "small" / "model.safetensors", 2, 2, 64)
    write(tmp_path / "large" / "model.safetensors", BLOCKS, LAYERS, WIDTH)
    command = [sys.executable, "-c", MEASURED, str(tmp_path), str(BLOCKS), str(LAYERS), str(WIDTH)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    block = LAYERS * WIDTH**2 * 4
    assert block // 2 < 1024 * int(done.stdout) < 2 * block
    pruned = dict(checkpoint.stream(tmp_path / "large-out"))
    zeros = [name for name, array in pruned.items() if np.count_nonzero(array) == array.size // 2]
    assert zeros == [f"{block}.0.weight" for block in range(BLOCKS)]


def write_gated(folder: Path, rng: np.random.Generator, shapes: dict[str, tuple[int, int]]) -> None:
    """Two blocks with these weights."""
    folder.mkdir()
    weights = {
        f"{block}.{own}.weight": rng.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5)
        for block in range(2)
        for own, shape in shapes.items()
    }
    checkpoint.save(folder / "model.safetensors", weights)


MODEL = """
import resource, sys, warnings
from concurrent.futures import ThreadPoolExecutor
import torch
from torch import nn
from torch.nn import functional
from sparsam.torch import prune_files

class Gated(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return x + self.down(functional.silu(self.gate(x)) * self.up(x))

def kib(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1])
"""

GATED = """
def pruned(source, width, inner, memory):
    with torch.device("meta"):
        model = nn.Sequential(*(Gated(width, inner) for _ in range(2)))
    batches = [torch.randn(32, width) for _ in range(4)]
    options = {"target_sparsity": 0.5, "method": "obs", "targets": "own", "exclude": ["*.down.weight"]}
    with ThreadPoolExecutor(2) as threads:
        executor = threads if sys.argv[3] == "threads" else None
        prune_files(model, source, source + "-out", batches, memory=memory, executor=executor, **options)

torch.set_num_threads(1)
warnings.simplefilter("ignore")
pruned(sys.argv[1] + "/small", 64, 128, "1GiB")  # what is imported is imported
before = kib("VmHWM")
try:
    pruned(sys.argv[1] + "/gated", 512, 2048, sys.argv[2])
    print(kib("VmHWM") - before)
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="this machine has no /proc")
@pytest.mark.parametrize("executor", ["none", "threads"])
def test_weights_that_are_fitted_together_count_together(executor: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, width, inner in (("small", 64, 128), ("gated", 512, 2048)):
        shapes = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
        write_gated(tmp_path / name, rng, shapes)

    def said(memory: str) -> str:
        command = [sys.executable, "-c", MODEL + GATED, str(tmp_path), memory, executor]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def needed_for(weights: int) -> int:
        inverses, copies = (weights, 6) if executor == "threads" else (1, 4)  # all fits at the same time
        moments, fits = (2 + 6 * inverses) * 8 * 512**2, copies * 8 * 512 * 2048
        return math.ceil((3 * 4 * 512 * 2048 + moments + weights * fits) / 2**20)

    def told(memory: int) -> int:
        found = re.match(
            r"memory: expected at least (\d+)MiB, for '1'.* the work on it", said(f"{memory}MiB")
        )
        assert found
        assert not (tmp_path / "gated-out").exists()
        return int(found[1])

    alone, together = needed_for(1), needed_for(2)
    assert told(alone - 1) == alone
    needed = told(alone)
    assert together < needed <= together + 8, "with activations: 32 rows of 2048 in each of four batches"
    assert told(needed - 1) == needed
    assert int(said(f"{needed}MiB")) < 1024 * needed
    assert (tmp_path / "gated-out" / "model.safetensors").is_file()


ACTIVE = """
def pruned(folder, rows, memory, steps):
    with torch.device("meta"):
        model = nn.Sequential(*(Gated(64, 512) for _ in range(2)))
    batches = [torch.randn(1, rows, 64) for _ in range(4)]
    options = {"target_sparsity": 0.5, "method": sys.argv[3], "distill_steps": steps}
    prune_files(model, folder, folder + "-out", batches, memory=memory, **options)

torch.set_num_threads(2)
warnings.simplefilter("ignore")
steps = int(sys.argv[4]) or None
pruned(sys.argv[1] + "/small", 64, "1GiB", steps)  # what is imported is imported
stacks = 8 << 10  # KiB of the passes' threads, which are reserved and hardly used
limit = 1024 * (kib("VmData") + stacks * 9) + int(sys.argv[2][:-3]) * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    pruned(sys.argv[1] + "/large", 4096, sys.argv[2], steps)
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="this machine has no RLIMIT_DATA")
@pytest.mark.parametrize(("method", "steps"), [("obs", 0), ("wanda", 0), ("wanda", 2)])
def test_the_memory_that_is_told_is_enough(method: str, steps: int, tmp_path: Path) -> None:
    """Activations outweigh the weights, 8 MiB for the product of a batch; the process may have no more."""
    rng = np.random.default_rng(0)
    shapes = {"gate": (512, 64), "up": (512, 64), "down": (64, 512)}
    for name in ("small", "large"):
        write_gated(tmp_path / name, rng, shapes)

    def said(memory: int) -> str:
        command = [sys.executable, "-c", MODEL + ACTIVE, str(tmp_path), f"{memory}MiB", method, str(steps)]
        # What glibc keeps for each thread after it was freed is given back, but its addresses count.
        frugal = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=frugal).stdout

    def told(text: str) -> int:
        found = re.match(
            r"memory: expected at least (\d+)MiB, for '[01]'.* the work on it.*; got .*; raise it", text
        )
        assert found, text
        return int(found[1])

    weights_only = told(said(1))
    needed = told(said(weights_only))
    assert needed > weights_only + 32
    assert not (tmp_path / "large-out").exists()
    assert said(needed) == ""
    assert (tmp_path / "large-out" / "model.safetensors").is_file()
    assert needed < 512
    (tmp_path / "large-out" / "model.safetensors").unlink()
    assert told(said(needed - 1)) == needed


def test_each_group_of_a_convolution_has_moments_of_its_own(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Conv2d(256, 256, 3, groups=4, bias=False))
    weight = np.random.default_rng(0).standard_normal((256, 64, 3, 3), np.float32)
    checkpoint.save(tmp_path / "model.safetensors", {"0.weight": weight})
    inputs = 64 * 9
    needed = math.ceil((weight.nbytes + 8 * inputs * ((2 * 4 + 6) * inputs + 4 * 256)) / 2**20)
    options: dict[str, Any] = {
        "method": "obs",
        "targets": "own",
        "target_sparsity": 0.5,
        "memory": f"{needed - 1}MiB",
    }
    with pytest.raises(
        ValueError, match=f"memory: expected at least {needed}MiB, for '0' and the work on it"
    ):
        prune_files(model, tmp_path, tmp_path / "out", [torch.randn(2, 256, 5, 5)], **options)
