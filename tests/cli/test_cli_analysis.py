"""The commands `sensitivity` and `search`: they say what the functions of the same names say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import fail, run

import network
from sparsam import checkpoint
from sparsam.analysis.search import find_smallest
from sparsam.analysis.sweep import SensitivityReport, sensitivity
from sparsam.cli import main
from sparsam.cli.arguments import parse_groups
from sparsam.config import PruningConfig
from sparsam.patterns import Slices

EVAL = ("--eval", "network:accuracy")

MODULE = """
import numpy as np

class Holder:
    @staticmethod
    def zeros(weights):
        return -float(np.count_nonzero(weights["in.weight"] == 0))

def fails(weights):
    return weights["nothing"]

calls = []

def interrupts(weights):
    calls.append(1)
    if len(calls) > 2:
        raise KeyboardInterrupt
    return 1.0

def nan(weights):
    return float("nan")

def counted(weights):
    raise RuntimeError("evaluated")

number = 3
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The network as a file, in the working directory, beside a module of its owner."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in {"", str(tmp_path)}])
    weights = network.weights() | {"table": np.arange(12).reshape(3, 4)}
    checkpoint.save(tmp_path / "model.safetensors", weights, {"format": "pt"})
    (tmp_path / "owned_module.py").write_text(MODULE)
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('not today')\n")
    (tmp_path / "needy_module.py").write_text("import nope\n")
    monkeypatch.delitem(sys.modules, "owned_module", raising=False)
    return tmp_path / "model.safetensors"


def expected(*arguments: Any, **options: Any) -> SensitivityReport:
    weights = checkpoint.load("model.safetensors").weights
    del weights["table"]
    return sensitivity(weights, network.accuracy, *arguments, **options)


def test_sensitivity(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = expected()
    assert run(capsys, "sensitivity", model, *EVAL, "-o", "report.json") == f"{report}\n"
    assert SensitivityReport.from_json(Path("report.json").read_bytes()) == report
    assert run(capsys, "sensitivity", model, *EVAL, "--json") == f"{report.to_json()}\n"


def test_sensitivity_options(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--sparsity", "0.5,0.25", "--sparsity", "0.75", "--pattern", "slices:0", "--exclude", "out*"]
    arguments += ["--override", "in.bias=0.5", "--scope", "global", "--max-evaluations", "5"]
    arguments += ["--group", "in=in.*", "--group", "rest=mid.*", "--state", "state.json", "--plot", "a.svg"]
    out = run(capsys, "sensitivity", model, *EVAL, *arguments, "--json")
    report = expected(
        (0.25, 0.5, 0.75),
        config=PruningConfig(
            pattern=Slices(0), exclude=("out*",), overrides={"in.bias": 0.5}, scope="global"
        ),
        groups={"in": "in.*", "rest": "mid.*"},
        max_evaluations=5,
    )
    assert SensitivityReport.from_json(out) == report
    assert "<svg" in Path("a.svg").read_text()
    assert len(json.loads(Path("state.json").read_text())["points"]) == 5


def test_sensitivity_in_processes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "sensitivity", model, *EVAL, "--jobs", 2, "--json")
    assert SensitivityReport.from_json(out) == expected()


def test_search(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    weights = checkpoint.load(model).weights
    config = PruningConfig(scope="global", exclude=("version", "table"))
    arguments = [*EVAL, "--min-score", 0.8, "--scope", "global"]
    result = find_smallest(weights, network.accuracy, 0.8, config=config)
    out = run(capsys, "search", model, *arguments, "-o", "pruned.safetensors", "--plot", "curve.png")
    assert out == f"{result}\n\n{result.report}\n"
    pruned = checkpoint.load("pruned.safetensors")
    assert pruned.metadata == {"format": "pt"}
    assert list(pruned.weights) == list(weights)
    for name, array in result.weights.items():
        assert pruned.weights[name].tobytes() == array.tobytes()
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(run(capsys, "search", model, *arguments, "--json")) == result.to_dict()


def test_search_by_a_report(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "sensitivity", model, *EVAL, "-o", "report.json")
    arguments = [*EVAL, "--min-score", 0.7, "--report", "report.json", "--max-evaluations", 6]
    found = json.loads(run(capsys, "search", model, *arguments, "--tolerance", 0.05, "--json"))
    result = find_smallest(
        checkpoint.load(model).weights,
        network.accuracy,
        0.7,
        config=PruningConfig(exclude=("version", "table")),
        allocation=expected(),
        max_evaluations=6,
        tolerance=0.05,
    )
    assert found == result.to_dict()
    uniform = json.loads(
        run(capsys, "search", model, *EVAL, "--min-score", 0.7, "--allocation", "uniform", "--json")
    )
    assert uniform["max_sparsity"] == 1.0


def test_functions_of_the_working_directory(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "sensitivity", model, "--eval", "owned_module:Holder.zeros", "--json")
    assert json.loads(out)["curves"][0]["points"][0]["score"] == -round(0.3 * 192)


@pytest.mark.parametrize("command", [["sensitivity"], ["search", "--min-score", "0.5"]])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("owned_module", "eval: expected package.module:function; got 'owned_module'"),
        ("owned-module:f", "eval: expected package.module:function"),
        (
            "no_module:f",
            "eval: expected an importable module; got No module named 'no_module'; correct the name",
        ),
        ("owned_module.sub:f", "eval: expected an importable module; got No module named 'owned_module.sub'"),
        ("owned_module:nothing", "has no attribute 'nothing'"),
        (
            "owned_module:number",
            "eval owned_module:number: expected a function from weights to a score; got 3",
        ),
        ("broken_module:f", "got an error from importing broken_module: RuntimeError: not today ("),
        (
            "needy_module:f",
            "importing needy_module: ModuleNotFoundError: No module named 'nope'",
        ),
        ("owned_module:fails", "eval owned_module:fails: expected a score; got KeyError: 'nothing' ("),
        ("owned_module:nan", "the dense weights: "),
    ],
)
def test_functions_that_do_not_work(
    command: list[str], text: str, message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fail(capsys, *command, model, "--eval", text)


def test_errors(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = ["search", model, *EVAL, "--min-score", 0.5]
    cases: list[tuple[list[Any], str]] = [
        (["sensitivity", model], "--eval"),
        (["search", model, *EVAL], "--min-score"),
        (["sensitivity", "nowhere", *EVAL], "No such file"),
        (["sensitivity", model, *EVAL, "--sparsity", "x"], "sparsity: expected numbers"),
        (["sensitivity", model, *EVAL, "--max-evaluations", 1], "max_evaluations: expected at least 4"),
        (["sensitivity", model, *EVAL, "--group", "a"], "group: expected NAME=PATTERN"),
        (["sensitivity", model, *EVAL, "--group", "a=none*"], "which matches none"),
        (["sensitivity", model, *EVAL, "--plot", "a.doc"], "expected a name that ends in one of"),
        (["sensitivity", model, *EVAL, "-o", "no/where.json"], "no such directory"),
        (["sensitivity", model, *EVAL, "--jobs", 0], "--jobs"),
        (["search", model, *EVAL, "--min-score", 2], "min_score: expected at most 1.0"),
        ([*search, "-o", model], "expected an output other than the input"),
        (
            [*search, "--report", "r.json", "--allocation", "uniform"],
            "--report, --allocation: expected one of them",
        ),
        ([*search, "--report", "r.json"], "No such file"),
        (
            [*search, "--report", "owned_module.py"],
            "owned_module.py: expected a sensitivity report; got no valid JSON",
        ),
        ([*search, "--allocation", "best"], "allocation: expected"),
        ([*search, "--pattern", "2:4"], "has only 0.5"),
        ([*search, "--plot", "a.doc"], "expected a name that ends in one of"),
    ]
    before = model.read_bytes()
    for arguments, message in cases:
        if "a.doc" in arguments:
            pytest.importorskip("matplotlib")
        assert message in fail(capsys, *arguments), arguments
    assert model.read_bytes() == before
    run(capsys, *search[:-1], 0.0, "-o", model, "--force")
    assert not checkpoint.load(model).weights["mid.weight"].any()


def test_where_output_cannot_go_is_found_before_anything_is_evaluated(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model.parent / "folder" / "model.safetensors").mkdir(parents=True)
    counted = (model, "--eval", "owned_module:counted")
    cases: list[tuple[list[Any], str]] = [
        (["sensitivity", *counted, "-o", "no/where.json"], "no such directory"),
        (["sensitivity", *counted, "-o", "folder"], "expected a regular file to replace"),
        (["sensitivity", *counted, "--state", "no/state.json"], "no such directory"),
        (["search", *counted, "--min-score", 0, "-o", "no/where.safetensors"], "no such directory"),
        (["search", *counted, "--min-score", 0, "-o", "folder"], "expected a regular file to replace"),
    ]
    for arguments, message in cases:
        error = fail(capsys, *arguments)
        assert message in error, arguments
        assert "evaluated" not in error, arguments


def test_an_interrupt_says_what_was_kept(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sensitivity", str(model), "--eval", "owned_module:interrupts", "--state", "kept.json"]
    assert main(command) == 130
    assert (
        "interrupted; kept: what was measured, in kept.json; the same command continues"
        in capsys.readouterr().err
    )
    assert Path("kept.json").is_file()


def test_groups() -> None:
    assert parse_groups(["a=x,y*", "b=z=1"]) == {"a": ["x", "y*"], "b": ["z=1"]}
    for texts in (["a"], ["=x"], ["a="], ["a=x,"], ["a=x", "a=y"]):
        with pytest.raises(ValueError, match=r"group: expected NAME=PATTERN,\.\.\., each name once; got"):
            parse_groups(texts)
