"""Files are pruned and converted alike in every floating-point mode; a warning names the caller's line."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from float_modes import partly_subnormal, same_in_both, subnormal_only
from sparsam import PruningConfig, checkpoint


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruned_files(tmp_path: Path, scope: Any) -> None:
    source = tmp_path / "model.safetensors"
    checkpoint.save(source, {"a.weight": partly_subnormal((40, 30)), "b.weight": subnormal_only((40, 30))})
    config = PruningConfig(target_sparsity=0.3, scope=scope)
    number = itertools.count()

    def pruned() -> dict[str, Any]:
        target = tmp_path / f"pruned{next(number)}.safetensors"
        checkpoint.prune_files(source, target, config)
        return dict(checkpoint.load(target).weights)

    same_in_both(pruned)


def test_converted_files(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    w = subnormal_only((256, 256))
    w[:, ::4] = w[:, 1::4] = w[:, 2::4] = 0
    checkpoint.save(source, {"a.weight": w})
    number = itertools.count()

    def converted() -> dict[str, Any]:
        target = tmp_path / f"bitmask{next(number)}.safetensors"
        checkpoint.convert(source, target, to="sparse-bitmask")
        back = tmp_path / f"back{next(number)}.safetensors"
        checkpoint.convert(target, back, to="dense")
        return dict(checkpoint.load(back).weights)

    assert np.frombuffer(same_in_both(converted)["a.weight"][2], np.float32).tobytes() == w.tobytes()


def test_a_warning_names_the_line_of_the_caller(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    checkpoint.save(source, {"a.weight": np.ones((4, 4), np.float32)})
    config = PruningConfig(target_sparsity=0.5, exclude="nothing*")
    with pytest.warns(UserWarning, match=r"nothing\*") as caught:
        checkpoint.prune_files(source, tmp_path / "pruned.safetensors", config)
    assert caught[0].filename == __file__
