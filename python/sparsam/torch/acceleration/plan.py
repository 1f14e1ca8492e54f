"""What one call of `accelerate` finds out about a model and does to it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import torch
from sparsam.torch.acceleration import fusion, timing
from sparsam.torch.acceleration.candidates import candidates, is_convolution, pack, places
from sparsam.torch.acceleration.layer_swap import LayerSwap, disable_fast_paths
from sparsam.torch.acceleration.memory import parameter_bytes, release
from sparsam.torch.acceleration.model_runner import ModelRunner, difference
from sparsam.torch.acceleration.report import AccelerationReport, LayerRow
from sparsam.torch.layers.modules import SparseLayer, is_transposed
from torch import Tensor, nn

__all__ = ["AccelerationPlan"]

_DENSE = ("dense",)
_ROWS = (1, 16, 128)  # batches that a linear layer is timed with where there are no examples
# How far outputs may be from those of the dense model, relative to the largest: by fusing activations, which
# changes the order of roundings only, and by all of it; with float32 values, and with narrower ones.
_FUSED, _FUSED_NARROW = 1e-4, 2e-2
_WHOLE, _WHOLE_NARROW = 1e-3, 1e-1
_PADDED = (
    "; nn.TransformerEncoder puts zeros where inputs are padded, but only in its fast path, which packed "
    "layers cannot use: if those do not matter, call torch.backends.mha.set_fastpath_enabled(False) first"
)


class AccelerationPlan:
    """One call of `accelerate`: `by_rows` or `by_examples`, then `finish`; or `undo` at any time."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, min_gain: float) -> None:
        self.model = model
        self.dtype = dtype
        self.min_gain = min_gain
        found, self.rows = candidates(model)
        self.candidates = {candidate.name: candidate for candidate in found}
        self.order = [
            name
            for module, m in model.named_modules()
            for name in (module, *(f"{module}.{own}" for own in m._parameters))
        ]
        self.where = places(model)
        self.exchange = LayerSwap(model, self.where)
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
            inputs = [_draw(rows, width, weight.dtype) for rows in _ROWS]
            pairs = [timing.compare(layer, x) for x in inputs]
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

    def by_examples(self, session: ModelRunner) -> None:
        """Times layers within the model, fuses activations, and times the whole."""
        reference = session.outputs()
        disable_fast_paths(self.model, everywhere=True)
        layers = {name: candidate.layer for name, candidate in self.candidates.items()}
        self.inputs = session.inputs(layers)
        disable_fast_paths(self.model)
        for name, seen in self.inputs.items():
            if not seen:
                self._leave(name, "not called with the example inputs")
            elif None in seen:
                self._leave(name, "called with something else than one plain tensor")
        self._pack()
        if self.exchange.layers:
            self._drop_strays(session)
            self._choose_again(session)
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
            self._leave_all(f"the outputs would differ by {self.difference:.1e} of the largest{self._hint()}")
        elif self.after >= self.before:
            self._leave_all(f"the model would take {1e3 * self.after:,.2f} ms")

    def finish(self) -> AccelerationReport:
        """Frees memory and says what was done."""
        swapped = self.exchange.layers
        for layer in swapped.values():
            layer.training = layer.original.training
        for fused in self.exchange.fusions:
            fused.replacement.training = fused.replacement.original.training
        for name, layer in swapped.items():
            self.rows[name] = self._row(name, layer)
        release(self.model, list(swapped.values()))
        summary = self.summary or (
            f"{len(swapped)} of {len(self.rows)} layers swapped" if swapped else self._nothing()
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

    def _nothing(self) -> str:
        """Why nothing was swapped: the reasons in the rows, the most frequent one first."""
        reasons = Counter(row.reason for row in self.rows.values())
        found = [f"{why} ({n} layer{'s' * (n > 1)})" for why, n in reasons.most_common()]
        return "nothing swapped: " + (
            "; ".join(found) or "the model has no Linear, Conv1D, Conv1d or Conv2d layer"
        )

    def undo(self) -> None:
        """Puts everything back, wherever an error or an interrupt came."""
        self.exchange.remove()
        for layer in self.exchange.layers.values():
            layer.training = layer.original.training
            layer.restored()

    def _pack(self) -> None:
        self.exchange.layers = pack(list(self.candidates.values()), self.dtype)

    def _drop_strays(self, session: ModelRunner) -> None:
        """Leaves the layers that the model also reaches by other ways than its tree of modules."""
        self.exchange.install()
        originals = {name: layer.original for name, layer in self.exchange.layers.items()}
        for name, calls in session.inputs(originals).items():
            if calls:
                self._leave(name, "also called through a reference outside the tree of modules")

    def _choose_again(self, session: ModelRunner) -> None:
        """Lets layers for which dense was chosen choose once more: other work may have disturbed them."""
        if again := [layer for layer in self.exchange.layers.values() if layer.packed.kernels == _DENSE]:
            for layer in again:
                layer.packed.forget()
            session.outputs()

    def _decide(self) -> None:
        for name, (dense, sparse) in self.times.items():
            if self.exchange.layers[name].packed.kernels == _DENSE:
                self._leave(name, "no kernel beats dense")
            elif dense < self.min_gain * sparse:
                self._leave(name, f"gain under {self.min_gain:g}")
        disable_fast_paths(self.model)

    def _fuse(self, session: ModelRunner, swapped: list[Any]) -> None:
        """Fuses the activations that leave the outputs as they are."""
        tolerance = _FUSED_NARROW if self._narrow() else _FUSED
        fusions = self.exchange.fusions
        found = fusion.find(self.model, session, self.exchange.layers, self.where)
        groups = [[one] for one in found]  # tried one by one if all at once are not alike
        for group in [found, *groups] if len(found) > 1 else groups:
            fusions += group
            self.exchange.install()
            apart = difference(session.outputs(), swapped)
            if apart is not None and apart <= tolerance:
                if group is found:
                    return
                continue
            for one in group:
                one.remove()
                fusions.remove(one)

    def _narrow(self) -> bool:
        """Whether some layer computes with less than float32."""
        autocast = torch.is_autocast_enabled("cpu")
        return autocast or any(layer.packed.dtype != torch.float32 for layer in self.exchange.layers.values())

    def _hint(self) -> str:
        padded = any(isinstance(module, nn.TransformerEncoder) for module in self.model.modules())
        return _PADDED if padded else ""

    def _leave_all(self, why: str) -> None:
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
        candidate = self.candidates[name]
        dense, sparse = self.times.get(name, (None, None))
        return dataclasses.replace(
            candidate.row(),
            pattern=str(layer.packed.pattern),
            inputs=self._shapes(name),
            packed_bytes=layer.packed.nbytes,
            kernel="/".join(layer.packed.kernels),
            dense_ms=None if dense is None else 1e3 * dense,
            sparse_ms=None if sparse is None else 1e3 * sparse,
            activation=layer.activation,
            swapped=True,
        )

    def _shapes(self, name: str) -> tuple[tuple[tuple[int, ...], int], ...]:
        seen = self.inputs.get(name, Counter())
        return tuple((shape, calls) for shape, calls in seen.items() if shape is not None)


def _draw(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Some input of a linear layer; the random state stays as it is."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0), device="cpu").to(dtype)
