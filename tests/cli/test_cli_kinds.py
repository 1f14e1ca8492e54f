"""The command line reads and writes what people have: files of torch, NumPy and ONNX, whole or in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import fail, run

from sparsam import checkpoint
from sparsam.cli import main
from sparsam.config import PruningConfig
from sparsam.pruner import prune

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(3)
EMBEDDING = RNG.standard_normal((16, 8), dtype=np.float32)
LAYER = RNG.standard_normal((8, 8), dtype=np.float32)
PRUNED = prune({"fc.weight": LAYER}, PruningConfig(0.5)).weights["fc.weight"]
NOTE = (
    "sparsam: embeddings left dense: lm_head.weight, model.embed_tokens.weight; "
    "prune them with --embeddings\n"
)


def tensors(*, tied: bool) -> dict[str, Any]:
    embedding = torch.from_numpy(EMBEDDING.copy())
    head = embedding if tied else embedding.clone()
    return {
        "model.embed_tokens.weight": embedding,
        "fc.weight": torch.from_numpy(LAYER.copy()),
        "lm_head.weight": head,
    }


def loaded(path: Path) -> dict[str, Any]:
    if path.suffix == ".npz":
        return dict(np.load(path))
    if path.suffix in (".pt", ".bin"):
        content = torch.load(path, weights_only=True)
        return {name: tensor.numpy() for name, tensor in content.items()}
    return checkpoint.load(path).weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("source", ["in.pt", "in.bin", "in.npz", "in.safetensors"])
@pytest.mark.parametrize("target", ["out.pt", "out.npz", "out.safetensors", "out"])
def test_every_kind_into_every_kind_with_tied_heads_dense(
    source: str, target: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / source, tmp_path / target
    content = tensors(tied=tied)
    arrays = {name: tensor.numpy() for name, tensor in content.items()}
    if file.suffix in (".pt", ".bin"):
        torch.save(content, file)
    elif file.suffix == ".npz":
        np.savez(file, **arrays)
    else:
        checkpoint.save(file, arrays)
    assert main(["prune", str(file), "-o", str(out)]) == 0
    assert capsys.readouterr().err == NOTE
    pruned = loaded(out)
    assert pruned.keys() == arrays.keys()
    assert pruned["fc.weight"].tobytes() == PRUNED.tobytes()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert pruned[name].tobytes() == EMBEDDING.tobytes()
    assert {path.name for path in tmp_path.iterdir()} == {source, target}


def test_heads_that_are_not_the_embedding_are_pruned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = tensors(tied=False)
    content["lm_head.weight"][0, 0] += 1
    torch.save(content, tmp_path / "in.pt")
    assert main(["prune", str(tmp_path / "in.pt"), "-o", str(tmp_path / "out.pt")]) == 0
    assert "embeddings left dense: model.embed_tokens.weight; prune" in capsys.readouterr().err
    assert (loaded(tmp_path / "out.pt")["lm_head.weight"] == 0).sum() == 64


def bin_shards(folder: Path) -> Path:
    content = tensors(tied=True)
    shards = {
        "fc.weight": "pytorch_model-00001-of-00002.bin",
        "model.embed_tokens.weight": "pytorch_model-00002-of-00002.bin",
        "lm_head.weight": "pytorch_model-00002-of-00002.bin",
    }
    folder.mkdir()
    for shard in set(shards.values()):
        torch.save({name: content[name] for name, own in shards.items() if own == shard}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("by_index", [True, False])
def test_shards_of_torch_become_shards_of_safetensors(
    by_index: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = bin_shards(tmp_path / "in"), tmp_path / "out"
    source = folder / "pytorch_model.bin.index.json" if by_index else folder
    assert main(["prune", str(source), "-o", str(out)]) == 0
    assert capsys.readouterr().err == NOTE
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    beside = set() if by_index else {"config.json"}
    assert {file.name for file in out.iterdir()} == {*shards, checkpoint.INDEX_NAME, *beside}
    pruned = checkpoint.load(out)
    assert pruned.metadata == {"format": "pt"}
    assert pruned.weights["fc.weight"].tobytes() == PRUNED.tobytes()
    assert pruned.weights["lm_head.weight"].tobytes() == EMBEDDING.tobytes()
    assert "lm_head.weight" in run(capsys, "inspect", folder)
    assert main(["prune", str(source), "-o", str(tmp_path / "one.bin")]) == 0
    assert loaded(tmp_path / "one.bin")["fc.weight"].tobytes() == PRUNED.tobytes()


def test_damaged_shards_of_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bin_shards(tmp_path / "in")
    index = folder / "pytorch_model.bin.index.json"
    good = index.read_text()
    for shard, message in (
        ("../x.bin", "expected shards to be names of files beside it"),
        ("none.bin", "expected the shard 'none.bin' beside it"),
        ("pytorch_model-00002-of-00002.bin", "expected exactly the tensors that"),
    ):
        content = json.loads(good)
        content["weight_map"]["fc.weight"] = shard
        index.write_text(json.dumps(content))
        assert message in fail(capsys, "prune", folder, "-o", tmp_path / "out")
    index.write_text(good)
    assert "expected a file or a directory; got an index" in fail(
        capsys, "prune", folder, "-o", tmp_path / "x.bin.index.json"
    )
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"x")
    assert "weights_only=True refuses" in fail(capsys, "inspect", folder)
    assert {file.name for file in tmp_path.iterdir()} == {"in"}


def test_sensitivity_and_search_take_every_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kinds_eval.py").write_text("def zeros(weights):\n    return 1.0\n")
    torch.save({"fc.weight": torch.from_numpy(LAYER.copy())}, "in.pt")
    evaluate = ("--eval", "kinds_eval:zeros")
    assert "fc.weight" in run(capsys, "sensitivity", "in.pt", *evaluate)
    run(capsys, "search", "in.pt", *evaluate, "--min-score", 0.5, "-o", "out.pt")
    assert not loaded(Path("out.pt"))["fc.weight"].any()
