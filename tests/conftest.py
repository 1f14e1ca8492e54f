from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pytest

import sparsam

if TYPE_CHECKING:
    from torch_cases import Clock


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
    """No test sees the user's calibrations; test_cost_model.py asks for its own."""
    monkeypatch.setenv("SPARSAM_CALIBRATION", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Every layer of a torch model is in panels (rounded: slots) and wins by 2, unless a test changes it."""
    from torch_cases import Clock  # noqa: PLC0415 - imports torch

    from sparsam.torch.acceleration import measurement  # noqa: PLC0415
    from sparsam.torch.layers.packed_weight import PackedWeight  # noqa: PLC0415

    clock = Clock()
    forms = PackedWeight.needed_forms

    def needed(weight: PackedWeight, batches: Sequence[int]) -> tuple[str, ...]:
        rounded = weight.parts[0].dtype in {"int8", "int4"}
        return forms(weight, batches) if rounded else ("panels",)

    monkeypatch.setattr(PackedWeight, "needed_forms", needed)
    for name in ("layer_times", "model_times", "attention_times", "fused_times", "wider_times", "compare"):
        monkeypatch.setattr(measurement, name, getattr(clock, name))
    return clock


@pytest.fixture
def fusing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused modules are measured as faster; those of the tests' own classes too."""
    from sparsam.torch.fused import installation  # noqa: PLC0415 - needs torch

    monkeypatch.setattr(installation, "_is_known", lambda _: True)
    clock.fused = 2.0


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small models are no work for two, and a busy machine makes them wait for each other."""
    import torch  # noqa: PLC0415

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
