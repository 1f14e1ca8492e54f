"""`sparsam inspect` and `sparsam prune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import fail, run, sample, save_model

from sparsam import checkpoint
from sparsam.cli import main
from sparsam.config import PruningConfig
from sparsam.patterns import NM, Block, Slices
from sparsam.pruner import prune
from sparsam.scores import Magnitude, Random


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "pruned.safetensors"


def read(path: Path) -> dict[str, Any]:
    return checkpoint.load(path).weights


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        assert array.tobytes() == right[name].tobytes(), name


def test_inspect(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = sample()
    weights["mlp.weight"][:8] = 0
    checkpoint.save(model, weights)
    lines = [line.split() for line in run(capsys, "inspect", model).splitlines() if line.strip()]
    assert lines[0] == [
        "tensor",
        "shape",
        "dtype",
        "pattern",
        "params",
        "pruned",
        "sparsity",
        "dense",
        "packed",
    ]
    assert ["mlp.weight", "16x32", "bfloat16", "512", "256", "50.00", "%", "1.0", "KiB", "576", "B"] in lines
    assert ["mlp.bias", "16", "float32", "16", "0", "0.00", "%", "64", "B", "64", "B"] in lines
    assert ["positions", "3x4", "int64", "12", "1", "8.33", "%", "96", "B", "90", "B"] in lines
    assert lines[-1][:3] == ["total", "668", "257"]


def test_inspect_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(run(capsys, "inspect", model, "--json"))
    assert [layer["name"] for layer in content["layers"]] == sorted(sample())
    assert content["layers"][0] == {
        "name": "head.weight",
        "total_params": 128,
        "pruned_params": 0,
        "sparsity": 0.0,
        "shape": [8, 16],
        "dtype": "float32",
        "pattern": "",
        "dense_bytes": 512,
        "packed_bytes": 512,
    }
    assert content["total"]["total_params"] == 668


def test_inspect_and_prune_agree(model: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = sample()
    weights["mlp.bias"][:9] = 0
    weights["mlp.weight"][:, :30] = 0
    checkpoint.save(model, weights)
    pruned = json.loads(run(capsys, "prune", model, "-o", output, "--pattern", "2:4", "--json"))
    inspected = json.loads(run(capsys, "inspect", output, "--json"))
    for said, seen in zip(pruned["layers"], inspected["layers"], strict=True):
        assert said.keys() == seen.keys()
        assert [said[key] for key in ("name", "dense_bytes", "packed_bytes")] == [
            seen[key] for key in ("name", "dense_bytes", "packed_bytes")
        ]
    assert pruned["total"]["packed_bytes"] == inspected["total"]["packed_bytes"]


@pytest.mark.parametrize("name", ["enc:key:weight", "a\x1b[2Jb", "x\ty\nz", "[red]r[/red]", "\u202ename"])
def test_names_come_out_as_they_are_or_escaped(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(file := tmp_path / "w", {name: np.ones((1, 4), np.float32), "n": np.array([[np.nan]])})
    escaped = json.dumps(name)[1:-1].replace("\\u001b", "\\x1b")
    content = json.loads(run(capsys, "inspect", file, "--json"))
    assert name in [layer["name"] for layer in content["layers"]]
    assert f"\n{escaped} " in run(capsys, "inspect", file)
    assert main(["prune", str(file), "-o", str(tmp_path / "out"), "--exclude", "n"]) == 0
    assert f"\n{escaped} " in capsys.readouterr().out
    message = fail(capsys, "prune", file, "-o", tmp_path / "out", "--override", f"no{name}=0.5")
    assert "\x1b" not in message
    assert "\u202e" not in message
    assert ":key:" in message or ":key:" not in name


def test_long_names_are_never_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.[red]layers.0[/red]." + "x" * 200
    checkpoint.save(tmp_path / "w", {name: np.zeros((0, 3), np.float16)})
    assert name in run(capsys, "inspect", tmp_path / "w")


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ([], {}),
        (["--sparsity", "0.8"], {"target_sparsity": 0.8}),
        (["--sparsity", "0.8", "--scope", "global"], {"target_sparsity": 0.8, "scope": "global"}),
        (["--scope", "row", "--method", "lamp"], {"scope": "row", "method": "lamp"}),
        (["--allocation", "erk"], {"allocation": "erk"}),
        (["--allocation", "lamp", "--pattern", "slices:0"], {"allocation": "lamp", "pattern": Slices(0)}),
        (["--pattern", "2:4"], {"pattern": NM(2, 4)}),
        (["--pattern", "1:4", "--sparsity", "0.75"], {"pattern": NM(1, 4)}),
        (["--pattern", "block:4x2", "--norm", "2"], {"pattern": Block(4, 2), "method": Magnitude(2)}),
        (["--pattern", "slices:0:2"], {"pattern": Slices(0, 2)}),
        (["--method", "random", "--seed", "5"], {"method": Random(5)}),
        (["--transposed", "mlp.weight", "--scope", "row"], {"transposed": ["mlp.weight"], "scope": "row"}),
        (
            ["--transposed", "head*", "--transposed", "mlp*", "--pattern", "2:4"],
            {"transposed": ["head*", "mlp*"], "pattern": NM(2, 4)},
        ),
        (
            ["--exclude", "head*", "--exclude", "x*", "--sparsity", "1"],
            {"exclude": ["head*"], "target_sparsity": 1},
        ),
        (
            ["--override", "head*=0.25", "--override", "mlp.bias=2:4"],
            {"overrides": {"head*": 0.25, "mlp.bias": NM(2, 4)}},
        ),
    ],
)
def test_prune_is_the_library(
    model: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    changes: dict[str, Any],
) -> None:
    assert main(["prune", str(model), "-o", str(output), *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == (
        "sparsam: warning: exclude: 'x*' matches no tensor\n" if "x*" in arguments else ""
    )
    changes = {**changes, "exclude": [*changes.get("exclude", ()), "positions"]}
    expected = prune(sample(), PruningConfig(**changes))
    assert_equal(read(output), expected.weights)
    assert captured.out == f"{expected.report}\n"
    assert checkpoint.load(output).metadata == {"format": "pt"}
    assert_equal(read(model), sample())


def test_prune_along_the_channels_of_a_convolution(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {"conv.weight": np.random.default_rng(0).standard_normal((4, 8, 3, 3), dtype=np.float32)}
    checkpoint.save(tmp_path / "conv.safetensors", weights)
    run(capsys, "prune", tmp_path / "conv.safetensors", "-o", output, "--pattern", "2:4:channels")
    pruned = read(output)
    assert_equal(pruned, prune(weights, pattern=NM(2, 4, "channels")).weights)
    kept = (pruned["conv.weight"] != 0).reshape(4, 2, 4, 9)
    assert (kept.sum(axis=2) == 2).all()


def test_exclude_takes_an_exact_name_with_brackets(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    weights = {f"layers[{i}].weight": rng.standard_normal((4, 4), dtype=np.float32) for i in range(3)}
    checkpoint.save(tmp_path / "layers.safetensors", weights)
    arguments = [tmp_path / "layers.safetensors", "-o", output, "--exclude", "layers[0].weight"]
    run(capsys, "prune", *arguments, "--override", "layers[2].weight=0.25")
    zeros = [np.count_nonzero(array == 0) for array in read(output).values()]
    assert zeros == [0, 8, 4]


def test_prune_json(model: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(run(capsys, "prune", model, "-o", output, "--sparsity", 0.9, "--json"))
    assert content == prune(sample(), target_sparsity=0.9, exclude=["positions"]).report.to_dict()


def test_prune_refuses_its_input(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = model.read_bytes()
    (tmp_path / "soft").symlink_to(model)
    (tmp_path / "hard").hardlink_to(model)
    same = [
        model,
        tmp_path,
        tmp_path / "soft",
        tmp_path / "hard",
        tmp_path / ".." / tmp_path.name / model.name,
    ]
    for path in same:
        assert "pass --force" in fail(capsys, "prune", model, "-o", path)
    assert "pass --force" in fail(capsys, "prune", tmp_path / "soft", "-o", model)
    assert model.read_bytes() == before

    run(capsys, "prune", model, "-o", tmp_path / "soft", "--sparsity", 0.75, "--force")
    assert np.count_nonzero(read(model)["head.weight"]) == 32
    assert (tmp_path / "soft").is_symlink()


def test_prune_shards_into_a_new_directory(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = sample()
    files = dict(
        zip(weights, ("b.safetensors", "b.safetensors", "a.safetensors", "a.safetensors"), strict=True)
    )
    shards = checkpoint.Shards(checkpoint.INDEX_NAME, {}, files, {"a.safetensors": {}, "b.safetensors": {}})
    checkpoint.save(tmp_path / "in", weights, like=checkpoint.Checkpoint({}, {}, shards))
    whole, parts = tmp_path / "whole", tmp_path / "out"
    options = ["--sparsity", "0.8", "--scope", "global"]
    assert run(capsys, "prune", model, "-o", whole, *options) == run(
        capsys, "prune", tmp_path / "in", "-o", parts, *options
    )
    assert_equal(read(whole), read(parts))
    assert {file.name for file in parts.iterdir()} == {
        checkpoint.INDEX_NAME,
        "a.safetensors",
        "b.safetensors",
    }
    assert "pass --force" in fail(capsys, "prune", tmp_path / "in", "-o", tmp_path / "in")
    assert json.loads(run(capsys, "inspect", parts, "--json")) == json.loads(
        run(capsys, "inspect", whole, "--json")
    )


def test_a_failed_prune_leaves_no_output(
    model: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = sample()
    weights["mlp.weight"][3, 5] = np.nan
    checkpoint.save(model, weights)
    message = fail(capsys, "prune", model, "-o", output)
    assert "'mlp.weight'" in message
    assert "(3, 5)" in message
    assert [file.name for file in output.parent.iterdir()] == [model.name]
