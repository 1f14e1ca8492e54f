"""Which tensors of a checkpoint commands leave dense by default: vectors, embeddings, tied heads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparsam.checkpoint.files import resolve
from sparsam.checkpoint.layout import Entry, read_layout
from sparsam.checkpoint.plan import shapes_of
from sparsam.config import Override, PruningConfig
from sparsam.inputs.names import NamePatterns
from sparsam.patterns import NM, Unstructured
from sparsam.tiles import matrix_shape

__all__ = ["AdaptedConfig", "Indivisible", "adapt", "heads_among", "heads_tied", "shapes"]

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
Indivisible: TypeAlias = Literal["error", "skip", "unstructured"]

_EMBEDDING = re.compile(
    r"(^|\.)(\w*embed(ding)?s?|embed_(tokens|positions|in)|wte|wpe|shared|relative_attention_bias)\.weight$"
)
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|output|output_projection|predictions\.decoder|decoder)\.weight$"
)
_CHUNK = 1 << 22


class AdaptedConfig(NamedTuple):
    """A configuration for given tensors, and the embeddings that it leaves dense."""

    config: PruningConfig
    embeddings: list[str]


def shapes(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Returns an array without memory for each tensor of a checkpoint; raises as `load`."""
    return shapes_of(_entries(path))


def adapt(
    config: PruningConfig,
    arrays: Arrays,
    *,
    tied: Iterable[str] = (),
    constants: Iterable[str] = (),
    vectors: bool = False,
    embeddings: bool = False,
    indivisible: Indivisible = "error",
) -> AdaptedConfig:
    """Returns a configuration that leaves dense what is rarely meant to be pruned.

    Args:
        config: The requested configuration.
        arrays: Name -> array; only shapes and dtypes are used.
        tied: Names of heads that share an embedding's weight (`heads_tied`), and of other embeddings.
        constants: Names of tensors that are not weights of layers.
        vectors: Let patterns of `overrides` prune tensors of one axis too; their exact names always do.
        embeddings: Prune embeddings and tied heads too; an override that names one exactly always does.
        indivisible: What to do with tensors whose rows an N:M pattern does not divide: leave them "skip"ped,
            prune them "unstructured" to the same sparsity, or "error".

    Raises:
        ValueError: Tensors do not divide; all of them are named.
    """
    overridden, excluded = NamePatterns(config.overrides), NamePatterns(config.exclude)
    dense, left = [], []
    heads, plain = set(tied), set(constants)
    for name, array in arrays.items():
        if name in config.overrides or excluded.matches(name):
            continue
        if name in plain:
            dense.append(name)
        elif array.ndim < 2:
            if overridden.matches(name) and not vectors:
                dense.append(name)
        elif not embeddings and array.dtype.kind not in "biu" and (_EMBEDDING.search(name) or name in heads):
            left.append(name)
    adapted = replace(config, exclude=(*config.exclude, *dense, *left))
    return AdaptedConfig(_divisible(adapted, arrays, indivisible), left)


def _divisible(config: PruningConfig, arrays: Arrays, indivisible: Indivisible) -> PruningConfig:
    """The configuration with tensors that their N:M pattern does not divide left out, or unstructured."""
    overridden, excluded = NamePatterns(config.overrides), NamePatterns(config.exclude)
    stored = NamePatterns(config.transposed)
    ragged: dict[str, tuple[NM, tuple[int, ...]]] = {}
    for name, array in arrays.items():
        key = overridden.last(name)
        if excluded.matches(name) or array.dtype.kind in "biu" or (array.ndim < 2 and key is None):
            continue
        own = None if key is None else config.overrides[key].pattern
        pattern = own or config.pattern
        if not isinstance(pattern, NM):
            continue
        shape = array.shape
        if array.ndim > 1 and stored.matches(name):
            shape = (shape[-1], shape[-2], *shape[:-2])
        channels = pattern.axis == "channels" and len(shape) > 2
        if (shape[1] if channels else matrix_shape(shape)[1]) % pattern.m:
            ragged[name] = pattern, shape
    if ragged and indivisible == "error":
        listed = ", ".join(f"{name!r} {list(shape)}" for name, (_, shape) in ragged.items())
        first = next(iter(ragged.values()))[0]
        msg = (
            f"pattern {first}: expected rows of a multiple of {first.m} weights; got others in {listed}; "
            "skip them, prune them unstructured (--indivisible), or exclude them"
        )
        raise ValueError(msg)
    if indivisible == "skip":
        return replace(config, exclude=(*config.exclude, *ragged))
    others = {name: Override(pattern.sparsity, Unstructured()) for name, (pattern, _) in ragged.items()}
    return replace(config, overrides={**config.overrides, **others})


def heads_tied(path: str | os.PathLike[str]) -> list[str]:
    """Returns the names of heads that hold the bytes of an embedding: the same weights, stored twice."""
    entries = {entry.name: (file, entry) for file, entry in _placed(path)}
    embeddings = [(file, entry) for file, entry in entries.values() if _EMBEDDING.search(entry.name)]
    return [
        entry.name
        for file, entry in entries.values()
        if _HEAD.search(entry.name) and any(_same(file, entry, *other) for other in embeddings)
    ]


def heads_among(arrays: Arrays) -> list[str]:
    """`heads_tied` for arrays in memory."""
    embeddings = [array for name, array in arrays.items() if _EMBEDDING.search(name)]
    return [
        name
        for name, array in arrays.items()
        if _HEAD.search(name) and any(_equal(array, other) for other in embeddings)
    ]


def _equal(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two arrays share their memory or hold the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.ctypes.data == other.ctypes.data:
        return True
    left, right = (np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (one, other))
    return left.data == right.data  # without a temporary array: these are the largest tensors of a model


def _placed(path: str | os.PathLike[str]) -> list[tuple[Path, Entry]]:
    file, shards = resolve(path)
    parts = [file] if shards is None else [file.parent / shard for shard in shards.metadata]
    return [(part, entry) for part in parts for entry in read_layout(part).entries]


def _entries(path: str | os.PathLike[str]) -> list[Entry]:
    return [entry for _, entry in _placed(path)]


def _same(file: Path, entry: Entry, other_file: Path, other: Entry) -> bool:
    if (entry.dtype, entry.shape) != (other.dtype, other.shape):
        return False
    with file.open("rb") as one, other_file.open("rb") as two:
        one.seek(entry.begin)
        two.seek(other.begin)
        left = entry.nbytes
        while left:
            step = min(left, _CHUNK)
            if one.read(step) != two.read(step):
                return False
            left -= step
    return True
