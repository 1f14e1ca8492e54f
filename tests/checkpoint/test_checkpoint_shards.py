from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints import (
    assert_same,
    edit_index,
    listing,
)
from sparsam import checkpoint


def test_sharded_round_trip(sharded: Path, tmp_path: Path) -> None:
    read = checkpoint.load(sharded)
    assert list(read.weights) == ["a.weight", "x.weight", "z"]
    assert read.metadata == {"format": "pt", "part": "2"}
    assert_same(checkpoint.load(sharded / checkpoint.INDEX_NAME).weights, read.weights)
    assert dict(checkpoint.stream(sharded)).keys() == read.weights.keys()

    pruned = {**read.weights, "x.weight": np.zeros((2, 3), np.float16)}
    checkpoint.save(tmp_path / "new", pruned, like=read)
    again = checkpoint.load(tmp_path / "new")
    assert_same(again.weights, pruned)
    assert {file.name for file in (tmp_path / "new").iterdir()} == {file.name for file in sharded.iterdir()}
    assert again.shards is not None
    assert read.shards is not None
    assert again.shards.weight_map == read.shards.weight_map
    assert again.shards.metadata == read.shards.metadata
    assert again.shards.index_metadata == {"note": "kept", "total_size": 8 + 12 + 24}


def test_sharded_save_to_an_index_of_another_name(sharded: Path, tmp_path: Path) -> None:
    read = checkpoint.load(sharded)
    checkpoint.save(tmp_path / "unet.index.json", read.weights, {"by": "us"}, like=read)
    again = checkpoint.load(tmp_path / "unet.index.json")
    assert_same(again.weights, read.weights)
    assert again.shards is not None
    assert again.shards.index_name == "unet.index.json"
    assert set(map(str, again.shards.metadata.values())) == {"{'by': 'us'}"}


def test_torch_reads_saved_shards(sharded: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from safetensors.torch import load_file  # noqa: PLC0415

    read = checkpoint.load(sharded)
    checkpoint.save(tmp_path / "new", read.weights, like=read)
    index = json.loads((tmp_path / "new" / checkpoint.INDEX_NAME).read_text())
    for name, shard in index["weight_map"].items():
        tensor = load_file(tmp_path / "new" / shard)[name]
        assert np.array_equal(tensor.double().numpy(), read.weights[name].astype(np.float64))


def test_sharded_save_needs_the_same_tensors(sharded: Path, tmp_path: Path) -> None:
    read = checkpoint.load(sharded)
    for weights in ({**read.weights, "new": np.ones(1)}, {"z": read.weights["z"]}):
        with pytest.raises(ValueError, match=r"exactly the tensors of `like`; got others: '"):
            checkpoint.save(tmp_path / "new", weights, like=read)
    assert not (tmp_path / "new").exists()


def test_a_failed_sharded_save_leaves_no_folder(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = checkpoint.load(sharded)
    before = listing(sharded)

    def fail(*_: Any, **__: Any) -> None:
        msg = "no"
        raise OSError(msg)

    monkeypatch.setattr(Path, "write_text", fail)
    for target in (sharded, tmp_path / "new"):
        with pytest.raises(OSError, match=r"^no$"):
            checkpoint.save(target, read.weights, like=read)
    assert listing(sharded) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "shard",
    [
        "../evil.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x",
        "C:x",
        "",
        ".",
        "..",
        "a\0b",
        "x" * 5000,
        3,
        None,
        ["x"],
    ],
)
def test_shards_outside_the_folder_are_refused(sharded: Path, shard: Any) -> None:
    save_file({"x.weight": np.ones(1)}, sharded.parent / "evil.safetensors")
    edit_index(sharded, weight_map={"x.weight": shard})
    with pytest.raises(
        ValueError,
        match=r"index\.json: (expected (shards to be names of files|the shard '.*') beside"
        r"|field weight_map\[\.\.\.\]: expected str; got )",
    ):
        checkpoint.load(sharded)


def test_index_and_shards_must_agree(sharded: Path) -> None:
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    places = {"x.weight": first, "a.weight": second, "z": second}
    cases = [
        (places | {"ghost": first}, f"{first}: .* got a shard without 'ghost'"),
        (places | {"x.weight": second}, f"{second}: .* got a shard without 'x.weight'"),
        ({"x.weight": first, "z": second}, f"{second}: .* got one that also holds 'a.weight'"),
        (
            places | {"more": "model-3.safetensors"},
            "expected the shard 'model-3.safetensors' beside it; got no such",
        ),
        (places | {"more": checkpoint.INDEX_NAME}, r"index\.json: expected a safetensors file"),
    ]
    for weight_map, message in cases:
        edit_index(sharded, weight_map=weight_map)
        for read in (checkpoint.load, lambda path: next(checkpoint.stream(path))):
            with pytest.raises(ValueError, match=message):
                read(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first = sharded / "model-00001-of-00002.safetensors"
    save_file({"x.weight": np.ones(2), "z": np.ones(3)}, first)
    with pytest.raises(
        ValueError, match="got one that also holds 'z'; get the index and its shards from the same"
    ):
        checkpoint.load(sharded)


def test_a_truncated_shard_is_refused(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"model-00002-of-00002\.safetensors: expected .* truncated or damaged"
    ):
        checkpoint.load(sharded)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}, "metadata": 3}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        '{"weight_map": ' + "[" * 100_000,
        "\udcff",
    ],
)
def test_a_broken_index_is_refused(sharded: Path, content: str) -> None:
    (sharded / checkpoint.INDEX_NAME).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"index\.json: .*expected .*; got .*; get it again"):
        checkpoint.load(sharded)
