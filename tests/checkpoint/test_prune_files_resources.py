"""What `prune_files` holds while it runs: a sample no larger than its memory allows, and its locks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import write_raw
from sparsam import PruningConfig, checkpoint, prune
from sparsam.checkpoint import shard_passes, streaming
from sparsam.checkpoint.atomic import LOCK
from sparsam.checkpoint.shard_passes import SampleTask

GLOBAL = PruningConfig(0.5, scope="global")


class Seen(BaseException):
    pass


def holes(file: Path, tensors: int, size: int) -> None:
    """Tensors of float16, of a file that takes no room on the disk."""
    nbytes = 2 * size
    header = {
        f"w{i:04d}": {
            "dtype": "F16",
            "shape": [size // 64, 64],
            "data_offsets": [i * nbytes, (i + 1) * nbytes],
        }
        for i in range(tensors)
    }
    write_raw(file, json.dumps(header).encode(), 0)
    os.truncate(file, file.stat().st_size + tensors * nbytes)


@pytest.mark.parametrize("memory", [1 << 20, 16 << 20, 64 << 20])
def test_the_sample_of_a_threshold_is_bounded_by_memory(
    memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holes(tmp_path / "model.safetensors", 256, min(1 << 20, memory // 4))
    drawn: list[int] = []

    def sampled(task: SampleTask, _: object) -> None:
        drawn.append(sum(task.wanted.values()))
        raise Seen

    monkeypatch.setattr(streaming, "sample_shard", sampled)
    with pytest.raises(Seen):
        checkpoint.prune_files(tmp_path / "model.safetensors", tmp_path / "out", GLOBAL, memory=memory)
    (count,) = drawn
    assert 0 < 3 * 8 * count <= memory, "float64, joined and sorted"


@pytest.mark.skipif(sys.platform != "linux", reason="this machine has no /proc")
@pytest.mark.parametrize("exists", [False, True])
def test_locks_last_until_the_last_flush(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    source, target = tmp_path / "in", tmp_path / "out"
    weights = {f"w{i}": rng.standard_normal((64, 48), np.float32) for i in range(4)}
    source.mkdir()
    checkpoint.save(source / "model.safetensors", weights)
    if exists:
        target.mkdir()
    fsync = os.fsync
    flushed: list[str] = []
    free: list[str] = []
    script = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'ab'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def check(path: Path) -> None:
        """Another process cannot lock it."""
        done = subprocess.run(
            [sys.executable, "-S", "-c", script, str(path)], check=False, capture_output=True
        )
        if b"BlockingIOError" not in done.stderr:
            free.append(f"{path}: {done.stderr.decode()}")

    def watched(file: int) -> None:
        path = Path(f"/proc/self/fd/{file}").readlink()
        flushed.append(path.suffix or "folder")
        for lock in tmp_path.rglob(f"*/{LOCK}"):
            check(lock)
        if path.suffix == ".part":
            check(path)
        fsync(file)
        if path.suffix == ".part":
            check(path)

    monkeypatch.setattr(os, "fsync", watched)
    checkpoint.prune_files(source, target, GLOBAL)
    assert free == []
    assert ".part" in flushed
    assert flushed[-1] == "folder", "after the move"
    assert (target / "model.safetensors").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="this machine counts the characters of names")
def test_names_of_252_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names beside them, of parts and marks, are longer still; a stopped run finds its part again."""
    rng = np.random.default_rng(0)
    source, target = (tmp_path / (60 * face + ".safetensors") for face in "\N{GRINNING FACE}\N{PARTY POPPER}")
    assert len(os.fsencode(source.name)) == 252
    checkpoint.save(source, {f"w{i}": rng.standard_normal((64, 48), np.float32) for i in range(4)})
    monkeypatch.setattr(shard_passes, "_MARK", 1 << 12)
    monkeypatch.setattr(shard_passes, "PIECE", 1 << 12)
    whole, pieces = shard_passes._prune_piece, list[int]()

    def stopped(*args: Any) -> Any:
        pieces.append(1)
        if len(pieces) == 3:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(shard_passes, "_prune_piece", stopped)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune_files(source, target, GLOBAL)
    assert not target.exists()
    checkpoint.prune_files(source, target, GLOBAL)
    assert len(pieces) < 2 * 4, "it went on in the part"
    expected = prune(checkpoint.load(source).weights, GLOBAL).weights
    for name, array in checkpoint.stream(target):
        assert np.array_equal(array, expected[name]), name
    assert {path.name for path in tmp_path.iterdir()} == {source.name, target.name}


STOPPED = """
import os, signal, sys, threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from sparsam import PruningConfig, checkpoint
from sparsam.checkpoint import shard_passes
shard_passes._MARK, shard_passes.PIECE = 1 << 12, 1 << 11
write = shard_passes._write_json
def write_and_stop(file, progress):
    write(file, progress)
    if file.suffix == ".mark":
        os.kill(os.getpid(), signal.SIGSTOP)
shard_passes._write_json = write_and_stop
pool = ProcessPoolExecutor(1, get_context("fork"))
worker = pool.submit(os.getpid).result()
def watch():
    os.waitpid(worker, os.WUNTRACED)
    Path(sys.argv[3]).write_text(str(worker))
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch).start()
config = PruningConfig(0.5, scope="global")
checkpoint.prune_files(*sys.argv[1:3], config, executor=pool, memory=30_000)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="this machine has no fork")
def test_a_worker_that_outlives_its_run_does_not_block_the_next(tmp_path: Path) -> None:
    """It hangs in the middle of a shard, which it has locked, and for ever."""
    source, out, whole, pid = (tmp_path / name for name in ("model.safetensors", "out", "whole", "pid"))
    rng = np.random.default_rng(0)
    checkpoint.save(source, {f"w{i}": rng.standard_normal((64, 48), np.float32) for i in range(4)})
    checkpoint.prune_files(source, whole, GLOBAL)
    command = [sys.executable, "-c", STOPPED, str(source), str(out), str(pid)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    worker = int(pid.read_text())
    try:
        (part,) = tmp_path.rglob("*.part")
        assert part.with_name(part.name + ".mark").is_file(), "what the next run would go on with"
        checkpoint.prune_files(source, out, GLOBAL)
        os.kill(worker, 0)  # it is still there
    finally:
        os.kill(worker, signal.SIGKILL)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not part.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "out", "whole", "pid"}


@pytest.mark.parametrize("ending", [".pt", ".bin", ".npz", ".onnx"])
@pytest.mark.parametrize("exists", [False, True])
def test_names_of_other_kinds_of_files_are_refused(ending: str, exists: bool, tmp_path: Path) -> None:
    """Neither becomes a directory of that name, nor a file in safetensors."""
    checkpoint.save(tmp_path / "model.safetensors", {"w": np.ones((4, 4), np.float32)})
    target = tmp_path / f"out{ending}"
    if exists:
        target.write_bytes(b"other")
    with pytest.raises(ValueError, match=rf"got a name in \{ending}, which is not; name a directory, or a"):
        checkpoint.prune_files(tmp_path / "model.safetensors", target, PruningConfig(0.5))
    assert target.exists() == exists
    assert not exists or target.read_bytes() == b"other"
