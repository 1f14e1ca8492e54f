"""accelerate: measures which layers of a pruned model are faster packed, and swaps those."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import torch
from torch import nn

from sparsam.torch import fusion, timing
from sparsam.torch.acceleration_report import AccelerationReport, LayerRow
from sparsam.torch.candidates import Candidate, candidates, is_convolution, pack, places
from sparsam.torch.exchange import Exchange, restore, settle
from sparsam.torch.memory import parameter_bytes, release
from sparsam.torch.modules import SparseLayer, is_transposed
from sparsam.torch.session import Session, as_examples, difference
from sparsam.torch.weight import DTYPES

__all__ = ["accelerate", "restore"]

_ROWS = (1, 16, 128)  # batches that a linear layer is timed with where there are no examples
# How far outputs may be from those of the dense model, relative to the largest: by fusing activations, which
# changes the order of roundings only, and by all of it; with float32 values, and with narrower ones.
_FUSED, _FUSED_NARROW = 1e-4, 2e-2
_WHOLE, _WHOLE_NARROW = 1e-3, 1e-1


def accelerate(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    dtype: torch.dtype | None = None,
    min_gain: float = 1.05,
) -> AccelerationReport:
    """Swaps the layers of a pruned model that are faster packed, in place, and prints what that brought.

    Linear (and Hugging Face's Conv1D), Conv1d and Conv2d layers with at least a tenth of zeros are tried,
    each within the model, in turn with the dense layer. After a swapped layer, an activation module (ReLU,
    GELU exact or by tanh, SiLU) is computed by the layer itself where a run shows that it gets every output
    of the layer and nothing else does; functions called in `forward` stay as they are. In the end the whole
    model is timed; where it gained nothing, everything is put back.

    The model runs without gradients and in eval mode; afterwards training flags, buffers and the random state
    are as before. Packed layers are for inference (`restore` undoes it all). The memory of a dense weight is
    freed if it can be unpacked again exactly and nothing else holds its Parameter, an optimizer say. Call it
    before `torch.compile`.

    Args:
        model: A module that holds such layers, on the CPU. By whatever means it was pruned, what counts is the
            zeros; `torch.nn.utils.prune` and parametrizations may still be on.
        example_inputs: What it will be called with: a tensor, a tuple of arguments, a mapping of keyword
            arguments, or a list of several such examples, which count alike. What is not among them, another
            branch of `forward` say, is not checked. None: linear layers are timed alone with 1, 16 and 128
            rows, convolutions are left, activations are fused in `nn.Sequential` only.
        dtype: What to store the weights as: `torch.bfloat16` halves them, and rounds; None keeps them.
        min_gain: How many times faster than the dense layer a packed one must be.

    Returns:
        The report that was printed.

    Raises:
        TypeError: An argument is of the wrong type; the model is a bare layer, compiled or scripted.
        ValueError: `min_gain` or `dtype` is out of range; there are no examples in a list.
    """
    _check(model, dtype, min_gain)
    examples = None if example_inputs is None else as_examples(example_inputs)
    with torch.inference_mode(False), torch.no_grad():
        work = _Work(model, dtype, min_gain)
        try:
            if examples is None:
                work.by_rows()
            else:
                with Session(model, examples) as session:
                    work.by_examples(session)
        except BaseException:
            work.exchange.remove()
            raise
        report = work.finish()
    print(report)  # noqa: T201 - the proof is part of what it does
    return report


class _Work:
    """One call of `accelerate`."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, min_gain: float) -> None:
        self.model = model
        self.dtype = dtype
        self.min_gain = min_gain
        found, self.rows = candidates(model)
        self.candidates = {candidate.name: candidate for candidate in found}
        self.order = [name for name, _ in model.named_modules()]
        self.where = places(model)
        self.exchange = Exchange(model, self.where)
        self.weights_before = parameter_bytes(model)
        self.inputs: dict[str, Counter[Any]] = {}
        self.times: dict[str, tuple[float, float]] = {}
        self.before: float | None = None
        self.after: float | None = None
        self.difference: float | None = None
        self.summary = ""
        self.interruptions = timing.Interruptions()

    def by_rows(self) -> None:
        """Times linear layers alone."""
        for name, candidate in list(self.candidates.items()):
            if is_convolution(candidate.layer):
                self._leave(name, "needs example_inputs")
        self._pack()
        for name, layer in self.exchange.layers.items():
            weight: Any = layer.original.weight
            width = weight.shape[0 if is_transposed(layer.original) else 1]
            pairs = [timing.compare(layer, torch.randn(rows, width, dtype=weight.dtype)) for rows in _ROWS]
            self.inputs[name] = Counter({(rows, width): 1 for rows in _ROWS})
            dense, sparse = (
                math.exp(sum(map(math.log, times)) / len(_ROWS)) for times in zip(*pairs, strict=True)
            )
            self.times[name] = (dense, sparse)
        self._decide()
        if self.exchange.layers:
            self.exchange.install()
            self.exchange.fusions = fusion.find_in_sequences(self.model, self.exchange.layers, self.where)
            self.exchange.install()

    def by_examples(self, session: Session) -> None:
        """Times layers within the model, fuses activations, and times the whole."""
        settle(self.model, everywhere=True)
        layers = {name: candidate.layer for name, candidate in self.candidates.items()}
        reference, self.inputs = session.inputs(layers)
        settle(self.model)
        for name, seen in self.inputs.items():
            if not seen:
                self._leave(name, "not called with the example inputs")
            elif None in seen:
                self._leave(name, "called with something else than one plain tensor")
        self._pack()
        if self.exchange.layers:
            self._drop_strays(session)
        if self.exchange.layers:
            self.times = timing.layer_times(self.model, session, self.exchange)
        self._decide()
        if not self.exchange.layers:
            self.before = self.after = sum(session.seconds())
            return
        self.exchange.install()
        swapped = session.outputs()
        self._fuse(session, swapped)
        self.before, self.after = timing.model_times(session, self.exchange)
        self.difference = difference(session.outputs(), reference)
        narrow = self.dtype not in {None, torch.float32} or self._narrow()
        if self.difference is not None and self.difference > (_WHOLE_NARROW if narrow else _WHOLE):
            self._undo(f"the outputs would differ by {self.difference:.1e} of the largest")
        elif self.after >= self.before:
            self._undo(f"the model would take {1e3 * self.after:,.2f} ms")

    def finish(self) -> AccelerationReport:
        """Frees memory and says what was done."""
        swapped = self.exchange.layers
        for layer in swapped.values():
            layer.training = layer.original.training
        for fused in self.exchange.fusions:
            fused.replacement.training = fused.replacement.original.training
        release(self.model, list(swapped.values()))
        for name, layer in swapped.items():
            self.rows[name] = self._row(name, layer)
        summary = self.summary or (
            f"{len(swapped)} of {len(self.rows)} layers swapped"
            if swapped
            else f"nothing swapped: no layer is {self.min_gain:g} times faster packed"
        )
        return AccelerationReport(
            tuple(self.rows[name] for name in self.order if name in self.rows),
            None if self.before is None else 1e3 * self.before,
            None if self.after is None else 1e3 * self.after,
            self.weights_before,
            parameter_bytes(self.model),
            self.difference,
            self.interruptions.many(),
            summary,
        )

    def _pack(self) -> None:
        self.exchange.layers = pack(list(self.candidates.values()), self.dtype)

    def _drop_strays(self, session: Session) -> None:
        """Leaves the layers that the model also reaches by other ways than its tree of modules."""
        self.exchange.install()
        originals = {name: layer.original for name, layer in self.exchange.layers.items()}
        _, seen = session.inputs(originals)
        for name, calls in seen.items():
            if calls:
                self._leave(name, "also called through a reference outside the tree of modules")

    def _decide(self) -> None:
        for name, (dense, sparse) in self.times.items():
            if dense < self.min_gain * sparse:
                self._leave(name, f"gain under {self.min_gain:g}")
        settle(self.model)

    def _fuse(self, session: Session, swapped: list[Any]) -> None:
        """Fuses the activations that leave the outputs as they are."""
        tolerance = _FUSED_NARROW if self._narrow() else _FUSED
        found = fusion.find(self.model, session, self.exchange.layers, self.where)
        groups = [found] if len(found) < 2 else [found, *([one] for one in found)]
        for group in groups:
            for one in group:
                one.install()
            apart = difference(session.outputs(), swapped)
            if apart is not None and apart <= tolerance:
                self.exchange.fusions += group
                if group is found:
                    return
            else:
                for one in group:
                    one.remove()

    def _narrow(self) -> bool:
        """Whether some layer computes with less than float32."""
        autocast = torch.is_autocast_enabled("cpu")
        return autocast or any(layer.packed.dtype != torch.float32 for layer in self.exchange.layers.values())

    def _undo(self, why: str) -> None:
        count = len(self.exchange.layers)
        self.exchange.remove()
        self.exchange.fusions = []
        for name in list(self.exchange.layers):
            self._leave(name, "faster by itself, but see below")
        self.after = self.before
        self.difference = None
        self.summary = f"nothing swapped: with the {count} layers that are faster by themselves, {why}"

    def _leave(self, name: str, reason: str) -> None:
        layer = self.exchange.drop(name) if name in self.exchange.layers else None
        row = self.candidates[name].row(reason) if layer is None else self._row(name, layer)
        self.rows[name] = dataclasses.replace(
            row, reason=reason, swapped=False, activation=None, inputs=self._shapes(name)
        )
        del self.candidates[name]

    def _row(self, name: str, layer: SparseLayer) -> LayerRow:
        candidate: Candidate = self.candidates[name]
        dense, sparse = self.times.get(name, (None, None))
        return dataclasses.replace(
            candidate.row(),
            shape=layer.packed.shape,
            pattern=str(layer.packed.pattern),
            inputs=self._shapes(name),
            kernel="/".join(layer.packed.kernels),
            dense_ms=None if dense is None else 1e3 * dense,
            sparse_ms=None if sparse is None else 1e3 * sparse,
            activation=layer.activation,
            swapped=True,
        )

    def _shapes(self, name: str) -> tuple[tuple[tuple[int, ...], int], ...]:
        seen = self.inputs.get(name, Counter())
        return tuple((shape, calls) for shape, calls in seen.items() if shape is not None)


def _check(model: object, dtype: object, min_gain: object) -> None:
    if not isinstance(model, nn.Module):
        msg = f"model: expected a torch.nn.Module; got {type(model).__name__}"
        raise TypeError(msg)
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule) or name == "OptimizedModule":
        msg = (
            f"model is a {name}: expected one that is not compiled yet; accelerate it first, then compile it"
        )
        raise TypeError(msg)
    if isinstance(model, (nn.Linear, nn.Conv1d, nn.Conv2d, SparseLayer)) or is_transposed(model):
        msg = (
            f"model is a bare {name}, which cannot be replaced from within: wrap it in "
            "torch.nn.Sequential(layer), or use SparseLinear(layer) or SparseConv2d(layer)"
        )
        raise TypeError(msg)
    if dtype is not None and dtype not in DTYPES:
        msg = f"dtype={dtype!r}: expected None or one of {', '.join(map(str, DTYPES))}"
        raise ValueError(msg)
    if isinstance(min_gain, bool) or not isinstance(min_gain, (int, float)) or not 0 < min_gain < math.inf:
        msg = f"min_gain={min_gain!r}: expected a number above 0, 1.05 for 5 % faster"
        raise ValueError(msg)
