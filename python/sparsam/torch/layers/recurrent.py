"""Recurrent layers (LSTM, GRU, RNN and their cells) whose weights are packed.

The products with the input are computed for all steps at once; the recurrence is one call of the core.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn import functional

import torch
from sparsam._core import recur_at
from sparsam.torch.layers.products import frozen, is_plain, needs_gradient, refuse
from torch import Tensor

__all__ = ["HANDLERS"]

_GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}


@dataclass(frozen=True)
class _Direction:
    """The weights of one direction of one layer.

    Attributes:
        of_input: W_ih (gates x hidden, in), packed or dense.
        of_state: W_hh (gates x hidden, width), packed.
        input_bias: b_ih (gates x hidden) or None.
        state_bias: b_hh (gates x hidden) or None.
        projection: W_hr (width, hidden), packed, of an LSTM with projections; or None.
    """

    of_input: Tensor
    of_state: Any
    input_bias: Tensor | None = None
    state_bias: Tensor | None = None
    projection: Any = None

    @property
    def can_run(self) -> bool:
        """Whether the weights of the recurrence are packed."""
        stepped = [self.of_state] if self.projection is None else [self.of_state, self.projection]
        return all(getattr(weight, "_content", None) and not weight._views for weight in stepped)


@dataclass(frozen=True)
class _Steps:
    """Sequences step by step.

    Attributes:
        rows: (sum of batches, in): all inputs of the first step, then of the second, and so on.
        batches: The number of sequences in each step, which never increases.
    """

    rows: Tensor
    batches: list[int]


def _layer(name: str) -> Callable[..., Any]:
    """Returns the replacement for `torch.lstm` and the like, which nn.LSTM calls."""

    def run(*args: Any) -> Any:
        if len(args) != 9:
            return NotImplemented
        if isinstance(args[3], bool):
            x, states, weights, biases, layers, dropout, training, both, batch_first = args
            steps_first = x.transpose(0, 1) if batch_first else x
            length, batch = steps_first.shape[:2]
            steps = _Steps(steps_first.reshape(length * batch, x.shape[2]), [batch] * length)
        else:  # of a PackedSequence
            x, batches, states, weights, biases, layers, dropout, training, both = args
            steps, batch_first = _Steps(x, batches.tolist()), None
        states = list(states) if name == "lstm" else [states]
        found = _directions(weights, biases=biases, count=layers * (2 if both else 1))
        if not _may_run(found, x, states):
            return NotImplemented
        y, *after = _stack(name, steps, states, found, both=both, dropout=dropout if training else 0.0)
        if batch_first is not None:
            y = y.reshape(length, batch, y.shape[1])
            y = y.transpose(0, 1) if batch_first else y
        return _watched([y, *after], x, states, found)

    return run


def _cell(name: str) -> Callable[..., Any]:
    """Returns the replacement for `torch.lstm_cell` and the like, which nn.LSTMCell calls."""

    def run(x: Tensor, states: Any, *weights: Any) -> Any:
        states = list(states) if name == "lstm" else [states]
        found = [_Direction(*weights)]
        if not _may_run(found, x, states) or x.ndim != 2:
            return NotImplemented
        steps = _Steps(x, [len(x)])
        _, *after = _stack(name, steps, [state[None] for state in states], found, both=False, dropout=0.0)
        results = _watched([state[0] for state in after], x, states, found)
        return results if name == "lstm" else results[0]

    return run


def _directions(weights: Sequence[Any], *, biases: bool, count: int) -> list[_Direction]:
    each = len(weights) // max(count, 1)
    found = []
    for i in range(count):
        of_input, of_state, *others = weights[i * each : (i + 1) * each]
        pair = others[:2] if biases else [None, None]
        found.append(_Direction(of_input, of_state, *pair, *(others[2:] if biases else others)))
    return found


def _may_run(found: Sequence[_Direction], x: Tensor, states: Sequence[Tensor]) -> bool:
    """Whether the core can compute it; traced and transformed tensors need the dense function."""
    if not all(direction.can_run for direction in found):
        return False
    if is_plain(x) and all(is_plain(state) for state in states):
        return x.dtype in {torch.float32, torch.bfloat16, torch.float16}
    refuse(x)
    return False


def _watched(
    results: Sequence[Tensor], x: Tensor, states: Sequence[Tensor], found: Sequence[_Direction]
) -> tuple[Tensor, ...]:
    """The results, made so that a backward pass through them raises if a gradient is needed."""
    sources = [x, *states]
    for direction in found:
        sources += [b for b in (direction.input_bias, direction.state_bias) if b is not None]
    contents = [direction.of_state._content for direction in found]
    if not torch.is_grad_enabled() or not any(needs_gradient(one, c) for one in sources for c in contents):
        return tuple(results)
    return tuple(frozen(result, *sources) for result in results)


@torch.no_grad()
def _stack(
    name: str,
    steps: _Steps,
    states: Sequence[Tensor],
    found: Sequence[_Direction],
    *,
    both: bool,
    dropout: float,
) -> tuple[Tensor, ...]:
    """All layers: (rows, directions x width), and the states after them, in the dtype of the rows."""
    dtype, each = steps.rows.dtype, 2 if both else 1
    after = [state.float().clone(memory_format=torch.contiguous_format) for state in states]
    rows = steps.rows.float()
    for first in range(0, len(found), each):
        if first and dropout:
            rows = functional.dropout(rows, dropout)
        width = after[0].shape[2]
        y = rows.new_empty(len(rows), each * width)
        for i in range(each):
            own = [state[first + i] for state in after]
            into = y[:, i * width :]
            _recur(name, rows, steps.batches, own, found[first + i], into, backwards=i == 1)
        rows = y
    return rows.to(dtype), *(state.to(dtype) for state in after)


def _recur(
    name: str,
    rows: Tensor,
    batches: list[int],
    states: Sequence[Tensor],
    direction: _Direction,
    y: Tensor,
    *,
    backwards: bool,
) -> None:
    """One direction of one layer; the states become those after it, in place."""
    inputs = functional.linear(
        rows, _as_float(direction.of_input), _as_float(direction.input_bias)
    ).contiguous()
    bias = _as_float(direction.state_bias)
    bias = None if bias is None else bias.contiguous()
    weight, projection = direction.of_state.packed, direction.projection
    projected = None if projection is None else projection.packed
    most = max(batches, default=0)
    _check(name, inputs, states, weight.parts[0], most)
    recur_at(
        weight.parts[0],
        weight.kernel(most),
        None if projected is None else projected.parts[0],
        "" if projected is None else projected.kernel(most),
        name,
        batches,
        backwards,
        inputs.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        states[0].data_ptr(),
        states[1].data_ptr() if name == "lstm" else 0,
        y.data_ptr(),
        y.stride(0),
    )


def _as_float(tensor: Any) -> Any:
    """A dense tensor in float32; packed weights are returned as they are."""
    return tensor if tensor is None or hasattr(tensor, "_content") else tensor.float()


def _check(name: str, inputs: Tensor, states: Sequence[Tensor], weight: Any, most: int) -> None:
    """Raises ValueError if the core would read past the end of a state or an input."""
    hidden = weight.rows // _GATES[name]
    wanted = [(most, weight.cols), (most, hidden)][: len(states)]
    for what, state, shape in zip(("h", "c"), states, wanted, strict=False):
        if tuple(state.shape) != shape:
            msg = (
                f"{what}: expected shape {shape}; got {tuple(state.shape)}; pass one state for each sequence"
            )
            raise ValueError(msg)
    if inputs.shape[1] != weight.rows:
        msg = f"weight_ih: expected {weight.rows} rows; got {inputs.shape[1]}; use those of one layer"
        raise ValueError(msg)


HANDLERS: Mapping[Any, Callable[..., Any]] = {
    torch.lstm: _layer("lstm"),
    torch.gru: _layer("gru"),
    torch.rnn_tanh: _layer("tanh"),
    torch.rnn_relu: _layer("relu"),
    torch.lstm_cell: _cell("lstm"),
    torch.gru_cell: _cell("gru"),
    torch.rnn_tanh_cell: _cell("tanh"),
    torch.rnn_relu_cell: _cell("relu"),
}
