"""`sparsam prune` on what people have: Hugging Face directories, torch.save's files, NumPy's archives."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import fail, run
from rich.console import Console
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import torch
from sparsam import checkpoint, prune
from sparsam.checkpoint.file_defaults import heads_tied
from sparsam.cli import console, main
from sparsam.cli.console import Interrupted, kept


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A tiny BERT as `save_pretrained` leaves it, with a tokenizer's file."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    BertModel(BertConfig(vocab_size=40, max_position_embeddings=8, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    (tmp_path / "bert" / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    return tmp_path / "bert"


def weights_of(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder).weights


def test_a_hugging_face_directory_loads_again(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for _ in ("new", "there already"):
        assert main(["prune", str(bert), "-o", str(out), "--sparsity", "0.75"]) == 0
        captured = capsys.readouterr()
        assert captured.err.startswith(
            "sparsam: embeddings left dense: embeddings.position_embeddings.weight"
        )
        assert {path.name for path in out.iterdir()} == {path.name for path in bert.iterdir()}
    assert AutoConfig.from_pretrained(out).hidden_size == 16
    model = AutoModel.from_pretrained(out)
    before = weights_of(bert)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        dense = array.ndim < 2 or "embeddings" in name
        assert np.count_nonzero(array) == (np.count_nonzero(before[name]) if dense else array.size // 4), name


def test_vectors_and_embeddings_are_pruned_only_where_asked_for(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zeros = {}
    for option in ("", "--vectors", "--embeddings"):
        arguments = ["prune", bert, "-o", tmp_path / "out", "--override", "encoder.layer.0.*=0.9"]
        assert main([str(a) for a in [*arguments, *filter(None, [option])]]) == 0
        capsys.readouterr()
        pruned = weights_of(tmp_path / "out")
        zeros[option] = {name for name, array in pruned.items() if (array == 0).mean() > 0.4}
    norm, matrix = "encoder.layer.0.output.LayerNorm.weight", "encoder.layer.0.output.dense.weight"
    words = "embeddings.word_embeddings.weight"
    assert matrix in zeros[""]
    assert not {norm, words} & zeros[""]
    assert {norm} == {norm, words} & zeros["--vectors"]
    assert {words} == {norm, words} & zeros["--embeddings"]
    assert main(["prune", str(bert), "-o", str(tmp_path / "out"), "--override", f"{norm}=0.5"]) == 0
    assert (weights_of(tmp_path / "out")[norm] == 0).mean() == 0.5


def test_a_head_that_is_the_embedding_once_more_stays_dense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    checkpoint.save(tmp_path / "tied.safetensors", weights)
    assert heads_tied(tmp_path / "tied.safetensors") == ["lm_head.weight"]
    assert main(["prune", str(tmp_path / "tied.safetensors"), "-o", str(tmp_path / "out")]) == 0
    assert "lm_head.weight" in capsys.readouterr().err
    assert np.array_equal(weights_of(tmp_path / "out")["lm_head.weight"], weights["lm_head.weight"])
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    checkpoint.save(tmp_path / "free.safetensors", weights)
    assert heads_tied(tmp_path / "free.safetensors") == []


def test_lengths_that_a_pattern_does_not_divide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 6), "b": (4, 8), "c": (6, 4), "d": (2, 9)}
    weights = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    checkpoint.save(tmp_path / "in.safetensors", weights)
    arguments = ["prune", tmp_path / "in.safetensors", "-o", tmp_path / "out.safetensors", "--pattern", "2:4"]
    message = fail(capsys, *arguments)
    assert (
        "pattern 2:4: expected rows of a multiple of 4 weights; got others in 'a' [4, 6], 'd' [2, 9]"
        in message
    )
    for choice, zeros in (("skip", [0, 16, 12, 0]), ("unstructured", [12, 16, 12, 9])):
        run(capsys, *arguments, "--indivisible", choice)
        pruned = weights_of(tmp_path / "out.safetensors")
        assert [int((pruned[name] == 0).sum()) for name in shapes] == zeros
    run(
        capsys,
        *arguments,
        "--indivisible",
        "error",
        "--transposed",
        "a",
        "--transposed",
        "d",
        "--exclude",
        "d",
    )


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "npz", "safetensors"])
@pytest.mark.parametrize("source", ["pt", "npz", "safetensors"])
def test_each_kind_is_read_and_written(
    source: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {
        "fc.weight": rng.standard_normal((8, 6), dtype=np.float32),
        "fc.bias": rng.standard_normal(8, dtype=np.float32),
        "steps": np.arange(3),
    }
    file, out = tmp_path / f"in.{source}", tmp_path / f"out.{suffix}"
    if source == "pt":
        torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, file)
    elif source == "npz":
        np.savez(file, **weights)
    else:
        checkpoint.save(file, weights)
    text = run(capsys, "prune", file, "-o", out, "--sparsity", 0.5)
    if suffix == "npz":
        with np.load(out) as archive:
            pruned = dict(archive)
    elif suffix == "safetensors":
        pruned = weights_of(out)
    else:
        pruned = {name: tensor.numpy() for name, tensor in torch.load(out, weights_only=True).items()}
    expected = prune(weights, target_sparsity=0.5)
    assert {name: array.tobytes() for name, array in pruned.items()} == {
        name: array.tobytes() for name, array in expected.weights.items()
    }
    assert "fc.weight" in text
    assert "24" in run(capsys, "inspect", out)


def test_a_training_checkpoint_keeps_what_else_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = torch.randn(6, 4)
    state = {"state_dict": {"a.weight": shared, "b.weight": shared, "n": torch.ones(3)}, "epoch": 7}
    torch.save(state, tmp_path / "in.pt")
    run(capsys, "prune", tmp_path / "in.pt", "-o", tmp_path / "out.pt")
    whole = torch.load(tmp_path / "out.pt", weights_only=True)
    assert whole["epoch"] == 7
    pruned = whole["state_dict"]
    assert int((pruned["a.weight"] == 0).sum()) == 12
    assert pruned["a.weight"].data_ptr() == pruned["b.weight"].data_ptr()


def test_files_are_named_for_what_they_are(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(object, tmp_path / "model.pt")
    np.savez(tmp_path / "archive", a=np.ones(2))
    (tmp_path / "archive.npz").rename(tmp_path / "archive")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04")
    for name, message in [
        ("model.pt", "got what weights_only=True refuses"),
        ("archive", "got a NumPy archive (.npz)"),
        ("model.onnx", "expected an ONNX model; got one without a graph"),
        ("bad.npz", "expected a NumPy archive without objects"),
    ]:
        assert message in fail(capsys, "prune", tmp_path / name, "-o", tmp_path / "out")
    assert "ONNX" in fail(capsys, "prune", bert, "-o", tmp_path / "out.onnx", "--exclude", "embeddings.*")


def test_a_directory_of_pytorch_files(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {name: torch.from_numpy(array) for name, array in weights_of(bert).items()}
    torch.save(weights, bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    assert main(["prune", str(bert), "-o", str(tmp_path / "out"), "--sparsity", "0.5"]) == 0
    capsys.readouterr()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "vocab.txt",
        "model.safetensors",
    }
    assert (AutoModel.from_pretrained(tmp_path / "out").pooler.dense.weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("name", ["\x1b[2Jx", "\x9b31m", "[link=http://a]x[/link]", "[red]x", "[/x]"])
def test_a_bar_shows_names_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(console, "Console", lambda **_: terminal)
    with console.progress() as bar:
        bar.update(bar.add_task("start"), description=name, completed=1, total=2)
        bar.refresh()
    shown = screen.getvalue()
    assert "\x9b" not in shown
    assert "\x1b[2J" not in shown
    assert name.replace("\x1b", "\\x1b").replace("\x9b", "\\x9b") in shown


def test_an_interrupt_says_what_was_kept(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "prune_files", interrupt)
    assert main(["prune", str(bert), "-o", str(tmp_path / "out"), "--embeddings"]) == 130
    error = capsys.readouterr().err.strip()
    assert error == "sparsam: interrupted; kept: what is done so far; the same command continues from there"
    with pytest.raises(Interrupted, match="half"), kept("half"):
        raise KeyboardInterrupt
