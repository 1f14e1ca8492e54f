"""From a module and a form of its calls to the list of steps that computes the same."""

from __future__ import annotations

from typing import Any

import torch
from sparsam.torch.fused import peephole, results
from sparsam.torch.fused.calls import Call
from sparsam.torch.fused.decoding import DECODING, CacheRecord
from sparsam.torch.fused.functions import UNDERSTOOD, read
from sparsam.torch.fused.program import Part, Program, Step, Vector
from sparsam.torch.fused.tracing import Mask, NotUnderstood, Other, Rows, Trace, Tracer, places, refuse
from torch import Tensor, nn

__all__ = ["lower"]

_VECTORS = {"layer_norm": 3, "rms_norm": 3, "add_layer_norm": 5, "add_rms_norm": 5}  # where steps have these


def lower(module: nn.Module, call: Call) -> Program | None:
    """The steps of a module in eval mode; None where it computes something else than steps.

    Args:
        module: The module, with packed weights. Its own `forward` runs, on random numbers.
        call: The form of the call.
    """
    found: Program | None = None
    for sizes in call.sizes:
        try:
            one = _follow(module, call, sizes)
        except NotUnderstood:
            return None
        except Exception:  # whatever the module's code makes of such arguments
            return None
        if found is not None and not found.same(one):
            return None
        found = one
    return found


def _follow(module: nn.Module, call: Call, sizes: tuple[int, int]) -> Program:
    """The steps of one call with rows of these sizes."""
    lead = sizes[-1:] if call.axes == 2 else (*sizes, *(2,) * (call.axes - 3))
    args, kwargs = call.example(lead)
    owned = {id(p): p for one in module.modules() for p in one._parameters.values() if p is not None}
    trace = Trace(owned, *(sizes if call.axes == 3 else (0, 0)))
    values = (*args, *kwargs.values())
    inputs = [
        (i, buffer)
        for i, (slot, value) in enumerate(zip(call.slots, values, strict=True))
        if (buffer := _know(trace, slot.kind, i, value)) is not None
    ]
    record = CacheRecord(trace, call, values) if call.cached else None
    forward: Any = type(module).forward
    with Tracer(trace, DECODING if call.cached else UNDERSTOOD, read), torch.no_grad():
        if record is not None:
            args, kwargs = record.given(args, kwargs)
        returned = forward(module, *args, **kwargs)
    described = results.describe(returned, lambda tensor: _output(trace, tensor, lead))
    outputs = tuple(results.buffers(described))
    given = {buffer for _, buffer in inputs}
    if not outputs or any(one in given for one in outputs) or len({*outputs}) < len(outputs):
        refuse("no result")
    wanted = outputs if record is None else (*outputs, *record.wanted())
    return _compact(trace, call, peephole.shortened(trace.steps, wanted), inputs, described, record)


def _know(trace: Trace, kind: str, argument: int, value: Any) -> int | None:
    """Notes an argument; the buffer of rows, None for others."""
    if kind == "rows":
        buffer = trace.buffer(value.shape[-1])
        numbers = torch.arange(value.shape[:-1].numel()).view(value.shape[:-1])
        trace.know(value, Rows(buffer, places(numbers, value.shape[-1])))
        return buffer
    if kind == "mask":
        trace.know(value, Mask(argument, torch.arange(value.numel()).view(value.shape)))
    elif kind == "other":
        trace.know(value, Other())
    return None


def _output(trace: Trace, tensor: Tensor, lead: tuple[int, ...]) -> int:
    """The buffer of a result."""
    buffer, rows = trace.rows(tensor)
    in_order = torch.arange(rows.numel()).view(lead)
    if rows.shape != lead or not torch.equal(rows, in_order) or not tensor.is_contiguous():
        refuse("a result in another order")
    return buffer


def _compact(
    trace: Trace,
    call: Call,
    steps: list[Step],
    inputs: list[tuple[int, int]],
    described: Any,
    record: CacheRecord | None,
) -> Program:
    """The program, without the buffers, matrices and vectors that no step needs any more."""
    used = {step[i] for step in steps for i in (*peephole.READS[step[0]], *peephole.WRITES[step[0]])}
    buffers = {old: new for new, old in enumerate(sorted(used - {-1}))}
    parts: list[Part] = []
    vectors: list[Vector] = []

    def vector(old: int) -> int:
        if old < 0:
            return -1
        vectors.append(trace.vectors[old])
        return len(vectors) - 1

    made: list[Step] = []
    for old in steps:
        step = list(peephole.renumbered(old, buffers))
        if step[0] == "linear":
            parts.append(trace.parts[step[1]])
            step[1], step[4] = len(parts) - 1, vector(step[4])
        elif step[0].endswith("norm"):
            for i in range(_VECTORS[step[0]], len(step) - 1):
                step[i] = vector(step[i])
        made.append(tuple(step))
    masked = any(step[0] == "attention" and step[7] for step in made)
    return Program(
        call,
        tuple(trace.widths[old] for old in buffers),
        tuple(made),
        tuple(parts),
        tuple(vectors),
        tuple((i, buffers[b]) for i, b in inputs if b in buffers),
        trace.mask if masked else -1,
        trace.heads if masked else 0,
        results.renamed(described, buffers),
        None if record is None else record.cut(buffers),
    )
