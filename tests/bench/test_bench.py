"""The matmul benchmark of the command line, and its pictures; `bench select` is in test_cli.py."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsam import SparseMatrix, bench, plot
from sparsam.bench import MatmulRow
from sparsam.bench import matmul as module
from sparsam.cli import main
from sparsam.cli.arguments import parse_batches, parse_shapes, parse_sparsities
from sparsam.runtime import isa, num_threads
from sparsam.sparse import calibration, cost_model

ROW = MatmulRow("random", 8, 4, 2, 0.5, "panels", 1.0, 1.0, 2.0, 3.0)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsam.bench.timing.median_seconds.__kwdefaults__", {"before": int, "budget": 0.0})


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["bench", "matmul", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return re.sub(r"\x1b\[[0-9;]*m", "", captured.out)


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["bench", "matmul", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def write_smtx(file: Path, w: Any) -> None:
    counts = (w != 0).sum(axis=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        f"{w.shape[0]}, {w.shape[1]}, {counts.sum()}",
        " ".join(map(str, [0, *np.cumsum(counts)])),
        " ".join(map(str, np.nonzero(w)[1])),
    )
    file.write_text("\n".join(lines))


# Rows


@pytest.mark.parametrize("cold", [False, True])
def test_rows(cold: bool) -> None:
    problems = bench.random_problems([(32, 20), (5, 7)], [0.0, 0.5])
    rows = list(bench.multiply(problems, [1, 3], cold=cold))
    assert [(row.rows, row.cols, row.sparsity, row.batch) for row in rows] == [
        (*shape, sparsity, batch)
        for shape in ((32, 20), (5, 7))
        for sparsity in (0.0, 0.5)
        for batch in (1, 3)
    ]
    for row in rows:
        assert row.kernel in {"dense", "bitmask", "panels", "slots"}
        assert min(row.linear_ms, row.sparse_ms, row.numpy_ms) > 0
        assert (row.sparse_ms == row.linear_ms) == (row.kernel != "dense")
        assert row.speedup == row.dense_ms / row.linear_ms


def test_the_faster_dense_product_counts() -> None:
    assert (ROW.dense_ms, ROW.speedup) == (2.0, 2.0)
    assert replace(ROW, torch_ms=1.5).speedup == 1.5
    assert replace(ROW, torch_ms=None).speedup == 2.0


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "torch" else name)
    (row,) = bench.multiply(bench.random_problems([(8, 8)], [0.5]), [2])
    assert row.torch_ms is None
    assert "torch" not in bench.machine()


def test_a_wrong_product_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SparseMatrix.linear
    monkeypatch.setattr(SparseMatrix, "linear", lambda *args: original(*args) * np.float32(1.001))
    with pytest.raises(RuntimeError, match="SparseMatrix and NumPy give products that differ by up to"):
        list(bench.multiply(bench.random_problems([(64, 64)], [0.5]), [2]))


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ({0.0: 1.0}, 0.0),  # wins from the start
        ({0.5: -1.0}, None),
        ({0.0: -1.0, 0.5: 1.0}, 0.25),
        ({0.0: -3.0, 0.5: 1.0, 0.9: 2.0}, 0.375),
        ({0.0: 1.0, 0.5: -1.0, 0.9: 3.0}, 0.6),  # what counts is where it wins for good
        ({0.0: 1.0, 0.5: 1.0, 0.9: -0.1}, None),
    ],
)
def test_break_even(points: dict[float, float], expected: float | None) -> None:
    rows = [
        replace(ROW, sparsity=s, sparse_ms=10.0 - gain, numpy_ms=10.0, torch_ms=None)
        for s, gain in points.items()
    ]
    assert bench.break_even(rows) == {(8, 4, 2): pytest.approx(expected)}


def test_dlmc_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w = rng.random((12, 30)) < 0.2
    write_smtx(tmp_path / "deep" / "er" / "one.smtx", w)
    write_smtx(tmp_path / "none.smtx", np.zeros((3, 4)))
    (tmp_path / "readme.txt").write_text("not a matrix")
    one, none = bench.read_dlmc(tmp_path)
    assert (one.name, one.shape, none.name, none.shape) == ("deep/er/one", (12, 30), "none", (3, 4))
    assert one.sparsity == pytest.approx(1 - w.mean())
    assert np.array_equal(one.make() != 0, w)
    assert not none.make().any()
    assert len(list(bench.multiply([one, none], [1, 2]))) == 4


@pytest.mark.parametrize(
    "content",
    ["", "a, b, c\n", "2, 3\n", "2, 3, 2\n0 1 2\n", "2, 3, 2\n0 1 2\n0 3\n", "2, 3, 2\n0 1 2\n0 -1\n",
     "2, 3, 2\n0 1\n0 1\n", "2, 3, 2\n0 3 2\n0 1\n", "2, 3, 3\n0 1 2\n0 1\n", "2, 3, 2\n0 1 x\n0 1\n"],
)  # fmt: skip
def test_damaged_dlmc_files(content: str, tmp_path: Path) -> None:
    (tmp_path / "bad.smtx").write_text(content)
    with pytest.raises(ValueError, match=r"bad.smtx: expected"):
        [problem.make() for problem in bench.read_dlmc(tmp_path)]


def test_no_dlmc_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with \*.smtx files; got none"):
        bench.read_dlmc(tmp_path)


def test_geometric_mean() -> None:
    assert bench.geometric_mean([2, 8]) == pytest.approx(4)


# The command


def test_strings() -> None:
    assert parse_shapes(["3072x768", "1x2,3x4"]) == [(3072, 768), (1, 2), (3, 4)]
    assert parse_batches(["1,8", "128"]) == [1, 8, 128]
    assert parse_sparsities(["0.5,.8", "1"]) == [0.5, 0.8, 1.0]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--shape", "16x8", "--batch", "1,2", "--sparsity", "0.5", "--json")
    content = json.loads(run(capsys, *arguments))
    assert [(row["batch"], row["sparsity"]) for row in content["rows"]] == [
        (1, 0),
        (2, 0),
        (1, 0.5),
        (2, 0.5),
    ]
    assert all(row["speedup"] > 0 for row in content["rows"])
    assert [(at["rows"], at["cols"], at["batch"]) for at in content["break_even"]] == [(16, 8, 1), (16, 8, 2)]
    assert cost_model.cpu() in content["machine"]
    assert f"numpy {np.__version__}" in content["machine"]


def test_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_smtx(tmp_path / "a.smtx", np.eye(8))
    out = run(capsys, "--shape", "16x8", "--batch", 2, "--sparsity", 0.5, "--dlmc", tmp_path)
    assert [line.split()[:4] for line in out.splitlines() if "x8" in line and "sparse" not in line] == [
        ["random", "16x8", "2", "0.0%"], ["random", "16x8", "2", "50.0%"], ["a", "8x8", "2", "87.5%"],
    ]  # fmt: skip
    assert "geometric mean of the speed-ups" in out
    assert re.search(r"16x8, batch 2: sparse beats dense (from \d+% zeros on|at no sparsity measured)", out)
    assert "16x8" not in run(capsys, "--batch", 2, "--dlmc", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "3072"], "shape: expected OUTxIN; got '3072'; write 3072x768, say"),
        (["--shape", "0x4"], "shape: expected"),
        (["--batch", "1,,2"], "batch: expected positive integers"),
        (["--batch", "0"], "batch: expected"),
        (["--sparsity", "half"], "sparsity: expected numbers from 0 to 1"),
        (["--sparsity", "1.5"], "sparsity: expected a number from 0 to 1; got 1.5"),
        (["--dlmc", "nowhere"], "expected a folder with *.smtx files"),
        (["--plot", "picture.doc"], "expected a name that ends in one of"),
        (["--plot", "nowhere/picture.png"], "no such directory"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert message in fail(capsys, *arguments)


def test_calibrate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "SHAPES", (((16, 64), 512), ((64, 16), 512)))
    for trusted, said in ((math.inf, str(tmp_path)), (0.0, "not kept: it was disturbed")):
        monkeypatch.setattr(calibration, "_TRUSTED", trusted)
        assert main(["calibrate", "--dtype", "float16"]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert f"{isa()}, float16, {num_threads()} threads: the fit is off by" in printed
        dense = [f"{library}, {kind}" for library, kind in (("torch", "float32"), ("torch", "bfloat16"))]
        assert [where in printed for where in dense] == [find_spec("torch") is not None] * 2
        assert printed.replace(" ", "").count(said.replace(" ", "")) == (4 if find_spec("torch") else 2)
    assert main(["calibrate", "--dtype", "int8"]) == 2
    cost_model.forget()


# Pictures


def test_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, start in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("c.PDF", b"%PDF")):
        run(capsys, "--shape", "16x8", "--batch", 2, "--sparsity", 0.5, "--plot", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 3


def test_pictures_need_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pictures: expected matplotlib; .* pip install 'sparsam\[plot\]'"):
        plot.speedups([ROW], tmp_path / "a.png", "")


# int8


@pytest.mark.parametrize(("values", "least"), [("int8", 8), ("int4", 4)])
def test_int8_rows(values: str, least: int) -> None:
    problems = bench.random_problems([(32, 20), (64, 96)], [0.0, 0.5])
    rows = list(bench.multiply_int8(problems, [1, 3], cold=True, values=values))
    assert [(row.rows, row.sparsity, row.batch) for row in rows] == [
        (rows_, sparsity, batch) for rows_ in (32, 64) for sparsity in (0.0, 0.5) for batch in (1, 3)
    ]
    for row in rows:
        assert row.linear_ms > 0
        assert (row.torch_ms is None) == (find_spec("torch") is None)
        times = [ms for ms in (row.torch_ms, row.onnx_ms) if ms is not None]
        assert row.dense_ms == min(times, default=None)
        assert row.speedup == (row.dense_ms and row.dense_ms / row.linear_ms)
        assert least * row.rows * row.cols * (1 - row.sparsity) < row.bits * row.rows * row.cols


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_int8_table(capsys: pytest.CaptureFixture[str], values: str) -> None:
    out = run(capsys, "--shape", "40x64", "--batch", "1,2", "--sparsity", "0.5", "--values", values)
    assert "bits/weight" in out
    assert f"{values} values; all results agree" in out
    assert out.count("40x64") == 4
    found = json.loads(
        run(capsys, "--shape", "40x64", "--batch", "2", "--sparsity", "0.5", "--values", values, "--json")
    )
    assert [row["sparsity"] for row in found["rows"]] == [0.0, 0.5]
    assert "--values: expected float32, int8 or int4; got 'int3'" in fail(capsys, "--values", "int3")
    wrong = fail(capsys, "--values", values, "--plot", "a.svg")
    assert f"--plot: expected --values float32; got {values}; leave" in wrong


def test_a_wrong_int8_product_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseMatrix, "linear", lambda _, x: np.zeros((len(x), 8), np.float32))
    with pytest.raises(RuntimeError, match="sparsam's int8 and NumPy's product differ by 1 of the largest"):
        next(bench.multiply_int8(bench.random_problems([(8, 8)], [0.5]), [2]))
