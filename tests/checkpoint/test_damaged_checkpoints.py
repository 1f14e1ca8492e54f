from __future__ import annotations

import os
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import (
    GOLDEN,
    GOLDEN_DATA,
    write_raw,
)
from sparsam import checkpoint
from sparsam.checkpoint.locks import locked


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cut.safetensors"
    for length in range(len(GOLDEN)):
        file.write_bytes(GOLDEN[:length])
        with pytest.raises(ValueError, match=r"cut\.safetensors: expected a safetensors file; got"):
            checkpoint.load(file)
    file.write_bytes(GOLDEN + b"\0")
    with pytest.raises(ValueError, match="truncated or damaged"):
        checkpoint.load(file)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255))
def test_a_flipped_byte_is_read_or_refused(tmp_path: Path, position: int, value: int) -> None:
    file = tmp_path / "flipped"
    file.write_bytes(GOLDEN[:position] + bytes([value]) + GOLDEN[position + 1 :])
    with suppress(ValueError):
        weights = checkpoint.load(file).weights
        assert sum(array.nbytes for array in weights.values()) == len(GOLDEN_DATA)


HOSTILE = {
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
    "header past the end": (1 << 20).to_bytes(8, "little") + b"{}",
}
HOSTILE_HEADERS = {
    "overlap": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
    "hole": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
    "wrong size": b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}',
    "short size": b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,12]}}',
    "overflow": b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
    "negative": b'{"a":{"dtype":"F32","shape":[-3],"data_offsets":[0,12]}}',
    "unknown dtype": b'{"a":{"dtype":"F99","shape":[3],"data_offsets":[0,12]}}',
    "no mapping": b"[1, 2, 3]",
    "no text": b'{"\xff":1}',
    "numbers as metadata": b'{"__metadata__":{"a":1}}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_lengths(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad: expected a safetensors file; got .*; get it again"):
        checkpoint.load(tmp_path / "bad")


@pytest.mark.parametrize("header", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_hostile_headers(tmp_path: Path, header: bytes) -> None:
    size = 13 if b"[0,12]" in header else 12
    file = write_raw(tmp_path / "bad", header, size)
    for read in (checkpoint.load, lambda path: list(checkpoint.stream(path))):
        with pytest.raises(ValueError, match=r"bad: expected a safetensors file; got"):
            read(file)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_header_whose_length_begins_like_a_pickle_is_no_pickle(tmp_path: Path, protocol: int) -> None:
    length = 128 + 256 * protocol
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(length)
    (tmp_path / "cut").write_bytes(length.to_bytes(8, "little") + header)
    for read in (checkpoint.load, lambda file: checkpoint.prune_files(file, tmp_path / "out")):
        with pytest.raises(ValueError, match=f"got {length + 8} bytes, truncated or damaged"):
            read(tmp_path / "cut")


def test_a_swarm_of_empty_tensors_is_refused(tmp_path: Path) -> None:
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(entry % i for i in range(200_001)) + b"}"
    file = write_raw(tmp_path / "many", header)
    for read in (checkpoint.load, lambda file: checkpoint.prune_files(file, tmp_path / "out")):
        with pytest.raises(ValueError, match="many: expected at most 200000 tensors; got 200001; split"):
            read(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this machine has no pipes")
def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    for name in ("pipe.safetensors", "pipe.json", "zero.safetensors", "loop.safetensors"):
        for use in (
            checkpoint.load,
            lambda path: checkpoint.prune_files(path, tmp_path / "out"),
            lambda path: checkpoint.save(path, {"a": np.ones(2)}),
        ):
            with pytest.raises(
                (ValueError, OSError), match=r"folder, pipe or device|symbolic link|links in a circle"
            ):
                use(tmp_path / name)
    os.mkfifo(tmp_path / "state.lock")
    with (
        pytest.raises(ValueError, match="expected a regular file to lock; got a folder, pipe or device"),
        locked(tmp_path / "state.lock"),
    ):
        pass


def test_names_of_files_as_long_as_names_can_be(tmp_path: Path) -> None:
    file = tmp_path / ("\U0001f600" * 63)
    checkpoint.save(file, {"a": np.ones((2, 2), np.float32)})
    assert list(checkpoint.load(file).weights) == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_what_killed_processes_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    left = tmp_path / ".model.safetensors.0123abcd.tmp"
    other = tmp_path / ".other.safetensors.0123abcd.tmp"
    for folder in (left, other):
        folder.mkdir()
        (folder / "lock").touch()
        (folder / "file").write_bytes(b"half")
    with locked(left / "lock"):
        checkpoint.save(file, {"a": np.ones(2)})
        assert left.exists()
    checkpoint.save(file, {"a": np.ones(2)})
    assert {path.name for path in tmp_path.iterdir()} == {file.name, other.name}


@pytest.mark.parametrize("shape", ["[0,9223372036854775808]", f"[{','.join(['1'] * 100)}]"])
def test_shapes_that_numpy_cannot_hold(tmp_path: Path, shape: str) -> None:
    size = 0 if shape.startswith("[0") else 4
    header = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{size}]}}}}'
    file = write_raw(tmp_path / "bad", header.encode(), size)
    for read in (checkpoint.load, lambda path: list(checkpoint.stream(path))):
        with pytest.raises(
            ValueError, match=r"bad: tensor 'a': expected a shape that NumPy can hold; got \["
        ):
            read(file)


def test_a_dtype_that_numpy_lacks(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "f8", b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}', 2)
    with pytest.raises(ValueError, match=r"f8: tensor 'a': expected one of .*BF16.*; got F8_E4M3; convert"):
        checkpoint.load(file)


def test_foreign_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model"
    foreign = {
        "a Python pickle": pickle.dumps({"w": [1.0, 2.0]}),
        "a NumPy file": b"\x93NUMPY\x01\x00" + bytes(90),
        "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(90),
        "a GGUF file": b"GGUF" + bytes(90),
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "an empty file": b"",
        "28 bytes, truncated or damaged": b"just a text, not a model at all"[:28],
    }
    for kind, content in foreign.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"model: expected a safetensors file; got {kind}.*; [a-z]"):
            checkpoint.load(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    with pytest.raises(ValueError, match=r"a zip archive, as torch\.save writes it; convert it with"):
        checkpoint.load(file)


def test_paths_without_a_checkpoint(tmp_path: Path, sharded: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "missing.index.json")
    with pytest.raises(
        ValueError, match=r"expected a directory with model\.safetensors or .*; got one with neither; name"
    ):
        checkpoint.load(tmp_path)
    with pytest.raises(ValueError, match=r"expected a folder without model\.safetensors\.index\.json, since"):
        checkpoint.save(sharded / checkpoint.FILE_NAME, {"w": np.ones(1)})
    checkpoint.save(sharded / "other", {"w": np.ones(1)})
    (sharded / "other").rename(sharded / checkpoint.FILE_NAME)
    with pytest.raises(ValueError, match="got one with both; name the file"):
        checkpoint.load(sharded)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: expected a safetensors file; got a folder, pipe or device"):
        checkpoint.load(tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "model.safetensors").mkdir()
    for name in ("pipe", "link", "."):
        with pytest.raises(
            ValueError, match="expected a regular file to replace; got a folder, pipe or device"
        ):
            checkpoint.save(tmp_path / name, {"a": np.ones(3)})
    assert (tmp_path / "pipe").is_fifo()
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link", "model.safetensors"}
