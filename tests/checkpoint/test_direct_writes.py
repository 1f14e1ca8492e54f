"""Blocks written past the page cache, where that can be: the file has their bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparsam import PruningConfig, _core, checkpoint, prune
from sparsam.checkpoint import direct_writes, shard_passes
from sparsam.checkpoint.direct_writes import DirectWrites, block_for

SIZES = (5, 4091, 4096, 4097, 100_000, 1 << 16, 3, 12_288, 9001)


def as_it_is(patch: pytest.MonkeyPatch) -> None:
    """Whatever this machine can."""


def without(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(direct_writes, "open_direct", lambda _: None)


def refused(patch: pytest.MonkeyPatch) -> None:
    """A disk whose blocks are larger than a page."""

    def pwrite(*_: Any) -> int:
        raise OSError(errno.EINVAL, "invalid argument")

    patch.setattr(os, "pwrite", pwrite)
    patch.setattr(direct_writes, "open_direct", lambda path: os.open(path, os.O_WRONLY))


def in_parts(patch: pytest.MonkeyPatch) -> None:
    """A system that writes a part of what it is given."""
    plain = os.pwrite
    patch.setattr(os, "pwrite", lambda file, data, at: plain(file, data[:8192], at))
    patch.setattr(direct_writes, "open_direct", lambda path: os.open(path, os.O_WRONLY))


@pytest.mark.parametrize("machine", [as_it_is, without, refused, in_parts])
@pytest.mark.parametrize("start", [0, 8, 4096, 777])
def test_the_bytes_of_all_blocks(
    machine: Callable[[pytest.MonkeyPatch], None], start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch)
    rng = np.random.default_rng(0)
    wanted, at = bytearray(start), start
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        file.write(bytes(start))
        output = DirectWrites(file)
        memory = block_for(max(SIZES))
        for size in SIZES:
            data = output.room(memory, at, size)
            assert len(data) == size
            data[...] = rng.integers(0, 256, size, np.uint8)
            output.write(data, at)
            wanted += data.tobytes()
            at += size
        output.close()
        output.close()
    assert (tmp_path / "file").read_bytes() == wanted


def test_whole_pages_go_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []
    plain = os.pwrite

    def pwrite(file: int, data: Any, at: int) -> int:
        seen.append((np.frombuffer(data, np.uint8).ctypes.data % 4096, len(data), at))
        return plain(file, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(direct_writes, "open_direct", lambda path: os.open(path, os.O_WRONLY))
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        output = DirectWrites(file)
        data = output.room(block_for(20_000), 1000, 20_000)
        data[...] = 7
        output.write(data, 1000)
        output.close()
    assert seen == [(0, 16384, 4096)]
    assert (tmp_path / "file").read_bytes() == bytes(1000) + bytes([7]) * 20_000


def test_an_error_of_the_disk_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(direct_writes, "open_direct", lambda path: os.open(path, os.O_WRONLY))
    monkeypatch.setattr(os, "pwrite", full)
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        output = DirectWrites(file)
        with pytest.raises(OSError, match="no space left"):
            output.write(output.room(block_for(8192), 0, 8192), 0)
        output.close()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 1.0])
def test_counting_in_blocks(
    dtype: str, sparsity: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that do not divide the tensors, many ties, and a sample that the threshold lies outside of."""
    monkeypatch.setattr(shard_passes, "_BLOCK", 1000)
    rng = np.random.default_rng(1)
    weights = {
        "a": rng.integers(-40, 40, (60, 50)).astype(dtype),
        "b": rng.standard_normal((7, 9)).astype(dtype),
        "empty": np.empty((0, 3), dtype),
    }
    checkpoint.save(tmp_path / "dense.safetensors", weights)
    config = PruningConfig(sparsity, scope="global")
    checkpoint.prune_files(tmp_path / "dense.safetensors", tmp_path / "out", config)
    wanted = prune(weights, config).weights
    for name, array in checkpoint.stream(tmp_path / "out"):
        np.testing.assert_array_equal(array, wanted[name], strict=True)


def test_the_place_of_a_nan_in_a_later_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_passes, "_BLOCK", 1000)
    array = np.ones((60, 50), np.float32)
    array[40, 7] = np.nan
    checkpoint.save(tmp_path / "dense.safetensors", {"a": array})
    config = PruningConfig(0.5, scope="global")
    with pytest.raises(ValueError, match=r"'a'.*index \(40, 7\)"):
        checkpoint.prune_files(tmp_path / "dense.safetensors", tmp_path / "out", config)


def test_a_file_that_is_cut_short_while_it_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file would end the process here."""
    file = tmp_path / "dense.safetensors"
    checkpoint.save(file, {"a": np.ones((1000, 1000), np.float32)})
    count = _core.bracket

    def cut(*given: Any) -> Any:
        os.truncate(file, 500_000)
        return count(*given)

    monkeypatch.setattr(shard_passes, "_core", SimpleNamespace(bracket=cut))
    with pytest.raises(ValueError, match="expected a file that stays as it is; got one that was cut short"):
        checkpoint.prune_files(file, tmp_path / "out", PruningConfig(0.5, scope="global"))
    assert not (tmp_path / "out").exists()
