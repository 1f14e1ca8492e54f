"""What is read back from a disk is right, or refused with the file and the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz_states import FORMATS, fuzz


@pytest.mark.parametrize("name", FORMATS)
def test_mutations_are_refused_or_harmless(name: str, tmp_path: Path) -> None:
    refused, loaded = fuzz(name, 400, tmp_path)
    assert refused > 200
    assert loaded > 2
