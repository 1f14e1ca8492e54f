"""Steps of the core on arrays, and what they compute: one NumPy expression of float64 for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from matmul_cases import ORACLES
from sparsam._core import Packed, Steps

Array: TypeAlias = NDArray[Any]
Step: TypeAlias = tuple[Any, ...]


def run(
    widths: Sequence[int],
    steps: Sequence[Step],
    inputs: Mapping[int, Array],
    outputs: Sequence[int],
    tensors: Sequence[Array] = (),
    mask: Array | None = None,
    shape: tuple[int, int] | None = None,
    room: int | None = None,
) -> list[NDArray[np.float32]]:
    """The outputs, each (sequences, positions, width) as the inputs are."""
    sequences, positions = shape or next(iter(inputs.values())).shape[:2]
    program = Steps(widths, steps)
    given = {i: np.array(x, np.float32, order="C") for i, x in inputs.items()}
    found = {
        i: given[i] if i in given else np.full((sequences, positions, widths[i]), np.nan, np.float32)
        for i in outputs
    }
    vectors = [np.ascontiguousarray(t, np.float32) for t in tensors]
    needed = program.scratch(sequences, positions) if room is None else room
    scratch = np.full(needed + 64, np.nan, np.float32)
    scratch[-63:] = 7  # behind what was asked for, which begins at no multiple of 64 bytes
    program.run(
        sequences,
        positions,
        [(i, x.ctypes.data) for i, x in {**given, **found}.items()],
        [t.ctypes.data for t in vectors],
        None if mask is None else shown(mask),
        scratch[1:].ctypes.data,
        needed,
    )
    assert (scratch[-63:] == 7).all()
    for i, x in inputs.items():
        assert i in outputs or given[i].tobytes() == np.asarray(x, np.float32).tobytes()
    return [found[i] for i in outputs]


def shown(mask: Array) -> tuple[int, bool, tuple[int, int, int]]:
    """A mask (sequences, heads, queries, keys), whose strides may be 0, as run() takes it."""
    sequences, heads, queries = (step // mask.itemsize for step in mask.strides[:3])
    return mask.__array_interface__["data"][0], mask.dtype == np.bool_, (sequences, heads, queries)


def separately(
    widths: Sequence[int],
    steps: Sequence[Step],
    inputs: Mapping[int, Array],
    tensors: Sequence[Array] = (),
    mask: Array | None = None,
) -> dict[int, NDArray[np.float32]]:
    """All buffers after the steps, each of them a call of its own, sequence by sequence."""
    shape = next(iter(inputs.values())).shape[:2]
    now = {i: np.array(x, np.float32) for i, x in inputs.items()}
    for step in steps:
        reads, writes = operands(step)
        parts = []
        for s in range(shape[0]):
            here = {i: now[i][s : s + 1] for i in reads}
            part = None if mask is None else mask[s : s + 1]
            parts.append(run(widths, [step], here, writes, tensors, part))
        for i, found in zip(writes, zip(*parts, strict=True), strict=True):
            now[i] = np.concatenate(found)
    return now


def operands(step: Step) -> tuple[list[int], list[int]]:
    """The buffers that a step reads, and those that it writes."""
    name, *rest = step
    if name == "linear":
        return [rest[2]], [rest[3]]
    if name in {"attention", "rotary"}:
        return rest[:3], [rest[3]]
    if name in {"add", "gate"}:
        return rest[:2], [rest[2]]
    if name.startswith("add_"):
        return rest[:2], [i for i in rest[2:4] if i >= 0]
    return [rest[0]], [rest[1]]


def layer_norm(x: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
    """In float64."""
    x = x.astype(float)
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    y = y * (1 if weight is None else weight.astype(float))
    result: Array = y + (0 if bias is None else bias.astype(float))
    return result


def rms_norm(x: Array, weight: Array | None, eps: float) -> Array:
    """In float64."""
    x = x.astype(float)
    y: Array = (
        x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (1 if weight is None else weight.astype(float))
    )
    return y


def attention(q: Array, k: Array, v: Array, heads: int, scale: float, mask: Array | None) -> Array:
    """In float64; zeros for a query that sees no key."""
    sequences, positions, width = q.shape
    q, k, v = (
        x.reshape(sequences, positions, heads, width // heads).swapaxes(1, 2).astype(float) for x in (q, k, v)
    )
    scores = scale * (q @ k.swapaxes(2, 3))
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    y = weights / np.where(total == 0, 1, total) @ v
    result: Array = y.swapaxes(1, 2).reshape(sequences, positions, width)
    return result


def rotary(x: Array, cos: Array, sin: Array, heads: int) -> Array:
    """In the type of the arguments, each operation rounded: as Hugging Face's models apply it."""
    *lead, width = x.shape
    parts = x.reshape(*lead, heads, width // heads)
    half = parts.shape[-1] // 2
    turned = np.concatenate([-parts[..., half:], parts[..., :half]], -1)
    y: Array = parts * cos[..., None, :] + turned * sin[..., None, :]
    return y.reshape(x.shape)


def oracle(
    steps: Sequence[Step], inputs: Mapping[int, Array], tensors: Sequence[Array], mask: Array | None
) -> dict[int, Array]:
    """All buffers after the steps, in float64."""
    now = {i: x.astype(float) for i, x in inputs.items()}
    for name, *rest in steps:
        if name == "linear":
            packed, _, x, y, bias, activation = rest
            out = now[x] @ unpacked(packed).T + (0 if bias < 0 else tensors[bias].astype(float))
            now[y] = ORACLES[activation](out) if activation else out
        elif name == "attention":
            q, k, v, y, heads, scale, masked = rest
            now[y] = attention(now[q], now[k], now[v], heads, scale, mask if masked else None)
        elif name == "rotary":
            x, cos, sin, y, heads = rest
            now[y] = rotary(now[x], now[cos], now[sin], heads)
        elif name == "add":
            now[rest[2]] = now[rest[0]] + now[rest[1]]
        elif name == "activate":
            now[rest[1]] = ORACLES[rest[2]](now[rest[0]])
        elif name == "gate":
            now[rest[2]] = ORACLES[rest[3]](now[rest[0]]) * now[rest[1]]
        else:
            x = now[rest.pop(0)]
            if name.startswith("add_"):
                x = x + now[rest.pop(0)]
                total = rest.pop(0)
                if total >= 0:
                    now[total] = x
            y, *vectors, eps = rest
            found = [tensors[t] if t >= 0 else None for t in vectors]
            now[y] = layer_norm(x, found[0], found[1], eps) if len(found) == 2 else rms_norm(x, found[0], eps)
    return now


def unpacked(packed: Packed) -> Array:
    """The weight in float64."""
    return packed.unpack().astype(np.float64)
