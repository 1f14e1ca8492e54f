"""accelerate: measures which layers of a pruned model are faster packed, and swaps those."""

from __future__ import annotations

import math
from typing import Any

from torch.nn.parameter import is_lazy

import torch
from sparsam.torch.acceleration.model_runner import ModelRunner, as_examples
from sparsam.torch.acceleration.plan import AccelerationPlan
from sparsam.torch.acceleration.report import AccelerationReport
from sparsam.torch.layers.modules import SparseLayer, is_transposed
from sparsam.torch.layers.packed_weight import DTYPES
from torch import nn

__all__ = ["accelerate"]


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
        model: A module that holds such layers, on the CPU. By whatever means it was pruned, what counts is
            the zeros; `torch.nn.utils.prune` and parametrizations may still be on.
        example_inputs: What it will be called with: a tensor, a tuple of arguments, a mapping of keyword
            arguments, or a list of several such examples, which count alike. What is not among them (another
            branch of `forward`, say) is not checked. None: linear layers are timed alone with 1, 16 and 128
            rows, convolutions are left, activations are fused in `nn.Sequential` only.
        dtype: What to store the weights as: `torch.bfloat16` halves them, and rounds; None keeps them.
        min_gain: How many times faster than the dense layer a packed one must be.

    Returns:
        The report that was printed.

    Raises:
        TypeError: An argument is of the wrong type; the model is a bare layer, compiled or scripted.
        ValueError: `min_gain` or `dtype` is out of range; there are no examples in a list; a lazy layer has
            no shape yet.
    """
    _check(model, dtype, min_gain)
    examples = None if example_inputs is None else as_examples(example_inputs)
    with torch.inference_mode(False), torch.no_grad():
        plan = AccelerationPlan(model, dtype, min_gain)
        try:
            if examples is None:
                plan.by_rows()
            else:
                with ModelRunner(model, examples) as runner:
                    plan.by_examples(runner)
            report = plan.finish()
        except BaseException:
            plan.undo()
            raise
    print(report)  # noqa: T201 - the proof is part of what it does
    return report


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
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        msg = f"{lazy[0]} has no shape yet: expected a model that ran before; call it once before"
        raise ValueError(msg)
    if dtype is not None and dtype not in DTYPES:
        msg = f"dtype={dtype!r}: expected None or one of {', '.join(map(str, DTYPES))}"
        raise ValueError(msg)
    if isinstance(min_gain, bool) or not isinstance(min_gain, (int, float)) or not 0 < min_gain < math.inf:
        msg = f"min_gain={min_gain!r}: expected a number above 0, 1.05 for 5 % faster"
        raise ValueError(msg)
