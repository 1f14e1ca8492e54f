from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparsam
from sparsam import SparseMatrix
from sparsam.sparse import cost_model
from sparsam.sparse.cost_model import BATCHES, CostModel, Estimate, Machine

MACHINE = Machine("cpu", "isa", 2, "float32", "1", "2")


def made(machine: Machine = MACHINE, **slopes: float) -> CostModel:
    """Microseconds per row of x and weight (nonzero ones, but for dense); every fit is off by 10 %."""
    fits: dict[str, Any] = {}
    for kind in cost_model._KINDS:
        slope = 1e-6 * slopes.get(kind, 1.0)
        batches = [n for n in BATCHES if kind != "bitmask" or n <= cost_model.BITMASK_BATCHES]
        fits[kind] = tuple((0.0, 0.0, n * slope if kind == "dense" else 0.0, n * slope) for n in batches)
    return CostModel(machine, fits, {kind: (0.1,) * len(rows) for kind, rows in fits.items()})


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Calibration as it is outside of tests, with a cache of its own and nothing known yet."""
    monkeypatch.setenv("SPARSAM_CALIBRATION", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cost_model, "_known", {})
    return tmp_path / "sparsam"


@pytest.fixture
def measured(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> list[Machine]:
    """The machines that were measured, in a way that takes no time."""
    calls: list[Machine] = []

    def measure(machine: Machine) -> CostModel:
        calls.append(machine)
        return made(machine)

    monkeypatch.setattr(cost_model, "_measure", measure)
    return calls


def stored(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


# Estimates


@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(0, 1), st.integers(1, 2000), st.booleans())
def test_estimates_are_of_one_piece(rows: int, cols: int, density: float, batch: int, blocked: bool) -> None:
    found = made().estimates((rows, cols), int(density * rows * cols), batch, blocked=blocked)
    assert list(found) == [k for k in ("dense", "bitmask", "panels") if k != "bitmask" or batch <= 16]
    for estimate in found.values():
        assert 0 <= estimate.low <= estimate.expected <= estimate.high < math.inf


def test_estimates_by_hand() -> None:
    def estimate(batch: int) -> Estimate:
        return made().estimates((2, 3), 4, batch, blocked=False)["panels"]

    def us(*values: float) -> Any:
        return pytest.approx([1e-6 * value for value in values])

    assert estimate(8) == us(4 * 8 * 0.9, 4 * 8, 4 * 8 * 1.1)
    assert estimate(12) == us(4 * 8 * 0.9, 4 * 12, 4 * 16 * 1.1)  # between two of the grid
    assert estimate(1024) == us(4 * 1024 * 0.9, 4 * 1024, 4 * 1024 * 1.1)  # beyond it


def test_blocks_have_their_own_fit() -> None:
    both = [made(blocks=0.5).estimates((8, 8), 32, 4, blocked=blocked) for blocked in (False, True)]
    assert both[1]["panels"].expected == both[0]["panels"].expected / 2
    assert both[1]["bitmask"] == both[0]["bitmask"]


@pytest.mark.parametrize(
    ("estimates", "names"),
    [
        ({"a": (1, 1, 1), "b": (2, 2, 2)}, ["a"]),
        ({"a": (2, 2, 2), "b": (1, 1, 1)}, ["b"]),
        ({"a": (1, 1, 1), "b": (1.2, 1.2, 1.2)}, ["a", "b"]),  # within 25 %
        ({"a": (1, 1, 1), "b": (1.3, 1.3, 1.3)}, ["a"]),
        ({"a": (1, 1, 2), "b": (1.9, 3, 3)}, ["a", "b"]),  # ranges overlap
        ({"a": (1, 1.3, 2), "b": (1.2, 1.2, 1.2), "c": (9, 9, 9)}, ["b", "a"]),
    ],
)
def test_contenders(estimates: dict[str, Any], names: list[str]) -> None:
    assert cost_model.contenders({name: Estimate(*numbers) for name, numbers in estimates.items()}) == names


def test_buckets() -> None:
    assert [cost_model.bucket(n) for n in range(17)] == list(range(17))
    assert [cost_model.bucket(n) for n in (17, 18, 19, 31, 33, 36, 37, 97, 100, 104, 105, 512, 513)] == [
        18, 18, 20, 32, 36, 36, 40, 104, 104, 104, 112, 512, 576,
    ]  # fmt: skip
    assert all(n <= cost_model.bucket(n) < 1.125 * n for n in range(1, 5000))
    assert len({cost_model.bucket(n) for n in range(1, 513)}) == 56


def test_the_fit_finds_nonnegative_coefficients() -> None:
    rng = np.random.default_rng(0)
    features = rng.uniform(1, 9, (12, 4))
    for truth in ((1, 2, 3, 4), (0, 0, 0, 1), (5, 0, 1, 0)):
        found, error = cost_model._fit(features, features @ np.array(truth))
        assert found == pytest.approx(truth, abs=1e-9)
        assert error < 1e-9
    found, error = cost_model._fit(features, 30 - features[:, 0] + features[:, 1])  # falls with the first
    assert min(found) >= 0
    assert 0 < error < 1


# The stored calibration


def test_measured_once_and_kept(calibrated: Path, measured: list[Machine]) -> None:
    first = cost_model.calibrate()
    assert cost_model.calibrate() is first
    assert len(measured) == 1
    assert first.machine.isa == sparsam.isa()
    assert first.machine.threads == sparsam.num_threads()
    cost_model._known.clear()
    assert cost_model.calibrate() == first
    assert len(measured) == 1
    assert cost_model.cache_file(first.machine) == stored(calibrated)
    assert json.loads(stored(calibrated).read_text())["machine"]["numpy"] == np.__version__
    cost_model.calibrate(force=True)
    assert len(measured) == 2


def test_each_dtype_isa_and_number_of_threads_has_its_own(calibrated: Path, measured: list[Machine]) -> None:
    cost_model.calibrate()
    cost_model.calibrate("bfloat16")
    sparsam.set_num_threads(3)
    try:
        cost_model.calibrate()
    finally:
        sparsam.set_num_threads(None)
    for name in sparsam.available_isas():
        with sparsam.use_isa(name):
            cost_model.calibrate()
    assert len(measured) == len(set(measured)) == 2 + len(sparsam.available_isas())
    with pytest.raises(ValueError, match="dtype='float64': expected one of float32, bfloat16, float16"):
        cost_model.calibrate("float64")


def damage(content: dict[str, Any], how: str) -> Any:
    panels = content["fits"]["panels"]
    if how == "other version":
        content["sparsam_costs"] += 1
    elif how == "other machine":
        content["machine"]["threads"] += 1
    elif how == "a kernel is missing":
        del content["fits"]["panels"]
    elif how == "a batch is missing":
        panels.pop()
    elif how == "a coefficient is missing":
        panels[0].pop()
    elif how == "negative":
        panels[0][3] = -1.0
    elif how == "NaN":
        panels[0][3] = math.nan
    elif how == "all zero":
        panels[0] = [0, 0, 0, 0]
    elif how == "text":
        panels[0] = "0000"
    elif how == "null":
        panels[0] = None
    elif how == "errors are missing":
        content["errors"]["dense"] = []
    else:
        return []
    return content


@pytest.mark.parametrize(
    "how",
    ["other version", "other machine", "a kernel is missing", "a batch is missing", "negative", "NaN",
     "a coefficient is missing", "all zero", "text", "null", "errors are missing", "a list"],
)  # fmt: skip
def test_a_damaged_cache_is_measured_anew(calibrated: Path, measured: list[Machine], how: str) -> None:
    good = cost_model.calibrate()
    file = stored(calibrated)
    file.write_text(json.dumps(damage(json.loads(file.read_text()), how)))
    cost_model._known.clear()
    assert cost_model.calibrate() == good
    assert len(measured) == 2
    cost_model._known.clear()
    assert cost_model.calibrate() == good
    assert len(measured) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_no_json(calibrated: Path, measured: list[Machine], content: bytes) -> None:
    cost_model.calibrate()
    stored(calibrated).write_bytes(content)
    cost_model._known.clear()
    cost_model.calibrate()
    assert len(measured) == 2


def test_a_cache_that_cannot_be_written(
    calibrated: Path, measured: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated.write_text("a file where the folder should be")
    assert cost_model.calibrate() is cost_model.calibrate()
    assert len(measured) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # as the specification says, ignored

    def no_home() -> Path:
        msg = "no home"
        raise RuntimeError(msg)

    monkeypatch.setattr(Path, "home", no_home)
    cost_model._known.clear()
    cost_model.calibrate()
    assert len(measured) == 2


def test_a_disturbed_calibration_is_not_kept(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = made(errors := MACHINE)
    bad = CostModel(errors, bad.fits, {kind: (0.9,) * len(row) for kind, row in bad.errors.items()})
    monkeypatch.setattr(cost_model, "_measure", lambda _: bad)
    assert cost_model.calibrate() is bad
    assert not calibrated.exists()


def test_the_environment_turns_it_off(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not cost_model.is_off()
    monkeypatch.setenv("SPARSAM_CALIBRATION", "off")
    assert cost_model.is_off()
    monkeypatch.setenv("SPARSAM_CALIBRATION", "never")
    with pytest.raises(ValueError, match="SPARSAM_CALIBRATION='never': expected on or off"):
        cost_model.is_off()


# What matrices make of it


def matrix(rows: int = 64, cols: int = 48, sparsity: float = 0.5) -> SparseMatrix:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((rows, cols), dtype=np.float32)
    w[rng.random(w.shape) < sparsity] = 0
    return SparseMatrix.from_dense(w)


@pytest.mark.parametrize("best", ["dense", "bitmask", "panels"])
def test_clear_cases_are_not_tried(calibrated: Path, monkeypatch: pytest.MonkeyPatch, best: str) -> None:
    slopes = dict.fromkeys(("dense", "bitmask", "panels"), 10.0) | {best: 0.01}
    monkeypatch.setattr(cost_model, "_measure", lambda machine: made(machine, **slopes))
    monkeypatch.setattr(cost_model, "fastest", lambda *_, **__: pytest.fail("tried"))
    explanation = matrix().explain(4)
    assert explanation.kernel == best
    assert "by the calibration of this machine" in explanation.reason
    assert sparsam.isa() in explanation.reason
    assert len(explanation.candidates) == 3
    assert all(c.measured is None and c.expected is not None for c in explanation.candidates)
    assert "us expected (" in str(explanation)


def test_close_cases_are_tried(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "_measure", lambda machine: made(machine, dense=1e3))
    times = {"bitmask": 3e-9, "panels": 1e-9}
    monkeypatch.setattr(cost_model, "fastest", lambda run: times[run.args[0]])
    explanation = matrix().explain(4)
    assert explanation.kernel == "panels"
    assert [(c.kernel, c.measured) for c in explanation.candidates] == [
        ("panels", pytest.approx(1e-3)), ("bitmask", pytest.approx(3e-3)), ("dense", None),
    ]  # fmt: skip
    assert "cannot tell" in explanation.reason


def test_a_trial_that_is_disturbed_is_repeated(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "_measure", lambda machine: made(machine, dense=1e3))
    times = {"bitmask": iter([1.0, 2e-9]), "panels": iter([2.0, 1e-9])}
    monkeypatch.setattr(cost_model, "fastest", lambda run: next(times[run.args[0]]))
    assert matrix().explain(4).kernel == "panels"


def test_a_trial_that_stays_disturbed_decides_nothing(
    calibrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_model, "_measure", lambda machine: made(machine, bitmask=0.9, dense=1e3))
    times = {"bitmask": 8.0, "panels": 7.0}
    monkeypatch.setattr(cost_model, "fastest", lambda run: times[run.args[0]])
    assert matrix().explain(4).kernel == "bitmask"


def test_a_real_calibration(calibrated: Path) -> None:
    start = time.perf_counter()
    found = cost_model.calibrate()
    assert time.perf_counter() - start < 30
    assert cost_model._valid(found)
    for kind, rows in found.fits.items():
        assert len(rows) == len(found.errors[kind])
    explanation = matrix(768, 768, 0.9).explain(64)
    assert explanation.kernel in {"dense", "panels"}
    assert all(c.expected is not None and c.expected > 0 for c in explanation.candidates)


def test_fastest() -> None:
    calls = []

    def run() -> None:
        calls.append(1)
        time.sleep(0.001)

    assert 0.001 <= cost_model.fastest(run, settle=0, seconds=0) < 0.1
    assert len(calls) == 4
    assert cost_model.fastest(run, settle=0, seconds=1) >= 0.001
    assert len(calls) == 4 + 21
