"""The command line as a whole: errors, help, interrupts, entry points, `info` and `bench`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import fail, run, save_model

import sparsam
from sparsam import checkpoint
from sparsam.checkpoint import files
from sparsam.cli import main
from sparsam.runtime import build_info


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path)


def test_errors_are_one_line_and_exit_code_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("no model\nat all\n")
    prune_model = ["prune", model, "-o", tmp_path / "out"]
    cases: list[tuple[list[object], str]] = [
        (["nope"], "No such command 'nope'"),
        (["inspect"], "see sparsam inspect --help"),
        (["inspect", tmp_path / "missing"], "No such file or directory"),
        (["inspect", tmp_path / "text"], "text: expected a safetensors file; got"),
        (["inspect", model, "--nope"], "No such option: --nope"),
        (["prune", model], "see sparsam prune --help"),
        ([*prune_model, "--sparsity", "x"], "--sparsity"),
        ([*prune_model, "--sparsity", "1.5"], "1.5"),
        ([*prune_model, "--sparsity", "nan"], "nan"),
        ([*prune_model, "--scope", "all"], "scope"),
        ([*prune_model, "--allocation", "er"], "allocation: expected 'uniform'"),
        ([*prune_model, "--allocation", "erk", "--scope", "global"], "scope 'global'"),
        ([*prune_model, "--method", "wanda"], "InputStatistics"),
        ([*prune_model, "--method", "best"], "method"),
        ([*prune_model, "--norm", "3"], "norm"),
        ([*prune_model, "--seed", "1"], "--seed: expected --method random"),
        ([*prune_model, "--pattern", "9:4"], "9"),
        (
            [*prune_model, "--sparsity", "80"],
            "--sparsity: expected a fraction from 0 to 1; got 80; write 0.8 for",
        ),
        ([*prune_model, "--pattern", "1:5"], "got others in 'head.weight' [8, 16], 'mlp.weight' [16, 32]"),
        ([*prune_model, "--indivisible", "maybe"], "--indivisible: expected error, skip or unstructured"),
        ([*prune_model, "--pattern", "2:4", "--sparsity", "0.6"], "0.5"),
        ([*prune_model, "--override", "mlp.wieght=0.1"], "'mlp.weight'"),
        ([*prune_model, "--override", "mlp"], "override: expected PAT=SPARSITY"),
        (["prune", model, "-o", tmp_path / "no" / "folder"], "no such directory"),
        (["bench", "select", "--n", "0"], "--n"),
        (["bench", "select", "--dtype", "int8"], "dtype: expected one of float16"),
        (["bench", "select", "--sparsity", "0"], "sparsity: expected"),
        (["demo", "--seed", "-1"], "--seed"),
    ]
    for arguments, message in cases:
        assert message in fail(capsys, *arguments), arguments
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "text"}


def test_what_fails_in_spite_of_the_command_is_exit_code_1(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (OSError(28, "No space left on device"), MemoryError("no memory")):

        def full(_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(files, "stream", full)
        assert main(["inspect", str(model)]) == 1
        assert capsys.readouterr().err.startswith("sparsam: ")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == f"sparsam {sparsam.__version__}\n"
    assert "Usage: sparsam" in run(capsys, "-h")
    assert "Exit codes: 0 done" in run(capsys)
    assert "Usage: sparsam prune" in run(capsys, "prune", "-h")
    assert "--install-completion" in run(capsys, "--help")


def test_help_names_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = run(capsys, "--help")
    for command in ("demo", "inspect", "prune", "sensitivity", "search", "bench", "info"):
        assert command in out
    options = run(capsys, "prune", "--help")
    for text in ("--override", "what N:M implies", "slices:AXIS[:SIZE]", "2:4:channels"):
        assert text in options


@pytest.mark.parametrize("name", ["prune", "inspect", "sensitivity", "search", "convert", "compress", "demo"])
def test_help_is_printed_as_it_was_written(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No text of it is taken for markup or an emoji, as `:M:` is."""
    out = run(capsys, name, "--help")
    assert not [c for c in out if ord(c) > 127 and not "\u2500" <= c <= "\u257f"]


def test_an_interrupt_is_no_traceback(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "stream", interrupt)
    assert main(["inspect", str(model)]) == 130
    assert capsys.readouterr().err.strip() == "sparsam: interrupted; kept: nothing new"


def test_an_interrupt_stops_the_demo_though_scikit_learn_swallows_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = pytest.importorskip("sklearn.neural_network")
    calls = []

    def interrupt(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(network.MLPClassifier, "_backprop", interrupt)  # inside the block that catches it
    assert main(["demo"]) == 130
    assert calls == [1]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "sparsam: interrupted; kept: nothing new\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_names_that_the_locale_has_no_letters_for_are_escaped(encoding: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "m.safetensors", {"caf\u00e9\U0001f600.weight": np.ones((2, 2), np.float32)})
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    shown = "caf\\xe9" if encoding == "ascii" else "caf\u00e9"
    for arguments in (["inspect"], ["prune", "--exclude", "none", "-o", str(tmp_path / "out")]):
        command = [sys.executable, "-m", "sparsam", *arguments, str(tmp_path / "m.safetensors")]
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert f"{shown}\\U0001f600.weight" in done.stdout.decode(encoding)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "info") == f"{build_info()}\n"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_bench_select(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "bench",
        "select",
        "--n",
        1001,
        "--n",
        64,
        "--dtype",
        dtype,
        "--sparsity",
        0.5,
        "--sparsity",
        1,
    ]
    rows = json.loads(run(capsys, *arguments, "--json"))
    assert [(row["n"], row["dtype"], row["sparsity"]) for row in rows] == [
        (n, dtype, sparsity) for n in (1001, 64) for sparsity in (0.5, 1.0)
    ]
    for row in rows:
        assert all(row[field] > 0 for field in ("read_ms", "threshold_ms", "prune_ms", "numpy_ms"))


def test_bench_select_table(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "bench", "select", "--n", 1000, "--sparsity", 0.9)
    assert "np.partition" in out
    assert "1,000" in out


@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "sparsam"], [str(Path(sys.executable).parent / "sparsam")]]
)
def test_both_entry_points(command: list[str], tmp_path: Path) -> None:
    good = subprocess.run([*command, "info"], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("sparsam ")
    bad = subprocess.run([*command, "inspect", tmp_path / "x"], capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("sparsam: ")
    assert bad.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra(missing: str) -> None:
    block = f"import runpy, sys; sys.modules[{missing!r}] = None"
    script = f"{block}; runpy.run_module('sparsam', run_name='__main__')"
    command = [sys.executable, "-c", script, "info"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        f"sparsam: command line: expected typer and rich; got no module {missing}; "
        "install them with: pip install 'sparsam[cli]'\n"
    )


def test_an_import_error_of_another_module_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sparsam.cli.app", raising=False)
    monkeypatch.setitem(sys.modules, "sparsam.cli.machine", None)
    monkeypatch.delattr("sparsam.cli.machine", raising=False)
    with pytest.raises(ImportError, match="machine"):
        main(["info"])


def test_a_reader_that_leaves_is_no_traceback(model: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sparsam", "inspect", str(model)]
    run = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert "Traceback" not in run.stderr
    assert run.returncode != 0


def test_import_is_lean() -> None:
    heavy = {"typer", "click", "rich", "sklearn", "torch", "pydantic"}
    script = f"import sys, sparsam; print(sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
