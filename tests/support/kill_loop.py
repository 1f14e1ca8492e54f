"""Kills runs over files at random moments, again and again, and says what each left; a script, for forks.

    python kill_loop.py prune|blocks|trained FOLDER SEED TIMES

A moment is a call of the system that opens, renames, makes or removes something in the folder, or flushes a
file. Each run goes on with what killed ones left; every few are let through.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparsam import checkpoint

Run = Callable[[Path], object]

_EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.truncate", "os.listdir"}
_LET_THROUGH = 5  # one run in so many


def content(folder: Path) -> dict[str, bytes]:
    """The files that are seen in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def started(run: Run, target: Path, moment: int) -> int:
    """Runs in a child that is killed at a moment; returns how many moments it saw, 0 if it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        seen = 0

        def count() -> None:
            nonlocal seen
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, args: tuple[object, ...]) -> None:
            if event in _EVENTS and args and str(target.parent) in str(args[0]):
                count()

        fsync = os.fsync
        os.fsync = lambda file: (count(), fsync(file))[1]  # type: ignore[assignment, func-returns-value]
        sys.addaudithook(hook)
        try:
            run(target)
            os.write(writer, str(seen).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        told = answer.read()
    os.waitpid(child, 0)
    return int(told or 0)


def prune_run(folder: Path) -> Run:
    """The command, on shards."""
    from sparsam.cli import main  # noqa: PLC0415 - an extra

    rng = np.random.default_rng(0)
    source = folder / "in"
    source.mkdir()
    weights = {f"l{i}.weight": rng.standard_normal((16, 24), np.float32) for i in range(6)}
    places = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(places.values()):
        checkpoint.save(source / file, {name: weights[name] for name in weights if places[name] == file})
    (source / checkpoint.INDEX_NAME).write_text(json.dumps({"weight_map": places}))
    (source / "config.json").write_text("{}")
    return lambda target: main(["prune", str(source), "-o", str(target), "--scope", "global"])


def blocks_run(folder: Path, steps: int | None = None) -> Run:
    """Block by block, on one file; each block is trained for some steps, if they are given."""
    import warnings  # noqa: PLC0415

    import torch  # noqa: PLC0415
    from sparsam.torch import prune_files  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415 - an extra

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))

    weights = {name: tensor.numpy() for name, tensor in build().state_dict().items()}
    (folder / "in").mkdir()
    checkpoint.save(folder / "in" / "model.safetensors", weights)
    batches = [torch.randn(16, 8) for _ in range(4)]
    with torch.device("meta"):
        model = build()
    options: Any = {"target_sparsity": 0.5, "distill_steps": steps}
    return lambda target: prune_files(model, folder / "in", target, batches, **options)


def trained_run(folder: Path) -> Run:
    """Block by block, with training."""
    return blocks_run(folder, 2)


def main(kind: str, folder: Path, seed: int, times: int) -> dict[str, object]:
    """Returns how many runs were killed, and what was wrong."""
    run = {"prune": prune_run, "blocks": blocks_run, "trained": trained_run}[kind](folder)
    whole, target = folder / "whole", folder / "out"
    run(whole)  # here, so that what it imports is imported once
    wanted = content(whole)
    moments = started(run, target, 0)
    shutil.rmtree(target)
    rng, wrong, killed = random.Random(seed), list[str](), 0
    for i in range(times):
        moment = 0 if i % _LET_THROUGH == _LET_THROUGH - 1 else rng.randint(1, moments)
        finished = started(run, target, moment)
        killed += not finished
        if target.exists() and content(target) != wanted:
            wrong.append(f"{moment} of {moments}: a target that is not whole")
        if finished:
            if not target.exists():
                wrong.append(f"{moment}: no target")
                continue
            left = {path.name for path in folder.iterdir()} - {"in", "whole", "out"}
            left |= {path.name for path in target.iterdir()} - set(wanted)
            if left:
                wrong.append(f"{moment}: left {sorted(left)}")
            shutil.rmtree(target)
    return {"moments": moments, "killed": killed, "wrong": wrong}


if __name__ == "__main__":
    found = main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    sys.stdout.write(json.dumps(found) + "\n")
