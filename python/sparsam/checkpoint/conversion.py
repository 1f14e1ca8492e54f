"""Converts pruned weights between formats: dense files, compressed-tensors, PyTorch, SciPy, DLMC."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from sparsam.checkpoint import foreign, whole_files
from sparsam.checkpoint.atomic import publish
from sparsam.checkpoint.exchange import bitmask, compressed_rows, cutlass, two_of_four
from sparsam.checkpoint.files import Checkpoint, StrPath
from sparsam.checkpoint.json_state import decode
from sparsam.checkpoint.json_state import read as read_bytes
from sparsam.checkpoint.whole_files import Whole
from sparsam.inputs.checks import expected
from sparsam.inputs.float_mode import standard_floats
from sparsam.inputs.names import closest

__all__ = ["Conversion", "Format", "convert"]

Format: TypeAlias = Literal[
    "dense", "sparse-bitmask", "sparse-24-bitmask", "semi-structured", "scipy", "smtx"
]

Arrays: TypeAlias = Mapping[str, NDArray[Any]]

_WEIGHT = ".weight"
_METHOD = "compressed-tensors"
_VERSION = "0.14.0.1"
"""The last version of compressed-tensors that has its sparse formats, whose files these are."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        format: What was written.
        converted: The names of the tensors that are in this format now; all of them, if it is dense.
        others: The names of those that it cannot hold, or not in less space: they stay dense.
        bytes_before: Bytes of all tensors as they were stored.
        bytes_after: Bytes of all tensors as they are stored now; of "scipy" and "smtx", of the file.
    """

    format: Format
    converted: tuple[str, ...]
    others: tuple[str, ...]
    bytes_before: int
    bytes_after: int


class _Codec(NamedTuple):
    """How a tensor is stored as several; `only_weights`: only those named `*.weight`, whose suffix goes."""

    names: tuple[str, ...]
    only_weights: bool
    fits: Callable[[NDArray[Any]], bool]
    parts: Callable[[NDArray[Any]], dict[str, NDArray[Any]]]
    dense: Callable[[str, Arrays], NDArray[Any]]


@standard_floats
def convert(src: StrPath, dst: StrPath, to: Format | None = None, *, tensor: str | None = None) -> Conversion:
    """Writes a checkpoint, or one matrix of it, in another format; that of the source is detected.

    Args:
        src: What `load` takes; also .pt, .bin, .npz, .onnx, .smtx, and .npz of scipy.sparse.
        dst: A directory or a .safetensors file; for "dense" also a file of another kind; for "scipy" and
            "smtx" a file.
        to: "dense"; "sparse-bitmask" and "sparse-24-bitmask", which are compressed-tensors' ones;
            "semi-structured", PyTorch's in the layout of CUTLASS; or, of one matrix, "scipy" and "smtx", the
            latter without values. None: "smtx" where `dst` ends in .smtx, else "dense".
        tensor: The matrix to write, where there are several.

    Returns:
        What was converted. Tensors that the format cannot hold, or not in less space, stay dense.

    Raises:
        ValueError: A file is damaged or of another kind; nothing fits the format; there is no such tensor.
        TypeError: A dtype that the format lacks.
        OSError: A file cannot be read or written.
    """
    source, target = Path(src), Path(dst)
    form: Format = to or ("smtx" if target.suffix == ".smtx" else "dense")
    if form not in get_args(Format):
        raise ValueError(expected("to", form, f"one of {', '.join(get_args(Format))}", "choose one of them"))
    file = foreign.source_of(source)
    read = _read(file)
    before = sum(array.nbytes for array in read.weights.values())
    whole = _as_dense(file, read)
    if form in _WRITERS:
        name, matrix = _one(file, whole.weights, tensor)
        publish({target: partial(_WRITERS[form], array=matrix)})
        return Conversion(form, (name,), (), before, target.stat().st_size)
    if tensor is not None:
        whole = whole._replace(weights=dict([_one(file, whole.weights, tensor)]), like=None)
    if form == "dense":
        whole_files.write(source, target, whole.weights, whole)
        _write_config(source, target, None)
        after = sum(array.nbytes for array in whole.weights.values())
        return Conversion(form, tuple(whole.weights), (), before, after)
    if foreign.kind_of(target) != "safetensors":
        msg = f"{target}: expected a directory or a .safetensors file for {form}; got another; rename it"
        raise ValueError(msg)
    return _encode(form, source, target, whole, before)


def _read(file: Path) -> Whole:
    if file.suffix == ".smtx":
        pattern = compressed_rows.read_pattern(file)
        return Whole({"weight": pattern.astype(np.float32)}, None, None)
    return whole_files.read(file)


def _as_dense(file: Path, whole: Whole) -> Whole:
    """The checkpoint with every tensor that is stored in parts put together."""
    given = whole.weights
    if compressed_rows.is_scipy(given):
        return Whole({"weight": compressed_rows.read_scipy(str(file), given)}, None, None)
    weights, homes = dict(given), {}
    for codec in _CODECS.values():
        first = f".{codec.names[1]}"
        for stem in [name.removesuffix(first) for name in weights if name.endswith(first)]:
            stored = {part: f"{stem}.{part}" for part in codec.names if f"{stem}.{part}" in weights}
            if len(stored) < len(codec.names):
                continue
            name = stem if not codec.only_weights or stem.endswith(_WEIGHT) else stem + _WEIGHT
            if name in weights:
                msg = f"{file}: expected {name!r} dense or in parts; got both; drop one of them"
                raise ValueError(msg)
            array = codec.dense(name, {part: weights[key] for part, key in stored.items()})
            homes[name] = stored[codec.names[1]]
            for key in stored.values():
                del weights[key]
            weights[name] = array
    weights = dict(sorted(weights.items()))
    return whole._replace(weights=weights, like=_recut(whole.like, {n: homes.get(n, n) for n in weights}))


def _encode(form: Format, source: Path, target: Path, whole: Whole, before: int) -> Conversion:
    codec = _CODECS[form]
    stored: dict[str, NDArray[Any]] = {}
    homes: dict[str, str] = {}
    converted, total, zeros = [], 0, 0
    for name, array in whole.weights.items():
        suits = name.endswith(_WEIGHT) or not codec.only_weights
        parts = codec.parts(array) if suits and array.ndim > 1 and codec.fits(array) else {}
        if not parts or sum(part.nbytes for part in parts.values()) >= array.nbytes:
            stored[name], homes[name] = array, name
            continue
        converted.append(name)
        total, zeros = total + array.size, zeros + array.size - int(np.count_nonzero(array))
        stem = name.removesuffix(_WEIGHT) if codec.only_weights else name
        for part, values in parts.items():
            key = f"{stem}.{part}"
            if key in whole.weights or key in stored:
                msg = f"tensor {key!r}: expected a free name for a part of {name!r}; got one; rename it"
                raise ValueError(msg)
            stored[key], homes[key] = values, name
    if not converted:
        msg = f"{source}: expected tensors that {form} holds in less space; got none; prune them first"
        raise ValueError(msg)
    whole = whole._replace(like=_recut(whole.like, homes))
    whole_files.write(source, target, stored, whole)
    _write_config(source, target, _described(form, converted, zeros / total) if codec.only_weights else None)
    others = tuple(name for name in whole.weights if name not in set(converted))
    return Conversion(form, tuple(converted), others, before, sum(a.nbytes for a in stored.values()))


def _recut(like: Checkpoint | None, homes: Mapping[str, str]) -> Checkpoint | None:
    """The same division into shards for renamed tensors: each goes to the shard of its `homes` entry."""
    if like is None or like.shards is None:
        return like
    weight_map = {name: like.shards.weight_map[home] for name, home in homes.items()}
    return replace(like, shards=replace(like.shards, weight_map=weight_map))


def _one(file: Path, weights: Arrays, name: str | None) -> tuple[str, NDArray[Any]]:
    """The requested matrix, or the only one."""
    matrices = [key for key, array in weights.items() if array.ndim == 2]
    if name is None and len(matrices) != 1:
        shown = ", ".join(map(repr, matrices[:3])) or "none"
        msg = f"{file}: expected one matrix; got {len(matrices)}: {shown}; say which one (--tensor)"
        raise ValueError(msg)
    name = matrices[0] if name is None else name
    if name not in weights:
        msg = f"tensor: expected one of {file}; got {name!r}; {closest(name, weights)}"
        raise ValueError(msg)
    if weights[name].ndim != 2:
        msg = f"tensor {name!r}: expected a matrix; got shape {list(weights[name].shape)}; name another"
        raise ValueError(msg)
    return name, weights[name]


def _described(form: str, names: list[str], sparsity: float) -> dict[str, Any]:
    """The `quantization_config` that compressed-tensors expects in config.json."""
    return {
        "quant_method": _METHOD,
        "version": _VERSION,
        "quantization_status": "compressed",
        "sparsity_config": {
            "format": form,
            "targets": [name.removesuffix(_WEIGHT) for name in names],
            "ignore": [],
            "global_sparsity": sparsity,
            "sparsity_structure": "2:4" if form == "sparse-24-bitmask" else "unstructured",
        },
        "transform_config": {},
        "format": "dense",
        "config_groups": {},
        "ignore": [],
    }


def _write_config(source: Path, target: Path, described: dict[str, Any] | None) -> None:
    """Says in the config.json of a Hugging Face directory how its weights are stored."""
    file = target / "config.json"
    if not (source.is_dir() and target.is_dir() and file.exists()):
        return
    config = decode(read_bytes(file, "name another folder"), dict[str, Any], str(file), "get it again")
    old = config.get("quantization_config")
    if isinstance(old, dict) and old.get("quant_method") != _METHOD:
        return
    config.pop("quantization_config", None)
    if isinstance(old, dict) and old.get("config_groups"):  # quantised as well: that stays as it is
        described = old | {"sparsity_config": (described or {}).get("sparsity_config", {})}
    if described is not None:
        config["quantization_config"] = described
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    publish({file: lambda path: path.write_text(text, encoding="utf-8")})


def _any_shape(array: NDArray[Any]) -> bool:
    return bool(array.size)


_CODECS: dict[str, _Codec] = {
    "sparse-bitmask": _Codec(bitmask.PARTS, True, _any_shape, bitmask.parts, bitmask.dense),
    "sparse-24-bitmask": _Codec(
        two_of_four.PARTS, True, two_of_four.fits, two_of_four.parts, two_of_four.dense
    ),
    "semi-structured": _Codec(cutlass.PARTS, False, cutlass.fits, cutlass.parts, cutlass.dense),
}

_WRITERS: dict[str, Callable[..., None]] = {
    "scipy": compressed_rows.write_scipy,
    "smtx": compressed_rows.write_pattern,
}
