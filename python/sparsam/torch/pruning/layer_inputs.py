"""The inputs of a model's weights when they are used, as rows for statistics, for every kind of layer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch.nn.functional as F
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

import torch
from sparsam.torch.pruning.prunable import PrunableWeight
from torch import Tensor, nn

__all__ = ["Inputs", "Visitor", "watch"]

Inputs = tuple[Tensor, ...]


class Visitor(Protocol):
    """The protocol of objects that are notified when weights are used."""

    def before(self, name: str, inputs: Callable[[], Inputs], again: Callable[[], Tensor]) -> None:
        """A weight is about to be used.

        Args:
            name: The weight's name.
            inputs: The inputs it will be multiplied with; several if its rows have separate inputs.
            again: Computes the layer's output with the weight's current values.
        """

    def after(self, name: str, output: Callable[[], Tensor | None]) -> None:
        """A weight was used; `output` is None if it is not known."""


def watch(
    model: nn.Module, weights: dict[str, PrunableWeight], visitor: Callable[[], Visitor | None]
) -> None:
    """Registers hooks that notify a visitor of each use of the weights.

    Args:
        model: A twin, whose modules get the hooks. The out_proj of an `nn.MultiheadAttention` is not called,
            so it is the attention that is watched.
        weights: The weights to watch.
        visitor: Returns the visitor of the current thread; None: nobody is notified.
    """
    found: dict[nn.Module, list[PrunableWeight]] = {}
    for weight in weights.values():
        found.setdefault(weight.module, []).append(weight)
    for module, own in found.items():
        if own[0].kind in ("linear", "convolution"):
            _watch_plain(module, own[0], visitor)
        elif own[0].kind == "recurrent":
            _watch_recurrent(module, own, visitor)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            projections = {weight.attribute: weight for weight in found.get(module, [])}
            out = next(iter(found.get(module.out_proj, [])), None)
            if projections or out is not None:
                _watch_attention(module, projections, out, visitor)


def _watch_plain(module: nn.Module, weight: PrunableWeight, visitor: Callable[[], Visitor | None]) -> None:
    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if (found := visitor()) is not None:
            x = args[0] if args else next(iter(kwargs.values()))
            found.before(weight.name, lambda: (x,), lambda: module.forward(*args, **kwargs))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        if (found := visitor()) is not None:
            found.after(weight.name, lambda: output)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


def _watch_attention(
    module: nn.MultiheadAttention,
    own: dict[str, PrunableWeight],
    out: PrunableWeight | None,
    visitor: Callable[[], Visitor | None],
) -> None:
    signature = inspect.signature(module.forward)

    def before(module: nn.MultiheadAttention, args: Any, kwargs: Any) -> None:
        found = visitor()
        if found is None:
            return
        bound = signature.bind(*args, **kwargs).arguments
        q, k, v = bound["query"], bound["key"], bound["value"]
        every: dict[str, Inputs] = {"q_proj_weight": (q,), "k_proj_weight": (k,), "v_proj_weight": (v,)}
        every["in_proj_weight"] = (q,) if q is k is v else (q, k, v)
        for attribute, weight in own.items():
            inputs = every[attribute]

            def project(weight: PrunableWeight = weight, inputs: Inputs = inputs) -> Tensor:
                return _projected(weight, inputs)

            found.before(weight.name, lambda inputs=inputs: inputs, project)  # type: ignore[misc]
            found.after(weight.name, project)
        if out is not None:
            cache: list[Tensor] = []

            def heads() -> Inputs:
                if not cache:
                    cache.append(_heads(module, args, kwargs))
                return (cache[0],)

            projection: Any = module.out_proj
            found.before(out.name, heads, lambda: F.linear(heads()[0], projection.weight, projection.bias))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        if (found := visitor()) is not None and out is not None:
            found.after(out.name, lambda: output[0])

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


def _projected(weight: PrunableWeight, inputs: Inputs) -> Tensor:
    """The output of an attention's input projection, concatenated where queries, keys and values differ."""
    module: Any = weight.module
    matrix, bias = weight.parameter, module.in_proj_bias
    if weight.attribute != "in_proj_weight":
        size = len(matrix)
        start = ("q_proj_weight", "k_proj_weight", "v_proj_weight").index(weight.attribute) * size
        bias = None if bias is None else bias[start : start + size]
    matrices = matrix.chunk(len(inputs))
    biases = (None,) * len(inputs) if bias is None else bias.chunk(len(inputs))
    if len(inputs) == 1:
        return F.linear(inputs[0], matrix, bias)
    outputs = [F.linear(x, w, b) for x, w, b in zip(inputs, matrices, biases, strict=True)]
    rows = max(output.numel() // output.shape[-1] for output in outputs)
    flat = torch.full((rows, sum(output.shape[-1] for output in outputs)), 0.0)
    start = 0
    for output in outputs:
        part = output.reshape(-1, output.shape[-1])
        flat[: len(part), start : start + part.shape[1]] = part
        start += part.shape[1]
    return flat


def _heads(module: nn.MultiheadAttention, args: Any, kwargs: Any) -> Tensor:
    """The heads' outputs, which are out_proj's inputs: the module's output with an identity as out_proj."""
    twin = copy.copy(module)  # other threads may be in the module
    projection: Any = copy.copy(module.out_proj)
    eye = torch.eye(module.embed_dim, dtype=projection.weight.dtype)
    projection._parameters = {"weight": nn.Parameter(eye, requires_grad=False), "bias": None}
    twin._modules = {**module._modules, "out_proj": projection}
    result: Tensor = twin.forward(*args, **kwargs)[0]
    return result


def _watch_recurrent(
    module: nn.Module, weights: list[PrunableWeight], visitor: Callable[[], Visitor | None]
) -> None:
    names = {weight.attribute: weight.name for weight in weights}

    def before(module: Any, args: Any, kwargs: Any) -> None:
        found = visitor()
        if found is None:
            return
        calls = _cell_inputs if isinstance(module, nn.RNNCellBase) else _layer_inputs
        for attribute, inputs in calls(module, *args, **kwargs):
            if attribute in names:
                found.before(names[attribute], inputs, lambda: torch.empty(0))

    module.register_forward_pre_hook(before, with_kwargs=True)


def _cell_inputs(
    module: nn.RNNCellBase,
    input: Tensor,
    hx: Any = None,
) -> Iterator[tuple[str, Callable[[], Inputs]]]:
    state = hx[0] if isinstance(hx, tuple) else hx
    yield "weight_ih", lambda: (input,)
    zeros = torch.zeros(*input.shape[:-1], module.hidden_size, dtype=input.dtype)
    yield "weight_hh", lambda: (zeros if state is None else state,)


def _layer_inputs(
    module: Any,
    input: Any,
    hx: Any = None,
) -> Iterator[tuple[str, Callable[[], Inputs]]]:
    """Yields the inputs of each matrix of a recurrent module; later layers use the current earlier ones."""
    ways = 2 if module.bidirectional else 1
    x = input
    for layer in range(module.num_layers):
        ends = [f"_l{layer}{end}" for end in ("", "_reverse")[:ways]]
        for end in ends:
            yield f"weight_ih{end}", lambda x=x: (_valid(x),)  # type: ignore[misc]
        for way, end in enumerate(ends):

            def hidden(x: Any = x, way: int = way, layer: int = layer) -> Inputs:
                return (_previous_states(module, layer, x, hx, way),)

            yield f"weight_hh{end}", hidden
        x = _one_layer(module, layer, x, hx)


def _one_layer(module: Any, layer: int, x: Any, hx: Any) -> Any:
    """The output of one layer of a recurrent module."""
    data = x.data if isinstance(x, PackedSequence) else x
    single = type(module)(
        data.shape[-1],
        module.hidden_size,
        bias=module.bias,
        batch_first=module.batch_first,
        bidirectional=module.bidirectional,
        **({"proj_size": module.proj_size} if getattr(module, "proj_size", 0) else {}),
        **({"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}),
    ).to(data.dtype)
    for name in list(single._parameters):
        single._parameters[name] = module._parameters[name.replace("_l0", f"_l{layer}")]
    ways = 2 if module.bidirectional else 1
    part = slice(layer * ways, (layer + 1) * ways)
    own = None if hx is None else tuple(h[part] for h in hx) if isinstance(hx, tuple) else hx[part]
    single._flat_weights = [single._parameters[name] for name in single._flat_weights_names]
    return single.eval()(x, own)[0]


def _previous_states(module: Any, layer: int, x: Any, hx: Any, way: int) -> Tensor:
    """The hidden states that each step of one direction starts from, (n, hidden)."""
    output = _one_layer(module, layer, x, hx)
    lengths = None
    if isinstance(output, PackedSequence):
        output, lengths = pad_packed_sequence(output, batch_first=True)
    elif output.ndim == 2:
        output = output[None]
    elif not module.batch_first:
        output = output.transpose(0, 1)
    size = module.proj_size or module.hidden_size if hasattr(module, "proj_size") else module.hidden_size
    states = output[..., way * size : (way + 1) * size]
    ways = 2 if module.bidirectional else 1
    start = hx[0] if isinstance(hx, tuple) else hx
    first = torch.zeros(len(states), 1, size, dtype=states.dtype)
    if start is not None:
        index = layer * ways + way
        chosen = start[index]
        first = (chosen[None] if chosen.ndim == 1 else chosen)[:, None]
    if lengths is not None:
        steps = [states[i, : int(n)] for i, n in enumerate(lengths)]
        parts = [
            torch.cat([first[i], part[:-1]] if way == 0 else [part[1:], first[i]])
            for i, part in enumerate(steps)
        ]
        return torch.cat(parts)
    order = [first, states[:, :-1]] if way == 0 else [states[:, 1:], first]
    return torch.cat(order, 1).reshape(-1, size)


def _valid(x: Any) -> Tensor:
    """The valid steps of a sequence: a packed one has no padding."""
    data: Tensor = x.data if isinstance(x, PackedSequence) else x
    return data
