from __future__ import annotations

import pytest
from torch_cases import Clock


@pytest.fixture(autouse=True)
def _gains(clock: Clock) -> None:
    """Fused modules win, unless a test changes that."""
    clock.fused = 2.0
