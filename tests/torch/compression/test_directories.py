"""What `compress` makes of the folders in a Hugging Face directory, those of sentence-transformers too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import fail
from compression_models import directory, encoder, texts
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

import torch
from sparsam.config import PruningConfig
from sparsam.torch.compression.model_directory import copy_companions
from sparsam.torch.compression.quality import QualityMeasure
from sparsam.torch.compression.workflow import compress
from torch import Tensor, nn

CONFIG = PruningConfig(target_sparsity=0.75, method="magnitude")


def test_the_dense_model_in_other_forms_stays_behind(tmp_path: Path) -> None:
    source, out = directory(tmp_path / "dense", encoder()), tmp_path / "out"
    for name in ("onnx/model.onnx", "openvino/model.bin", "onnx/model.onnx_data", "extra/deep/a.safetensors"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"dense")
    for name in ("onnx/config.json", ".git/lfs/objects", "assets/picture.svg", "tf_model.h5", "vocab.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("more")
    compress(source, texts(), out, CONFIG, shapes=((1, 4),))
    found = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert {"1_Pooling/config.json", "README.md", "assets/picture.svg", "vocab.txt"} < found
    assert not [name for name in found if name.startswith(("onnx", "openvino", "extra", ".git", "tf_"))]
    (tmp_path / "new").touch()  # whoever may read a new file may read these
    may = (tmp_path / "new").stat().st_mode
    assert {file.stat().st_mode for file in out.glob("*.safetensors")} == {may}


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_a_directory_of_sentence_transformers(inner: str, tmp_path: Path) -> None:
    plain, source, out = tmp_path / "plain", tmp_path / "dense", tmp_path / "out"
    vectors = Transformer(str(directory(plain, encoder())))
    torch.manual_seed(1)
    modules = [vectors, Pooling(64), Dense(64, 16)]
    SentenceTransformer(modules=modules, device="cpu").save(str(source))
    if inner:  # as older versions laid them out
        (source / inner).mkdir()
        for file in [file for file in source.iterdir() if file.is_file()]:
            if file.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
                file.rename(source / inner / file.name)
        listed = source / "modules.json"
        listed.write_text(listed.read_text().replace('"path": ""', f'"path": "{inner}"'))
    report = compress(source, texts(), out, CONFIG, shapes=((1, 4),))
    assert report.stages[0].nbytes is not None
    assert report.stages[-1].nbytes is not None
    dense, small = (SentenceTransformer(str(folder), device="cpu") for folder in (source, out))
    zeros = [float((p == 0).float().mean()) for p in small.parameters() if p.ndim == 2]
    assert zeros.count(0.75) == 12
    projections: list[Any] = [model[2] for model in (dense, small)]
    assert torch.equal(projections[0].linear.weight, projections[1].linear.weight)
    assert small.encode(texts()[:3]).shape == (3, 16)
    assert not (out / inner / "onnx").exists()


def test_companions_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "modules.json").write_text('{"not": "a list"}')
    copy_companions(tmp_path / "a", tmp_path / "b")
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["modules.json"]


class Caching(nn.Module):
    """Keeps what its first run computes, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(4, 4), torch.empty(0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        if not self.kept.numel():
            self.kept = input_ids.float() * 2
        wide = self.kept[..., None].expand(*input_ids.shape, 4)
        state = self.linear(wide) * self.kept[..., None] * attention_mask[..., None]
        return type("Output", (), {"last_hidden_state": state})()


def test_a_model_can_be_trained_after_its_quality_was_measured() -> None:
    batch = {"input_ids": torch.ones(3, 5, dtype=torch.int64), "attention_mask": torch.ones(3, 5)}
    model = Caching()
    QualityMeasure(model, [batch], causal=False).of(model)
    model(**batch).last_hidden_state.square().sum().backward()
    assert model.linear.weight.grad is not None


@pytest.mark.parametrize("method", ["saliency", "fisher", "movement"])
def test_methods_that_need_labels(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, file = directory(tmp_path / "dense", encoder()), tmp_path / "texts.txt"
    file.write_text("\n".join(texts()))
    arguments = ("compress", str(source), "--calibration", str(file), "-o", str(tmp_path / "out"))
    capsys.readouterr()
    said = fail(capsys, *arguments, "--method", method)
    assert f"method: expected one that needs no labels: 'admm', .*; got '{method}'".split(".*")[0] in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"config": 0.8}, TypeError, "config: expected a PruningConfig"),
        ({"distill_minutes": True}, ValueError, "distill_minutes: expected a number from 0; got True"),
        ({"distill_minutes": "long"}, ValueError, "distill_minutes: expected a number from 0; got 'long'"),
        ({"calibration": 3}, TypeError, "calibration: expected a file or texts; got 3"),
        ({"calibration": [3] * 30}, TypeError, "calibration: expected texts; got 3"),
        ({"model": 3}, TypeError, "model: expected the path of a directory; got 3"),
        ({"output": 3}, TypeError, "output: expected the path of a directory; got 3"),
        ({"shapes": (3,)}, ValueError, "shapes: expected pairs .texts, tokens.; got 3"),
    ],
)
def test_arguments_of_another_kind(
    changes: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    source = directory(tmp_path / "dense", encoder())
    options: dict[str, Any] = {"model": source, "calibration": texts(), "output": tmp_path / "out"} | changes
    with pytest.raises(kind, match=message):
        compress(options.pop("model"), options.pop("calibration"), options.pop("output"), **options)


@pytest.mark.parametrize("name", ["out.gguf", "out.pt", "out.safetensors", "out.ONNX"])
def test_no_directory_gets_the_name_of_a_file(name: str, tmp_path: Path) -> None:
    source = directory(tmp_path / "dense", encoder())
    with pytest.raises(ValueError, match=r"expected the name of a directory; got '.*leave the ending"):
        compress(source, texts(), tmp_path / name, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
