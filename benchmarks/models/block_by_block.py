"""How much memory `sparsam.torch.prune_files` takes on a made-up model of wide layers, under a limit.

    python benchmarks/models/block_by_block.py --blocks 4 --layers 40 --width 2560 --limit 3GB --method obs

makes a model of 4 blocks of 40 residual linear layers, 1 GiB each in float32, as four shards, prunes it in
a process that may not allocate more than the limit (RLIMIT_DATA), and prints its largest resident memory
(VmHWM). `--only 2` prunes the first two layers of each block and leaves the others dense.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import torch
from sparsam import checkpoint
from sparsam.checkpoint.plan import parse_size
from sparsam.torch import prune_files
from torch import Tensor, nn

_ROWS = 128  # of a batch


class Block(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(torch.tanh(x))
        return x


def build(options: argparse.Namespace) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(Block(options.layers, options.width) for _ in range(options.blocks)))


def write(folder: Path, options: argparse.Namespace) -> None:
    """The model's files, one for each block."""
    rng = np.random.default_rng(0)
    array = rng.standard_normal((options.width, options.width), np.float32)
    array *= np.float32(0.3 / options.width**0.5)
    places: dict[str, str] = {}
    for block in range(options.blocks):
        file = f"model-{block + 1:05d}-of-{options.blocks:05d}.safetensors"
        arrays = dict.fromkeys((f"{block}.layers.{i}.weight" for i in range(options.layers)), array)
        checkpoint.save(folder / file, arrays)
        places |= dict.fromkeys(arrays, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / checkpoint.INDEX_NAME).write_text(json.dumps(index))


def memory(what: str) -> int:
    """A number of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def prune(folder: Path, options: argparse.Namespace) -> None:
    """In a process of its own: prunes the files, and prints what that took."""
    limit = parse_size("--limit", options.limit)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before = memory("VmHWM")
    batches = [torch.randn(_ROWS, options.width) for _ in range(options.rows // _ROWS)]
    dense = [f"*.layers.{i}.weight" for i in range(options.only or options.layers, options.layers)]
    config: Any = {"target_sparsity": 0.5, "method": options.method, "exclude": dense}
    start, used = time.perf_counter(), time.process_time()
    targets = options.targets
    report = prune_files(build(options), folder / "in", folder / "out", batches, targets=targets, **config)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    size = 4 * options.layers * options.width**2
    print(
        f"{options.blocks} blocks of {size / 2**20:.0f} MiB, {options.method}, {options.targets} targets: "
        f"{len(report.pruned)} weights pruned in {seconds:.0f} s, {used:.0f} s of CPU time; "
        f"VmHWM {memory('VmHWM') / 2**20:.0f} MiB, {before / 2**20:.0f} MiB of it before; "
        f"VmPeak {memory('VmPeak') / 2**20:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--only", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--method", default="obs")
    parser.add_argument("--targets", default="own")
    parser.add_argument("--limit", default="3GB")
    parser.add_argument("--folder", type=Path, help="for the files, twice the size of the model")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        prune(options.inside, options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        (folder / "in").mkdir()
        write(folder / "in", options)
        command = [sys.executable, __file__, *sys.argv[1:], "--inside", str(folder)]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
