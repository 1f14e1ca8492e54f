"""Checkpoints on disk: safetensors files, sharded or not, validated when read and replaced atomically.

`exchange` has the formats of other libraries for pruned weights; `json_state` decodes the JSON that other
folders keep on disk; `streaming` prunes files larger than memory, with the pipeline. Imports nothing else of
this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsam.checkpoint.files import FILE_NAME, INDEX_NAME, Checkpoint, Shards, load, overwrites, save, stream
from sparsam.inputs.late_imports import on_demand

if TYPE_CHECKING:
    from sparsam.checkpoint.conversion import Conversion, convert
    from sparsam.checkpoint.streaming import prune_files
else:
    __getattr__ = on_demand(
        __name__,
        {
            "Conversion": "sparsam.checkpoint.conversion",
            "convert": "sparsam.checkpoint.conversion",
            "prune_files": "sparsam.checkpoint.streaming",
        },
    )

__all__ = [
    "FILE_NAME",
    "INDEX_NAME",
    "Checkpoint",
    "Conversion",
    "Shards",
    "convert",
    "load",
    "overwrites",
    "prune_files",
    "save",
    "stream",
]
