"""`compress` and its command on tiny models of real classes, made from their configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import transformers
from command_line import fail
from compression_models import classifier, decoder, directory, encoder, texts, tokenizer

import torch
from sparsam.cli import main
from sparsam.config import PruningConfig
from sparsam.torch.compression import workflow
from sparsam.torch.compression.quality import QualityMeasure
from sparsam.torch.compression.texts import batches_of, read_texts
from sparsam.torch.compression.workflow import compress

MODELS = {"encoder": encoder, "decoder": decoder, "classifier": classifier}


@pytest.mark.parametrize("kind", MODELS)
def test_all_the_way(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = directory(tmp_path / "dense", MODELS[kind]())
    capsys.readouterr()
    before = {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()}
    out = tmp_path / "new" / "out"
    said: list[str] = []
    report = compress(
        source,
        texts(),
        out,
        PruningConfig(target_sparsity=0.75, method="obs"),
        shapes=((2, 8),),
        progress=lambda what, done, parts: said.append(f"{what} {done}/{parts}"),
    )
    assert capsys.readouterr() == ("", "")
    assert said == [
        "reading 0/5",
        "pruning 1/5",
        "comparing 2/5",
        "accelerating 3/5",
        "measuring 4/5",
        "measuring 5/5",
    ]
    assert [stage.name for stage in report.stages] == ["dense", "pruned", "accelerated"]
    dense, pruned, accelerated = (stage.quality for stage in report.stages)
    measure = {"encoder": "similarity", "decoder": "perplexity", "classifier": "agreement"}[kind]
    assert {dense.measure, pruned.measure} == {measure}
    if kind != "decoder":
        assert dense.value == pytest.approx(1)
    assert accelerated.value == pytest.approx(pruned.value, rel=1e-3)
    assert report.stages[1].sparsity == 0.75
    assert all(row.sparsity == 0.75 for row in report.pruned_weights)
    assert len(report.timings) == 1
    json.dumps(report.to_dict())
    assert f"{report.stages[1].quality}" in str(report)

    # The source is untouched, everything else came along, and the model loads.
    assert {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()} == before
    assert (out / "README.md").read_text() == "about it"
    assert (out / "1_Pooling" / "config.json").is_file()
    assert [item.name for item in out.parent.iterdir()] == ["out"]
    loaded = type(MODELS[kind]()).from_pretrained(out).eval()
    weights = dict(loaded.named_parameters())
    for row in report.pruned_weights:
        weight = torch.as_tensor(weights[row.name].detach())
        assert int((weight == 0).sum()) >= row.pruned_params


def test_similarity_is_spearmans() -> None:
    dense, other = encoder().eval(), encoder().eval()
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.mul_(3)
    batches = batches_of(texts(), tokenizer(), running=False, longest=32)
    embeddings = []
    for model in (dense, other):
        rows = []
        for batch in batches.held_out:
            with torch.inference_mode():
                states = model(**batch).last_hidden_state.double().numpy()
            for state, mask in zip(states, batch["attention_mask"].numpy(), strict=True):
                mean = state[mask == 1].mean(0)
                rows.append(mean / np.linalg.norm(mean))
        embeddings.append(np.array(rows))
    pairs = np.triu_indices(len(embeddings[0]), k=1)
    wanted = scipy.stats.spearmanr(*((e @ e.T)[pairs] for e in embeddings)).statistic
    assert QualityMeasure(dense, batches.held_out, causal=False).of(other).value == pytest.approx(wanted)
    assert wanted < 0.9999


def test_held_out_texts_are_not_calibrated_with() -> None:
    known = tokenizer()
    for running in (False, True):
        batches = batches_of(texts(), known, running=running, longest=16)
        assert batches.unit == ("windows" if running else "sentences")
        rows = {
            name: {tuple(row.tolist()) for batch in some for row in batch["input_ids"]}
            for name, some in (("kept", batches.calibration), ("apart", batches.held_out))
        }
        assert rows["kept"]
        assert rows["apart"]
        assert not rows["kept"] & rows["apart"]
    assert (
        sum(len(b["input_ids"]) for b in batches_of(texts(), known, running=False, longest=32).held_out) == 12
    )


def test_what_is_no_text(tmp_path: Path) -> None:
    short, binary = tmp_path / "short.txt", tmp_path / "binary"
    short.write_text("one\n\ntwo\none\n")
    binary.write_bytes(b"\xff\xfe\x00" * 100)
    with pytest.raises(ValueError, match="expected at least 20 different lines of text; got '2 in"):
        read_texts(short)
    with pytest.raises(ValueError, match="calibration: expected UTF-8 text"):
        read_texts(binary)
    with pytest.raises(ValueError, match="calibration: expected a file with a text on each line"):
        read_texts(tmp_path)
    with pytest.raises(ValueError, match="calibration: expected windows of 512 tokens"):
        batches_of(texts()[:20], tokenizer(), running=True, longest=512)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: expected a Hugging Face directory with config\.json"):
        compress(tmp_path, texts(), tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="output: expected a directory that does not exist yet"):
        compress(tmp_path, texts(), tmp_path / "there")
    with pytest.raises(ValueError, match="distill_minutes: expected a number from 0"):
        compress(tmp_path, texts(), tmp_path / "out", distill_minutes=-1)
    seq2seq = tmp_path / "t5"
    transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2).save_pretrained(seq2seq)
    with pytest.raises(ValueError, match="model: expected an encoder or a decoder; got 'an encoder-decoder"):
        compress(seq2seq, texts(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_found_before_anything_is_pruned(tmp_path: Path) -> None:
    source, out = directory(tmp_path / "dense", encoder()), tmp_path / "out"
    kept = sorted(source.iterdir())
    with pytest.raises(ValueError, match="output: expected a directory outside of the model's"):
        compress(source, texts(), source / "small")
    with pytest.raises(
        ValueError, match="calibration: expected at least 20 different lines of text; got '12'"
    ):
        compress(source, [*texts()[:12], texts()[0], " "], out)
    for shape in ((1, 33), (0, 8), (1, 0)):
        with pytest.raises(ValueError, match=r"shapes: expected .* of at most 32 tokens"):
            compress(source, texts(), out, shapes=(shape,))
    answers = directory(tmp_path / "answers", transformers.BertForQuestionAnswering(encoder().config))
    with pytest.raises(
        ValueError, match="got a BertForQuestionAnswering that returns start_logits, end_logits"
    ):
        compress(answers, texts(), out)
    clip: Any = transformers.CLIPConfig
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": 64, "max_position_embeddings": 32}
    images = small | {"image_size": 8, "patch_size": 4}
    pairs = transformers.CLIPModel(clip(text_config=text, vision_config=images, projection_dim=8))
    with pytest.raises(ValueError, match="got a CLIPModel that raises"):
        compress(directory(tmp_path / "pairs", pairs), texts(), out)
    assert sorted(source.iterdir()) == kept
    assert not out.exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = directory(tmp_path / "dense", encoder())
    capsys.readouterr()
    file, page = tmp_path / "text.txt", tmp_path / "page.html"
    file.write_text("\n".join(texts()), encoding="utf-8")
    out = tmp_path / "out"
    arguments = ("compress", str(source), "--calibration", str(file), "-o", str(out))
    assert main([*arguments, "--sparsity", "0.9", "--distill", "0.02", "--html", str(page)]) == 0
    printed, said = capsys.readouterr()
    assert said == ""
    for word in ("dense", "pruned", "distilled", "accelerated", "90.0%", "similarity", "speed-up"):
        assert word in printed
    html = page.read_text(encoding="utf-8")
    assert html.count("<img") == 2
    assert "encoder.layer.1.output.dense.weight" in html
    assert "http" not in html.replace("http://www.w3.org", "")
    assert "output: expected a directory that does not exist yet" in fail(capsys, *arguments)


def test_a_distillation_that_harms_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def harm(student: Any, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            student.encoder.layer[1].output.dense.weight.mul_(-3)

    monkeypatch.setattr(workflow, "distill", harm)
    source = directory(tmp_path / "dense", encoder())
    config = PruningConfig(target_sparsity=0.5, method="obs")
    report = compress(source, texts(), tmp_path / "out", config, distill_minutes=1, shapes=((1, 4),))
    _, pruned, distilled, accelerated = (stage.quality.value for stage in report.stages)
    assert distilled < pruned
    assert accelerated == pytest.approx(pruned, rel=1e-3)
