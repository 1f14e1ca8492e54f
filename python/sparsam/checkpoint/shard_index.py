"""Indexes of sharded checkpoints: which tensor lies in which file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import msgspec

from sparsam.checkpoint.json_state import decode, read

__all__ = ["Index", "check_placed", "find_shard", "listed", "read_index"]


class Index(msgspec.Struct):
    """The JSON of an index. Other fields, and what the metadata holds, belong to other tools."""

    weight_map: dict[str, str]
    metadata: dict[str, Any] = {}

    def placed(self) -> dict[str, set[str]]:
        """Returns shard -> the names of its tensors, by the name of the shard."""
        found: dict[str, set[str]] = defaultdict(set)
        for name, shard in self.weight_map.items():
            found[shard].add(name)
        return dict(sorted(found.items()))


def read_index(file: Path) -> Index:
    """Reads an index; ValueError if it is not one, or names files that are not in its directory."""
    index = decode(read(file, "name the index"), Index, str(file), "get it again", what="an index of shards")
    for shard in index.weight_map.values():
        if {PurePosixPath(shard).name, PureWindowsPath(shard).name} != {shard}:
            msg = f"{file}: expected shards to be names of files beside it; got {shard!r}; do not trust it"
            raise ValueError(msg)
    return index


def find_shard(index: Path, shard: str) -> Path:
    """Returns the file of a shard; ValueError if it is not there."""
    file = index.parent / shard
    try:
        found = file.is_file()
    except OSError:  # no file can have that name
        found = False
    if not found:
        msg = f"{index}: expected the shard {shard!r} beside it; got no such file; get the shard"
        raise ValueError(msg)
    return file


def check_placed(index: Path, file: Path, placed: Collection[str], held: Collection[str]) -> None:
    """Raises ValueError unless a shard holds the tensors that the index places in it and no others."""
    lacks, extra = sorted(set(placed) - set(held)), sorted(set(held) - set(placed))
    if lacks or extra:
        came = f"a shard without {listed(lacks)}" if lacks else f"one that also holds {listed(extra)}"
        msg = (
            f"{file}: expected exactly the tensors that {index.name} places there; got {came}; "
            "get the index and its shards from the same version"
        )
        raise ValueError(msg)


def listed(names: list[str]) -> str:
    """Returns the first of some names, and how many more there are."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
