from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsam.sparse import cost_model


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Calibrations as outside of tests, with a cache of its own."""
    monkeypatch.setenv("SPARSAM_CALIBRATION", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cost_model.forget()
    (tmp_path / "sparsam").mkdir()
    yield tmp_path / "sparsam"
    cost_model.forget()
