"""Checkpoints on disk: safetensors files, sharded or not, read and replaced whole or not at all.

`json_state` decodes the JSON that other folders keep on disk. Imports nothing of this package but its checks.
"""

from __future__ import annotations

from sparsam.checkpoint.files import FILE_NAME, INDEX_NAME, Checkpoint, Shards, load, overwrites, save, stream

__all__ = ["FILE_NAME", "INDEX_NAME", "Checkpoint", "Shards", "load", "overwrites", "save", "stream"]
