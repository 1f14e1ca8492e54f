from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from cost_models import made
from sparsam.sparse import calibration, cost_model
from sparsam.sparse.calibration import Measured


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small shapes, so that it takes no time."""
    monkeypatch.setattr(calibration, "SHAPES", (((16, 64), 512), ((64, 16), 512)))
    monkeypatch.setattr(calibration, "WARM_UP", 0.0)
    monkeypatch.setattr(calibration, "SPINNING", 0.0)


def test_the_fit_finds_nonnegative_coefficients() -> None:
    rng = np.random.default_rng(0)
    features = rng.uniform(1, 9, (12, 4))
    for truth in ((1, 2, 3, 4), (0, 0, 0, 1), (5, 0, 1, 0)):
        found, errors = calibration._fit(features, features @ np.array(truth))
        assert found == pytest.approx(truth, abs=1e-3)
        assert max(errors) < 1e-3
    found, errors = calibration._fit(features, 30 - features[:, 0] + features[:, 1])  # falls with the first
    assert min(found) >= 0
    assert 0 < max(errors) < 1
    features[:, 2] = 0  # no sample is beyond the caches
    found, _ = calibration._fit(features, features @ np.array((1, 2, 0, 4)))
    assert found == pytest.approx((1, 2, 0, 4), abs=1e-3)


def test_a_calibration_is_measured_and_kept(
    cache: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_TRUSTED", np.inf)  # tests run on busy machines
    kernels, dense = calibration.calibrate("bfloat16")
    assert kernels.stored
    assert dense.stored
    assert kernels.costs.key == cost_model.kernel_key("bfloat16")
    assert dense.costs.key == cost_model.dense_key()
    found = cost_model.current_costs("bfloat16")
    assert (found.kernels, found.dense) == (kernels.costs, dense.costs)
    assert found.source == "calibrated costs"
    assert len(list(cache.iterdir())) == 2
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float16; got 'float64'"):
        calibration.calibrate("float64")


def test_what_was_disturbed_is_not_kept(cache: Path) -> None:
    assert not calibration.store(Measured(made().kernels, error=0.9))
    assert not list(cache.iterdir())
    assert calibration.store(Measured(made().kernels, error=0.1))


def test_a_planted_link_is_replaced_and_not_followed(cache: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    file = cost_model.cache_file(made().kernels.key)
    file.symlink_to(victim)
    assert calibration.store(Measured(made().kernels, error=0.1))
    assert victim.read_text() == "precious"
    assert not file.is_symlink()
    assert cost_model.calibrated(made().kernels.key) == made().kernels


@pytest.mark.parametrize("what", ["folder", "fifo", "no folder"])
def test_a_cache_that_cannot_be_written(cache: Path, what: str) -> None:
    file = cost_model.cache_file(made().kernels.key)
    if what == "folder":
        file.mkdir()
    elif what == "fifo":
        os.mkfifo(file)
    else:
        cache.rmdir()
        cache.write_text("a file")
    assert not calibration.store(Measured(made().kernels, error=0.1))


def test_fastest() -> None:
    calls = []

    def run() -> None:
        calls.append(1)
        time.sleep(0.001)

    assert 0.001 <= calibration.fastest(run, warm_up=0, seconds=0) < 0.1
    assert len(calls) == 4
    assert calibration.fastest(run, warm_up=0, seconds=1) >= 0.001
    assert len(calls) == 4 + 21
