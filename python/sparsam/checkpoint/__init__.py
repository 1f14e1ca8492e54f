"""Checkpoints on disk: safetensors files, sharded or not, read and replaced whole or not at all.

`json_state` decodes the JSON that other folders keep on disk; `streaming` prunes files larger than memory,
with the pipeline. Imports nothing else of this package.
"""

from __future__ import annotations

from sparsam.checkpoint.files import FILE_NAME, INDEX_NAME, Checkpoint, Shards, load, overwrites, save, stream
from sparsam.checkpoint.streaming import prune_files

__all__ = [
    "FILE_NAME",
    "INDEX_NAME",
    "Checkpoint",
    "Shards",
    "load",
    "overwrites",
    "prune_files",
    "save",
    "stream",
]
