"""The forward of a decoder layer for one position: steps, `update` of the cache, attention, more steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import functional

import torch
from sparsam import _core
from sparsam.torch.fused import caching, peephole, results
from sparsam.torch.fused.fused_forward import FusedForward, Ready, scratch
from sparsam.torch.fused.program import Program
from sparsam.torch.layers.products import is_plain
from torch import Tensor, is_grad_enabled, nn

__all__ = ["DecodingForward"]

_LONGEST = 1024  # keys of a head that are transposed in the L2 cache
_LANES = 16  # the core's attention has heads of a multiple of these


class DecodingForward(FusedForward):
    """What a decoder layer computes with when it is called with a cache and one position of each sequence."""

    def _ready(self, program: Program) -> Ready:
        return Ready(program) if program.cut is None else _Decoding(self.module, program)


class _Updated:
    """A cache that was updated already."""

    def __init__(self, keys: Any, values: Any) -> None:
        self._all = keys, values

    def update(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        """All keys and values."""
        return self._all


def _is_usual(x: Any) -> bool:
    """Whether the numbers of keys or values can be read, and have no gradient."""
    usual = type(x) is Tensor and x.dtype is torch.float32 and x.is_cpu and is_plain(x)
    return usual and not (x.requires_grad and is_grad_enabled())


class _Decoding(Ready):
    """A program that is cut where the cache is updated."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        super().__init__(program)
        self._module: Any = module
        assert program.cut is not None
        self._cut = program.cut
        at = next(i for i, step in enumerate(program.steps) if step[0] == "cached")
        self._before, self._after = program.steps[:at], program.steps[at + 1 :]
        _, self._query, self._attended, self._groups, self._scale = program.steps[at]
        written = {step[i] for step in self._before for i in peephole.WRITES[step[0]]}
        read = {step[i] for step in self._after for i in peephole.READS[step[0]]}
        new = {self._query, self._cut.keys, self._cut.values}
        # What the first steps leave to the others, or to the caller.
        self._left = tuple(sorted(written & (read | new | {*self._results}) - {-1}))
        self._made_after = tuple(one for one in self._results if one not in self._left)

    def rows(self, values: Sequence[Any]) -> list[Tensor] | None:
        """The tensors of rows among the arguments, with the angles; None if the core cannot read them."""
        found = super().rows(values)
        if found is None or found[0].shape[1] != 1 or not caching.is_cache(values[self._cut.cache]):
            return None
        if self._cut.angles < 0:
            return found
        angles = values[self._cut.angles]
        if len(angles) != 2:
            return None
        for one, buffer in zip(angles, (self._cut.cosines, self._cut.sines), strict=True):
            if type(one) is not Tensor or one.dtype is not torch.float32 or not one.is_cpu:
                return None
            wanted = (found[0].shape[0], 1, self.program.widths[buffer])
            if one.ndim != 3 or one.shape[0] not in {1, wanted[0]} or one.shape[1:] != wanted[1:]:
                return None
            if not is_plain(one) or one.requires_grad:
                return None
            found.append(one.expand(wanted).contiguous())
        return found

    def run(self, rows: Sequence[Tensor], values: Sequence[Any]) -> Any:
        """What the layer returns; NotImplemented if the core does not read a vector."""
        addresses = self._vectors.addresses()
        if addresses is None:
            return NotImplemented
        cut, widths = self._cut, self.program.widths
        first = rows[0]
        count = first.shape[0]
        steps, rest = self._made(count)
        inputs = [one[1] for one in self._inputs]
        if cut.angles >= 0:
            inputs += [cut.cosines, cut.sines]
        given = [(buffer, x.data_ptr()) for buffer, x in zip(inputs, rows, strict=True)]
        made = {buffer: first.new_empty((count, 1, widths[buffer])) for buffer in self._left}
        given += [(buffer, y.data_ptr()) for buffer, y in made.items()]
        memory = scratch(max(steps.scratch(count, 1), rest.scratch(count, 1)))
        room = memory.data_ptr(), memory.numel()
        steps.run(count, 1, given, addresses, None, *room)

        cache = values[cut.cache]
        new = (made[one].view(count, cut.heads, 1, -1) for one in (cut.keys, cut.values))
        args = [caching.rebuild(one, values) for one in cut.args]
        kwargs = {name: caching.rebuild(one, values) for name, one in cut.kwargs}
        keys, past = cache.update(*new, *args, **kwargs)
        if not all(map(_is_usual, (keys, past))):
            return self._own(values, keys, past)
        attended = self._attend(made[self._query], keys, past)

        made |= {buffer: first.new_empty((count, 1, widths[buffer])) for buffer in self._made_after}
        given += [(buffer, made[buffer].data_ptr()) for buffer in self._made_after]
        given.append((self._attended, attended.data_ptr()))
        rest.run(count, 1, given, addresses, None, *room)
        return results.build(self.program.returns, made)

    def _make(self, count: int) -> Any:
        """The steps before the cache is updated, and those after it."""
        return self._compiled(self._before, count), self._compiled(self._after, count)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention over all positions, (sequences, 1, width)."""
        count, heads = query.shape[0], self._groups
        shape, depth = keys.shape, query.shape[2] // heads
        groups = self._cut.heads
        if self._core_attends(query, keys, values, depth):
            found = torch.empty_like(query)
            of_keys, of_values = ((one.stride(1), 0, one.stride(2)) for one in (keys, values))
            together = heads // groups  # queries of one key: rows of one head for the core
            of_query = (together * depth, 0, depth)
            _core.attention_at(
                (count * groups, 1, together, shape[2], depth),
                query.data_ptr(),
                of_query,
                keys.data_ptr(),
                of_keys,
                values.data_ptr(),
                of_values,
                0,
                False,
                (0, 0, 0),
                self._scale,
                found.data_ptr(),
            )
            return found
        by_heads = query.view(count, heads, 1, depth)
        attended = functional.scaled_dot_product_attention(
            by_heads, keys, values, scale=self._scale, enable_gqa=heads != groups
        )
        return attended.contiguous().view(query.shape)

    def _own(self, values: Sequence[Any], keys: Any, past: Any) -> Any:
        """What the layer itself returns, with the cache as it is now."""
        call, cache = self.program.call, _Updated(keys, past)
        given = [cache if i == self._cut.cache else value for i, value in enumerate(values)]
        count = len(call.positional)
        named = dict(zip((name for name, _ in call.keywords), given[count:], strict=True))
        return type(self._module).forward(self._module, *given[:count], **named)

    def _core_attends(self, query: Tensor, keys: Tensor, values: Tensor, depth: int) -> bool:
        """Whether keys and values lie in memory as the core reads them."""
        shape = (query.shape[0], self._cut.heads, keys.shape[2] if keys.ndim == 4 else 0, depth)
        if depth % _LANES or not 0 < shape[2] <= _LONGEST:
            return False
        for one in (keys, values):
            if one.shape != shape or one.stride(3) != 1:
                return False
            if shape[0] > 1 and one.stride(0) != shape[1] * one.stride(1):
                return False
        return True
