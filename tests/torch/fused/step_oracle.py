"""The steps of fused modules by PyTorch's functions: the interface of `_core.Steps`, slowly."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.nn import functional

import torch
from sparsam.torch.layers.operators import ACTIVATIONS
from torch import Tensor

__all__ = ["SlowSteps"]


def floats(address: int, size: int) -> Tensor:
    """The numbers at an address, not copied."""
    if not size:
        return torch.empty(0)
    return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_float * size).from_address(address)))


class SlowSteps:
    """As `_core.Steps`."""

    def __init__(self, widths: list[int], steps: list[tuple[Any, ...]]) -> None:
        self.widths = widths
        self.steps = steps

    def scratch(self, sequences: int, positions: int) -> int:
        return sequences * positions * sum(self.widths)

    def run(
        self,
        sequences: int,
        positions: int,
        given: list[tuple[int, int]],
        tensors: list[int],
        mask: Any,
        scratch: int,  # noqa: ARG002
        floats_there: int,
    ) -> None:
        assert floats_there >= 0
        rows = sequences * positions
        buffers = {i: floats(a, rows * self.widths[i]).view(rows, self.widths[i]) for i, a in given}
        for i, width in enumerate(self.widths):
            buffers.setdefault(i, torch.full((rows, width), torch.nan))

        def vector(t: int, size: int) -> Tensor | None:
            return None if t < 0 else floats(tensors[t], size)

        with torch.no_grad():
            for name, *rest in self.steps:
                getattr(self, name)(rest, buffers, vector, (sequences, positions, mask))

    def linear(self, rest: Any, buffers: Any, vector: Any, _: Any) -> None:
        packed, kernel, x, y, bias, activation = rest
        out, add = buffers[y], vector(bias, packed.rows)
        packed.linear_at(
            kernel,
            buffers[x].data_ptr(),
            False,
            len(out),
            0 if add is None else add.data_ptr(),
            activation,
            out.data_ptr(),
        )

    def attention(self, rest: Any, buffers: Any, _: Any, sizes: Any) -> None:
        q, k, v, y, heads, scale, masked = rest
        sequences, positions, mask = sizes
        parts = [buffers[i].view(sequences, positions, heads, -1).transpose(1, 2) for i in (q, k, v)]
        shown = None
        if masked:
            address, is_bytes, strides = mask
            own = [(n - 1) * s for n, s in zip((sequences, heads, positions), strides, strict=True)]
            size = sum(own) + positions
            kind = ctypes.c_bool if is_bytes else ctypes.c_float
            raw = torch.from_numpy(np.ctypeslib.as_array((kind * size).from_address(address)))
            shown = raw.as_strided((sequences, heads, positions, positions), (*strides, 1))
        found = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], shown, scale=scale)
        buffers[y].copy_(found.transpose(1, 2).reshape(buffers[y].shape))

    def add(self, rest: Any, buffers: Any, *_: Any) -> None:
        a, b, y = rest
        buffers[y].copy_(buffers[a] + buffers[b])

    def layer_norm(self, rest: Any, buffers: Any, vector: Any, _: Any) -> None:
        x, y, weight, bias, eps = rest
        width = self.widths[x]
        found = functional.layer_norm(buffers[x], (width,), vector(weight, width), vector(bias, width), eps)
        buffers[y].copy_(found)

    def rms_norm(self, rest: Any, buffers: Any, vector: Any, _: Any) -> None:
        x, y, weight, eps = rest
        found = buffers[x] * torch.rsqrt(buffers[x].pow(2).mean(-1, keepdim=True) + eps)
        scale = vector(weight, self.widths[x])
        buffers[y].copy_(found if scale is None else found * scale)

    def add_layer_norm(self, rest: Sequence[Any], *others: Any) -> None:
        self._add_norm(self.layer_norm, rest, others)

    def add_rms_norm(self, rest: Sequence[Any], *others: Any) -> None:
        self._add_norm(self.rms_norm, rest, others)

    def _add_norm(self, norm: Any, rest: Sequence[Any], others: Any) -> None:
        a, b, total, y, *more = rest
        buffers, vector, sizes = others
        summed = buffers[a] + buffers[b]
        norm((a, y, *more), {**buffers, a: summed}, vector, sizes)
        if total >= 0:
            buffers[total].copy_(summed)

    def activate(self, rest: Any, buffers: Any, *_: Any) -> None:
        x, y, activation = rest
        buffers[y].copy_(ACTIVATIONS[activation](buffers[x]))

    def gate(self, rest: Any, buffers: Any, *_: Any) -> None:
        g, u, y, activation = rest
        buffers[y].copy_(ACTIVATIONS[activation](buffers[g]) * buffers[u])
