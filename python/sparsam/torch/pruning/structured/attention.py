"""Attention heads, found by running the model: which layers are an attention's inputs and output.

Every call of `torch.nn.functional.scaled_dot_product_attention` shows the number of heads and their size. The
linear layers that ran before it inside the same module are its projections, and the next one is that of the
outputs. The heads of a projection are neighbouring rows: (heads, size), or, where one layer makes queries,
keys and values, these three one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparsam.torch.acceleration.model_runner import removed
from sparsam.torch.pruning.structured.layer_slices import input_slices, is_linear, lengths, output_slices
from sparsam.torch.pruning.structured.structures import Attribute, Heads, Member, Structure
from torch import nn

__all__ = ["find_heads"]

# The names that modules use for their numbers of query heads and of key-value heads, for the widths that
# follow from these, and for the queries that share a key; an attribute is changed only if it has the expected
# value.
_QUERY_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "num_q_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_kv")
_WIDTHS = ("all_head_size", "split_size", "inner_dim", "attn_dim", "attention_dim", "q_dim")
_QUERIES_PER_KEY = ("num_key_value_groups", "n_rep", "num_queries_per_kv")


class _Call(NamedTuple):
    """A call of a layer (`heads` None), or of attention (query heads, size, whether the mask has heads)."""

    module: nn.Module
    heads: tuple[int, int, bool] | None = None


def find_heads(
    model: nn.Module, run: Callable[[], object]
) -> tuple[list[Structure], dict[str, str], set[nn.Module]]:
    """Finds the heads of every attention that runs.

    A unit is a head with its rows of the query, key and value projections and its columns of the output
    projection; with grouped queries a key-value head and its query heads; with one key-value head for all
    (multi-query attention) a query head.

    Args:
        model: The model.
        run: Runs it.

    Returns:
        The structures; the name of each attention that cannot lose heads -> why; and the layers that belong
        to some attention.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, Structure] = {}
    refused = {
        name: "nn.MultiheadAttention takes as many heads as make up its width"
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    taken: set[nn.Module] = set()
    calls = _watch(model, run)
    for i, call in enumerate(calls):
        if call.heads is None or names[call.module] in found:
            continue
        inside = set(call.module.modules())
        start = max((j + 1 for j in range(i) if calls[j].heads is not None), default=0)
        before = [earlier.module for earlier in calls[start:i] if earlier.module in inside]
        after = next((later.module for later in calls[i + 1 :] if later.heads is None), None)
        taken.update(before, [after] if after is not None else [])
        name = names[call.module]
        attention = _Attention(names, call.module, before, after, call.heads)
        result = attention.why_not() or attention.structure()
        if isinstance(result, str):
            refused[name] = result
        else:
            found[name] = result
    return list(found.values()), refused, taken


def _watch(model: nn.Module, run: Callable[[], object]) -> list[_Call]:
    """The calls of attention and of layers with parameters, in order."""
    calls: list[_Call] = []
    stack: list[nn.Module] = []

    def enter(module: nn.Module, *_: object) -> None:
        stack.append(module)
        if module._parameters:
            calls.append(_Call(module))

    def leave(*_: object) -> None:
        stack.pop()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is functional.scaled_dot_product_attention and stack:
                given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
                query, mask = given["query"], given.get("attn_mask")
                if query.ndim == 4:
                    masked = mask is not None and mask.ndim == 4 and mask.shape[1] > 1
                    calls.append(_Call(stack[-1], (query.shape[1], query.shape[-1], masked)))
            return func(*args, **kwargs)

    hooks = (
        hook
        for module in model.modules()
        for hook in (
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        )
    )
    with _visible_attention(model), removed(hooks), Watch():
        run()
    return calls


@contextmanager
def _visible_attention(model: nn.Module) -> Iterator[None]:
    """Makes Hugging Face models use PyTorch's attention during the block, if they support it."""
    before: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(module, "_supports_sdpa", False):
            before.setdefault(id(config), (config, config._attn_implementation))
            config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for config, implementation in before.values():
            config._attn_implementation = implementation


@dataclass(frozen=True)
class _Attention:
    """The calls around one attention."""

    names: dict[nn.Module, str]
    module: nn.Module
    before: Sequence[nn.Module]
    after: nn.Module | None
    heads: tuple[int, int, bool]

    @property
    def queries(self) -> int:
        return self.heads[0]

    @property
    def size(self) -> int:
        return self.heads[1]

    @property
    def projections(self) -> list[nn.Module]:
        return [layer for layer in self.before if is_linear(layer)]

    @property
    def keys(self) -> int:
        """The number of key-value heads."""
        if len(self.projections) == 1:
            return (lengths(self.projections[0])[0] // self.size - self.queries) // 2
        return min(lengths(layer)[0] for layer in self.projections) // self.size

    def why_not(self) -> str:
        """Why no head can be removed; "" if some can."""
        if self.heads[2]:
            return "its mask or position bias differs from head to head"
        layers = self.projections
        if self.after is None or not is_linear(self.after):
            return "no linear layer reads its outputs"
        if lengths(self.after)[1] != self.queries * self.size:
            return "the layer that reads its outputs has other inputs than its heads"
        if len(layers) not in {1, 3} or len(set(layers)) != len(layers):
            return f"expected one linear layer before it, or three; got {len(layers)}"
        widths = sorted(lengths(layer)[0] for layer in layers)
        queries, keys = self.queries * self.size, self.keys * self.size
        right = [queries + 2 * keys] if len(layers) == 1 else [keys, keys, queries]
        if widths != right or not keys or self.queries % self.keys:
            return "its projections do not have the widths of its heads"
        others = [layer for layer in self.before if layer not in layers]
        if any(p.shape[-1] in {queries, keys} for layer in others for p in layer.parameters(recurse=False)):
            return "a layer with weights for each head runs between the projections and the attention"
        if self.units == 1:
            return "it has one head"
        return ""

    @property
    def units(self) -> int:
        return self.keys if self.keys > 1 else self.queries

    def structure(self) -> Structure | str:
        """The structure of the heads; or why none can be removed."""
        units, each = self.units, self.queries // self.units
        queries, keys = self.queries * self.size, self.keys * self.size
        wide = _split(queries, units)
        narrow = _split(keys, units) if self.keys > 1 else None
        slices = []
        for layer in self.projections:
            rows: NDArray[np.int64] | None = narrow if self._is_key(layer) else wide
            if len(self.projections) == 1:
                keys_and_values = [] if narrow is None else [narrow + queries, narrow + queries + keys]
                rows = np.concatenate([wide, *keys_and_values], axis=1)
            if rows is not None:
                slices.append(output_slices(self.names[layer], layer, rows))
        slices.append(input_slices(self.names[self.after], self.after, wide))  # type: ignore[index]
        members: list[Member] = []
        attributes: list[Attribute] = []
        for found in slices:
            if isinstance(found, str):
                return found
            members += found[0]
            attributes += found[1]
        heads = Heads(each, 1 if self.keys > 1 else 0, self.size)
        attributes += self._numbers(heads)
        return Structure(self.names[self.module], "heads", units, tuple(members), tuple(attributes), heads)

    def _is_key(self, layer: nn.Module) -> bool:
        return self.keys < self.queries and lengths(layer)[0] == self.keys * self.size

    def _numbers(self, heads: Heads) -> Iterator[Attribute]:
        """The attributes of the attention's module that depend on the number of heads."""
        each = heads.queries
        expected = [(name, self.queries, each) for name in _QUERY_HEADS]
        expected += [(name, self.keys, heads.keys) for name in _KEY_HEADS]
        expected += [(name, self.queries * self.size, each * self.size) for name in _WIDTHS]
        if self.keys == 1:
            expected += [(name, self.queries, each) for name in _QUERIES_PER_KEY]
        for name, value, less in expected:
            if less and vars(self.module).get(name) == value:
                yield Attribute(self.names[self.module], name, less)


def _split(width: int, units: int) -> NDArray[np.int64]:
    """Consecutive indices for each unit, (units, width)."""
    return np.arange(width, dtype=np.int64).reshape(units, -1)
