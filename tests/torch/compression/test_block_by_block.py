"""`sparsam compress` of models that memory does not hold, against `prune` on the loaded model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from compression_models import classifier, decoder, directory, encoder, texts
from safetensors.torch import load_file

import torch
from sparsam.cli import main
from sparsam.config import PruningConfig
from sparsam.inputs import system
from sparsam.torch import prune
from sparsam.torch.compression import block_by_block
from sparsam.torch.compression.block_by_block import compress_files, outgrows_memory
from sparsam.torch.compression.model_directory import read_directory
from sparsam.torch.compression.texts import batches_of
from sparsam.torch.compression.workflow import SAMPLES

CONFIG = PruningConfig(target_sparsity=0.5, method="obs")


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("build", [encoder, decoder, classifier, gpt2])
def test_the_bits_of_pruning_the_loaded_model(build: Callable[[], Any], tmp_path: Path) -> None:
    source, out = directory(tmp_path / "dense", build()), tmp_path / "out"
    report = compress_files(source, texts(), out, CONFIG)
    loaded = read_directory(source, tmp_path)
    batches = batches_of(texts(), loaded.tokenizer, running=loaded.causal, longest=loaded.longest)
    wanted = prune(loaded.model, CONFIG, batches.calibration, calibration_samples=SAMPLES[batches.unit])
    state = loaded.model.state_dict()
    found = load_file(out / "model.safetensors")
    assert found.keys() == load_file(source / "model.safetensors").keys()
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert [(row.name, row.error) for row in report.layers] == [
        (row.name, row.error) for row in wanted.layers
    ]
    again: Any = type(loaded.model)
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in again.from_pretrained(out).state_dict().items()
    )
    names = {path.relative_to(source).as_posix() for path in source.rglob("*")}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*")} == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


def written(folder: Path) -> Path:
    file = folder / "texts.txt"
    file.write_text("\n".join(texts()))
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What a command that must succeed prints."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr()


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that must fail prints on standard error."""
    assert main([str(argument) for argument in arguments]) == 2
    return str(capsys.readouterr().err)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = directory(tmp_path / "dense", decoder())
    options = ("--calibration", written(tmp_path), "--sparsity", "0.5", "--method", "wanda")
    result = run(capsys, "compress", source, *options, "-o", tmp_path / "out", "--memory", "1GiB")
    assert "block by block from disk: only pruned; packing and the table of quality need" in result.err
    assert "model.layers.1.mlp.down_proj.weight" in result.out
    result = run(capsys, "compress", source, *options, "-o", tmp_path / "json", "--memory", "1GiB", "--json")
    assert json.loads(result.out)["calibration"].endswith("distinct")


def test_a_page_of_what_was_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, page = directory(tmp_path / "<b>dense", decoder()), tmp_path / "page.html"
    options = (
        "--calibration",
        written(tmp_path),
        "--sparsity",
        "0.5",
        "--method",
        "wanda",
        "--memory",
        "1GiB",
    )
    result = run(capsys, "compress", source, *options, "-o", tmp_path / "out", "--html", page, "--json")
    text, report = page.read_text(), json.loads(result.out)
    assert "Left out, because they need the whole model in memory: its quality on held-out texts" in text
    assert f"{report['calibration']}.</p>" in text
    assert "&lt;b&gt;dense" in text
    assert "<b>dense" not in text
    assert text.count("data:image/svg+xml") == 1
    pruned = [row for row in report["layers"] if row["pattern"] != "dense"]
    assert len(pruned) == 14
    for row in pruned:
        cells = "".join(
            f"<td>{cell}</td>" for cell in (f"{row['total_params']:,}", "50.00%", f"{row['error']:.2e}")
        )
        assert f'<td class="text">{row["name"]}</td>' in text
        assert cells in text


def test_training_block_by_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, page = directory(tmp_path / "dense", decoder()), tmp_path / "page.html"
    options = ("--calibration", written(tmp_path), "--sparsity", "0.5", "--method", "wanda", "--json")
    out = tmp_path / "out"
    more = ("--memory", "1GiB", "--distill", "0.01", "--html", page)
    result = run(capsys, "compress", source, *options, "-o", out, *more)
    assert "block by block from disk: pruned and trained; packing and the table" in result.err
    report = json.loads(result.out)
    names = ["model.layers.0", "model.layers.1"]
    assert [block["name"] for block in report["distilled"]] == names
    assert all(block["after"] < block["before"] for block in report["distilled"])
    assert all(f'<td class="text">{name}</td>' in page.read_text() for name in names)
    again: Any = transformers.LlamaForCausalLM
    assert again.from_pretrained(out).config.num_hidden_layers == 2


def test_training_comes_nearer_to_the_dense_model(tmp_path: Path) -> None:
    source = directory(tmp_path / "dense", encoder())
    config = PruningConfig(target_sparsity=0.6, method="wanda")
    compress_files(source, texts(), tmp_path / "pruned", config)
    compress_files(source, texts(), tmp_path / "trained", config, distill_steps=20)
    loaded = read_directory(source, tmp_path)
    batches = batches_of(texts(), loaded.tokenizer, running=loaded.causal, longest=loaded.longest)

    def distance(folder: Path) -> float:
        other = read_directory(folder, tmp_path).model
        total = 0.0
        with torch.no_grad():
            for batch in batches.held_out:
                rows = batch["attention_mask"].bool()
                a, b = (one(**batch).last_hidden_state[rows] for one in (other, loaded.model))
                total += float((a - b).square().sum())
        return total

    assert distance(tmp_path / "trained") < distance(tmp_path / "pruned")
    zeros = [load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "trained")]
    weights = [name for name in zeros[0] if name.startswith("encoder.layer") and zeros[0][name].ndim == 2]
    assert all(torch.equal(zeros[0][name] == 0, zeros[1][name] == 0) for name in weights)


@pytest.mark.parametrize("memory", [(), ("--memory", "1GiB")])
def test_a_page_in_the_place_of_the_output(
    memory: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = directory(tmp_path / "dense", encoder()), tmp_path / "out"
    options = ("--calibration", written(tmp_path), "-o", out, "--html", tmp_path / "dense" / ".." / "out")
    message = fail(capsys, "compress", source, *options, *memory)
    assert "--html: expected a file beside the output; got" in message
    assert not out.exists()


def test_memory_that_is_not_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = directory(tmp_path / "dense", encoder())
    options = ("--calibration", written(tmp_path), "-o", tmp_path / "out", "--memory", "100KiB")
    message = fail(capsys, "compress", source, *options)
    assert "memory: expected at least 2MiB, for 'encoder.layer.1' and the work on it" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "texts.txt"]


def test_a_model_that_outgrows_memory_is_taken_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = directory(tmp_path / "dense", encoder())
    size = 3 * (source / "model.safetensors").stat().st_size
    monkeypatch.setattr(block_by_block, "available_memory", lambda: size)
    assert not outgrows_memory(source)
    monkeypatch.setattr(block_by_block, "available_memory", lambda: size // 2)
    assert outgrows_memory(source)
    options = ("--calibration", written(tmp_path), "-o", tmp_path / "out", "--method", "magnitude")
    assert "block by block from disk" in run(capsys, "compress", source, *options).err
    options = (*options[:3], tmp_path / "other", "--distill", "0.01")
    assert "block by block from disk" in run(capsys, "compress", source, *options).err
    assert (tmp_path / "other" / "model.safetensors").is_file()


def test_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("info", "MemTotal: 9 kB\nMemAvailable: 7 kB\n"), ("limit", "5000"), ("used", "2000")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(system, "_MEMINFO", tmp_path / "info")
    monkeypatch.setattr(system, "_CGROUPS", ((tmp_path / "limit", tmp_path / "used"),))
    assert system.available_memory() == 3000
    (tmp_path / "limit").write_text("max")
    assert system.available_memory() == 7 * 1024
    (tmp_path / "info").write_text("nothing")
    assert system.available_memory() is None


def test_a_model_in_a_folder_of_sentence_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, inner = directory(tmp_path / "dense", encoder()), tmp_path / "out", "0_Transformer"
    wanted = tmp_path / "wanted"
    compress_files(source, texts(), wanted, CONFIG)
    (source / inner).mkdir()
    for file in [file for file in source.iterdir() if file.is_file()]:
        file.rename(source / inner / file.name)
    (source / "1_Dense").mkdir()
    (source / "1_Dense" / "model.safetensors").write_bytes(b"a part of the model")
    (source / "modules.json").write_text(f'[{{"path": "{inner}"}}, {{"path": "1_Dense"}}]')
    monkeypatch.setattr(block_by_block, "available_memory", lambda: 1)
    assert outgrows_memory(source)
    compress_files(source, texts(), out, CONFIG)
    names = {path.relative_to(source).as_posix() for path in source.rglob("*")}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*")} == names
    assert (out / inner / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()
    assert (out / "1_Dense" / "model.safetensors").read_bytes() == b"a part of the model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out", "wanted"]


def test_directories_that_it_does_not_take(tmp_path: Path) -> None:
    source = directory(tmp_path / "dense", encoder())
    (source / "model.safetensors").rename(source / "weights.safetensors")
    with pytest.raises(ValueError, match=r"expected a directory with model.safetensors or .*; got one with"):
        compress_files(source, texts(), tmp_path / "out")
