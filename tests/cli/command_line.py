"""Commands, run in this process, and what they print."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sparsam import checkpoint
from sparsam.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Standard output, less colours, of a command that must succeed in silence."""
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return re.sub(r"\x1b\[[0-9;]*m", "", captured.out)


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on standard error of a command that must fail."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sparsam: ")
    assert captured.err.count("\n") == 1
    return captured.err


def sample() -> dict[str, Any]:
    """The tensors of a small checkpoint, one of them integers."""
    rng = np.random.default_rng(7)
    return {
        "head.weight": rng.standard_normal((8, 16), dtype=np.float32),
        "mlp.bias": rng.standard_normal(16, dtype=np.float32),
        "mlp.weight": rng.standard_normal((16, 32)).astype(ml_dtypes.bfloat16),
        "positions": np.arange(12).reshape(3, 4),
    }


def save_model(folder: Path) -> Path:
    """The path of `sample` as a checkpoint."""
    path = folder / "model.safetensors"
    checkpoint.save(path, sample(), {"format": "pt"})
    return path
