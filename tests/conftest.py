from __future__ import annotations

from collections.abc import Iterator

import pytest

import sparsam


def pytest_report_header() -> str:
    return str(sparsam.build_info())


@pytest.fixture(params=sparsam.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with sparsam.use_isa(request.param):
        assert sparsam.isa() == request.param
        yield request.param


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread, two, and more than most test machines have cores."""
    sparsam.set_num_threads(request.param)
    yield request.param
    sparsam.set_num_threads(None)


@pytest.fixture(autouse=True)
def uncalibrated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test waits for a calibration or sees the user's; test_costs.py asks for its own."""
    monkeypatch.setenv("SPARSAM_CALIBRATION", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
