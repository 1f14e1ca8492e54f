"""Checkpoints on disk: safetensors files, sharded or not, read and replaced whole or not at all.

Imports nothing of this package but its checks.
"""

from __future__ import annotations

from sparsam.checkpoint.files import FILE_NAME, INDEX_NAME, Checkpoint, Shards, load, overwrites, save, stream

__all__ = ["FILE_NAME", "INDEX_NAME", "Checkpoint", "Shards", "load", "overwrites", "save", "stream"]
