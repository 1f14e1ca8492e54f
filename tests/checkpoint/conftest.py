from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints import BFLOAT16
from sparsam import checkpoint


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards as the transformers library writes them, with a metadata of their own."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file({"x.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}, folder / first, {"format": "pt"})
    save_file({"a.weight": np.ones((4, 1), BFLOAT16), "z": np.arange(3)}, folder / second, {"part": "2"})
    index = {
        "metadata": {"total_size": 56, "note": "kept"},
        "weight_map": {"x.weight": first, "a.weight": second, "z": second},
    }
    (folder / checkpoint.INDEX_NAME).write_text(json.dumps(index))
    return folder
