from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from checkpoints import (
    GOLDEN,
    assert_same,
    golden_weights,
    listing,
)
from sparsam import checkpoint

# What cannot be saved


@pytest.mark.parametrize(
    "dtype", [object, "U3", "M8[s]", np.complex64, np.longdouble, ml_dtypes.float8_e4m3fn]
)
def test_dtypes_that_cannot_be_saved(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(
        TypeError, match=r"tensor 'w': expected one of .*bfloat16.*; got .*; convert it with \.astype"
    ):
        checkpoint.save(tmp_path / "w", {"w": np.zeros(2, dtype)})
    assert not list(tmp_path.iterdir())


def test_names_and_metadata_must_be_text(tmp_path: Path) -> None:
    bad: list[Any] = [
        ({1: np.ones(1)}, {}),
        ({"w": np.ones(1)}, {"step": 3}),
        ({"w": np.ones(1)}, {3: "step"}),
    ]
    for weights, metadata in bad:
        with pytest.raises(TypeError, match="names, metadata: expected text only; got"):
            checkpoint.save(tmp_path / "w", weights, metadata)
    with pytest.raises(ValueError, match="__metadata__"):
        checkpoint.save(tmp_path / "w", {"__metadata__": np.ones(1)})
    assert not list(tmp_path.iterdir())


# Replacing


@pytest.mark.parametrize("step", ["chmod", "replace"])
@pytest.mark.parametrize("old", [GOLDEN, None])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, old: bytes | None
) -> None:
    if old is not None:
        (tmp_path / "w").write_bytes(old)
    before = listing(tmp_path)

    def fail(*_: Any) -> None:
        msg = "no"
        raise OSError(msg)

    monkeypatch.setattr(Path, step, fail)
    with pytest.raises(OSError, match=r"^no$"):
        checkpoint.save(tmp_path / "w", {"w": np.ones(5)})
    assert listing(tmp_path) == before


FULL_DISK = """
import resource, signal, sys
import numpy as np
from sparsam import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
like = checkpoint.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
large = {name: np.ones(size) for name, size in zip(like.weights, (100, 100, 10_000))}
try:
    checkpoint.save(sys.argv[2], large, like=like)
except OSError as error:
    sys.exit(str(error))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_full_disk_leaves_no_trace(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(GOLDEN)
    before = listing(sharded)
    for source, target in [
        (sharded, sharded),
        (sharded, tmp_path / "new"),
        (tmp_path / "one", tmp_path / "one"),
    ]:
        script = (
            FULL_DISK.replace("(100, 100, 10_000)", "(100, 10_000)") if source.name == "one" else FULL_DISK
        )
        command = [sys.executable, "-c", script, str(source), str(target)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 1
        assert "File too large" in run.stderr
        assert "Traceback" not in run.stderr
    assert listing(sharded) == before
    assert (tmp_path / "one").read_bytes() == GOLDEN
    assert {file.name for file in tmp_path.iterdir()} == {"sharded", "one"}


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such directory: .*nowhere'"):
        checkpoint.save(tmp_path / "nowhere" / "w", {"w": np.ones(1)})


@pytest.mark.skipif(sys.platform == "win32", reason="needs modes and links")
def test_modes_and_links_are_kept(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "new", {"w": np.ones(1)})
    finally:
        os.umask(umask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640

    (tmp_path / "new").chmod(0o604)
    (tmp_path / "link").symlink_to("new")
    checkpoint.save(tmp_path / "link", {"w": np.zeros(2)})
    assert (tmp_path / "link").is_symlink()
    assert checkpoint.load(tmp_path / "new").weights["w"].shape == (2,)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o604


def test_a_checkpoint_can_be_saved_over_itself(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(GOLDEN)
    read = checkpoint.load(tmp_path / "w")
    checkpoint.save(tmp_path / "w", read.weights, like=read)
    assert_same(checkpoint.load(tmp_path / "w").weights, golden_weights())
    assert_same(read.weights, golden_weights())


# Overwriting


def test_overwrites_sees_through_paths_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / checkpoint.FILE_NAME
    file.write_bytes(GOLDEN)
    (tmp_path / "other").write_bytes(GOLDEN)
    (tmp_path / "soft").symlink_to(file)
    (tmp_path / "hard").hardlink_to(file)
    (tmp_path / "folder").symlink_to(tmp_path, target_is_directory=True)
    for same in (
        file,
        checkpoint.FILE_NAME,
        "soft",
        "hard",
        tmp_path,
        f"folder/{checkpoint.FILE_NAME}",
        "./folder",
    ):
        assert checkpoint.overwrites(same, file), same
        assert checkpoint.overwrites(file, same), same
    for different in ("other", "missing"):
        assert not checkpoint.overwrites(different, file)


def test_overwrites_compares_every_shard(sharded: Path, tmp_path: Path) -> None:
    assert checkpoint.overwrites(sharded, sharded / checkpoint.INDEX_NAME)
    assert checkpoint.overwrites(sharded / "another.index.json", sharded)
    assert not checkpoint.overwrites(tmp_path / "new", sharded)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model-00002-of-00002.safetensors").symlink_to(
        sharded / "model-00002-of-00002.safetensors"
    )
    assert checkpoint.overwrites(tmp_path / "linked", sharded)
