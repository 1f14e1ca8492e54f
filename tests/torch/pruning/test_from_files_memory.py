"""The memory that `prune_files` takes: of a model of four blocks less than two of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsam import checkpoint

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
