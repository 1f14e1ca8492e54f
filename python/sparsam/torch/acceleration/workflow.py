"""accelerate: observe, pack, measure, decide, install, verify."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, Literal

from torch.nn.parameter import is_lazy

import torch
from sparsam.inputs.messages import say
from sparsam.torch.acceleration import measurement
from sparsam.torch.acceleration.attention import choose_attention
from sparsam.torch.acceleration.candidate_layers import Candidate, candidates
from sparsam.torch.acceleration.decision import Decision, decide
from sparsam.torch.acceleration.fused_modules import choose_fused, fuse_with_slow
from sparsam.torch.acceleration.fusion import fusions
from sparsam.torch.acceleration.installation import LayerSwap
from sparsam.torch.acceleration.measurement import Budget, Times
from sparsam.torch.acceleration.memory import parameter_bytes, release
from sparsam.torch.acceleration.model_runner import ModelRunner, as_examples, difference
from sparsam.torch.acceleration.observation import observe, observe_sequences
from sparsam.torch.acceleration.outcome import Outcome, closing, in_order, rows_of
from sparsam.torch.acceleration.packing import needs_examples, obstacle, pack
from sparsam.torch.acceleration.report import AccelerationReport
from sparsam.torch.acceleration.verification import Gain, fuse, keep_what_gains, try_out
from sparsam.torch.layers.packed_weight import DTYPES, INT4, ROUNDED
from sparsam.torch.layers.packing import is_embedding
from sparsam.torch.transformers_models import announce
from torch import Tensor, nn

__all__ = ["accelerate"]

_SINGLE = 0.1  # seconds at most for each of
_ROWS = (1, 16, 128)  # batches that a linear layer is timed with where there are no examples
# The largest accepted difference from the outputs of the dense model, relative to the largest output: for
# fused activations and attention, which only change the order of roundings, and in all; with float32 and
# narrower values.
_FUSED, _FUSED_NARROW = 1e-4, 2e-2
_WHOLE, _WHOLE_NARROW = 1e-3, 1e-1


def accelerate(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    dtype: torch.dtype | None = None,
    values: Literal["int8", "int4"] | None = None,
    tolerance: float | None = None,
    min_gain: float = 1.05,
    exclude: str | Collection[str] = (),
    keep_dense: bool = True,
    seconds: float = 20.0,
    verbose: bool = True,
) -> AccelerationReport:
    """Replaces the layers of a pruned model that are faster packed, in place, and reports the speed-up.

    Linear (and Hugging Face's Conv1D) layers and convolutions with at least a tenth of zeros are tried, and
    MultiheadAttention, whose projections are packed, each within the model, in turn with the dense layer. An
    activation module (ReLU, GELU exact or by tanh, SiLU) is computed by the packed layer itself where a run
    shows that it gets every output of the layer and nothing else does; functions called in `forward` stay as
    they are. Layers with which the model does not run, or returns other outputs, stay dense. Hugging Face
    models whose attention is PyTorch's function, "sdpa", then compute with the core's, "sparsam_sdpa", where
    that is faster and does not change the outputs. So are modules that hold packed layers, whole transformer
    blocks, MLPs and norms among them, as one call of the core each, which runs their `forward` again wherever
    a call is not as those with the example inputs. In the end the whole model is timed; if it is not faster,
    the layers that save least are made dense again until it is, or until all are.

    The model runs without gradients and in eval mode; afterwards training flags, buffers and the random state
    are as before. Packed layers are for inference (`restore` undoes everything). The memory of a dense weight
    is freed if it can be unpacked again exactly and nothing else, such as an optimizer, holds its Parameter.
    Call it before `torch.compile`.

    Args:
        model: A module that holds such layers, on the CPU. Only its zeros matter, not how it was pruned;
            `torch.nn.utils.prune` and parametrizations may still be in place.
        example_inputs: Typical inputs: a tensor, a tuple of arguments, a mapping of keyword arguments, or a
            list of several such examples, which have equal weight. Other inputs (which take another branch of
            `forward`, say) are not checked. None: linear layers are timed alone with 1, 16 and 128 rows, all
            others stay dense, activations are fused in `nn.Sequential` only.
        dtype: The dtype of the stored weights: `torch.bfloat16` halves and rounds them; None keeps them.
        values: "int8" rounds the weights of linear layers, attention and convolutions, and their inputs, to
            integers with a scale for each output and each row (of a convolution: each image, and group of
            channels) of the input; sums are exact. Recurrent layers keep floats. Weights that
            `prune(..., values="int8")` rounded are packed without further rounding. Embeddings are rounded
            too, with a scale for each of their rows, to save memory, whatever the time of a look-up, unless
            another layer has the same Parameter. "int4" takes half of the bits in linear layers and
            attention:
            16 levels with a scale for each 64 or 128 inputs of an output, meant for batches of 1 to 8;
            embeddings stay dense. A linear layer that has the weight of an embedding, as the last one of many
            language models, is tried with int8 values if it has no zeros.
        tolerance: The largest accepted difference from the outputs of the dense model, relative to the
            largest output. Layers that exceed it stay dense. By default 0.001, or 0.1 if values are rounded;
            above 0, since sums are rounded in another order. Needs `example_inputs`.
        min_gain: How many times faster than the dense layer a packed one must be; one that is not is packed
            all the same if with it a module around it is computed as a whole, and the model is faster.
        exclude: The name of a layer that stays dense, or several; shell-style patterns
            (`fnmatch.fnmatchcase`).
        keep_dense: Whether dense weights that packing rounded stay in memory for `restore`. False frees
            them, as `save` and `load` do: `restore` then returns the rounded values.
        seconds: About how long all measurements may take; after that, each is made with as few runs as
            possible.
        verbose: Whether to print the report.

    Returns:
        The report.

    Raises:
        TypeError: An argument is of the wrong type; the model is a bare layer, compiled or scripted.
        ValueError: `min_gain`, `seconds`, `tolerance` or `dtype` is out of range; `tolerance` without example
            inputs, or no examples in a list, or the model cannot be called with one; a lazy layer has no
            shape yet.

    Warns:
        UserWarning: A pattern in `exclude` matches no layer.
    """
    whole = 1 if tolerance is None else tolerance
    _check(model, dtype, values, min_gain=min_gain, seconds=seconds, tolerance=whole)
    dtype = {"int8": torch.int8, "int4": INT4, None: dtype}[values]
    examples = None if example_inputs is None else as_examples(example_inputs)
    if examples is None and tolerance is not None:
        msg = "example_inputs: expected inputs, for outputs to be compared; got none; leave out tolerance"
        raise ValueError(msg)
    interruptions = measurement.Interruptions()
    with torch.inference_mode(False), torch.no_grad():
        found, left = candidates(
            model, _patterns(exclude), embeddings=values == "int8", outputs=values == "int4"
        )
        bytes_before = parameter_bytes(model)
        swap = LayerSwap(model)
        try:
            if examples is None:
                outcome = _by_rows(model, found, swap, dtype, min_gain, Budget(seconds))
            else:
                with ModelRunner(model, examples) as runner:
                    outcome = _by_examples(
                        model, runner, found, swap, dtype, tolerance, min_gain, Budget(seconds)
                    )
            _install(swap, outcome)
            rows = left | rows_of(found, swap, outcome)
            release(model, [swap.layers[name] for name in outcome.swapped], rounded=not keep_dense)
            announce(model)
            report = AccelerationReport(
                in_order(model, rows),
                None if outcome.gain is None else 1e3 * outcome.gain.before,
                None if outcome.gain is None else 1e3 * outcome.gain.after,
                bytes_before,
                parameter_bytes(model),
                outcome.difference,
                interruptions.many(),
                closing(model, rows, outcome),
                outcome.final_attention,
                outcome.final_fused,
            )
        except BaseException:
            swap.undo()
            raise
    if verbose:
        say(str(report))
    return report


def _by_examples(
    model: nn.Module,
    runner: ModelRunner,
    found: Sequence[Candidate],
    swap: LayerSwap,
    dtype: torch.dtype | None,
    tolerance: float | None,
    min_gain: float,
    budget: Budget,
) -> Outcome:
    """Runs the model with examples, dense and packed."""
    seen = observe(model, runner, found, swap.where)
    reasons = {one.name: why for one in found if (why := obstacle(one, dtype))}
    reasons |= {name: why for name, calls in seen.calls.items() if (why := _unsuitable(calls))}
    suitable = [one for one in found if one.name not in reasons]
    swap.layers = pack(suitable, dtype, {one.name: seen.calls[one.name] for one in suitable}, seen.to_itself)
    narrow = seen.autocast or any(layer.weight.dtype != torch.float32 for layer in swap.layers.values())
    rounded = narrow or dtype not in {None, torch.float32}
    if tolerance is None:
        tolerance = _WHOLE_NARROW if rounded else _WHOLE
    verified = try_out(runner, swap, seen.outputs, tolerance=tolerance, budget=budget)
    reasons |= verified.reasons
    if not swap.layers:
        return Outcome(seen.calls, Decision((), {}, {}), reasons, _dense(runner))
    order = _FUSED_NARROW if narrow or dtype in ROUNDED else _FUSED
    followers = fusions(seen.followers, swap.layers, swap.where)
    fuse(runner, swap, followers, verified.outputs, tolerance=order)
    times = measurement.layer_times(model, runner, swap, budget)
    lookups = [name for name, layer in swap.layers.items() if is_embedding(layer.layer)]
    decision = _decide(swap, times, min_gain, lookups)
    if not decision.swap:
        return Outcome(seen.calls, decision, reasons, _dense(runner))
    attention = choose_attention(model, runner, swap, decision.swap, tolerance=order, budget=budget)
    fused = choose_fused(model, runner, swap, decision.swap, tolerance=order, budget=budget)
    if slow := decision.slow:
        names, more = fuse_with_slow(model, runner, swap, decision.swap, slow, tolerance=order, budget=budget)
        decision, fused = decision.with_swap(names), more or fused
    gain = keep_what_gains(runner, swap, decision, budget, lookups)
    swap.show(gain.swap)
    apart = difference(runner.outputs(), seen.outputs) if gain.swap else None
    return Outcome(seen.calls, decision, reasons, gain, apart, attention, fused)


def _by_rows(
    model: nn.Module,
    found: Sequence[Candidate],
    swap: LayerSwap,
    dtype: torch.dtype | None,
    min_gain: float,
    budget: Budget,
) -> Outcome:
    """Times linear layers alone."""
    reasons = {one.name: why for one in found if (why := obstacle(one, dtype))}
    reasons |= {one.name: "needs example_inputs" for one in found if needs_examples(one.layer)}
    linear = [one for one in found if one.name not in reasons]
    swap.layers = pack(linear, dtype, {one.name: [(rows, 1) for rows in _ROWS] for one in linear})
    swap.fusions = fusions(observe_sequences(model, linear, swap.where), swap.layers, swap.where)
    swap.show(swap.layers)
    follows = {name: one.replacement.original for one in swap.fusions for name in one.replacement.into}
    each = min(_SINGLE, budget.seconds / max(1, len(_ROWS) * len(swap.layers)))
    calls, times = {}, {}
    for name, layer in swap.layers.items():
        inputs = [_draw(rows, layer.packed.cols, layer.weight.dtype) for rows in _ROWS]
        calls[name] = Counter({tuple(x.shape): 1 for x in inputs})
        pairs = [measurement.compare(layer, follows.get(name), x, each) for x in inputs]
        times[name] = measurement.LayerTime(
            *(statistics.geometric_mean(each) for each in zip(*pairs, strict=True))
        )
    return Outcome(calls, _decide(swap, Times(times, {}), min_gain), reasons)


def _decide(swap: LayerSwap, times: Times, min_gain: float, lookups: Collection[str] = ()) -> Decision:
    return decide(
        times,
        fused=[fusion.replacement.into for fusion in swap.fusions],
        min_gain=min_gain,
        lookups=lookups,
    )


def _dense(runner: ModelRunner) -> Gain:
    """The gain of a model in which nothing is packed."""
    seconds = runner.seconds().wall
    return Gain((), seconds, seconds)


def _unsuitable(calls: Counter[Any]) -> str:
    """Why a layer that is called like this cannot be packed."""
    if not calls:
        return "not called with the example inputs"
    return "called with something else than one plain tensor" if None in calls else ""


def _draw(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """A random input of a linear layer; the global random state is not changed."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0), device="cpu").to(dtype)


def _install(swap: LayerSwap, outcome: Outcome) -> None:
    """Installs the layers that won, in the model's present training or eval mode."""
    swap.show(outcome.swapped)
    for fusion in swap.fusions:
        fusion.replacement.training = fusion.replacement.original.training


def _check(model: object, dtype: object, values: object, **positive: object) -> None:
    if not isinstance(model, nn.Module):
        msg = f"model: expected a torch.nn.Module; got {type(model).__name__}; pass the model itself"
        raise TypeError(msg)
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule) or name == "OptimizedModule":
        msg = f"model: expected one that is not compiled yet; got a {name}; accelerate it, then compile it"
        raise TypeError(msg)
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        msg = f"{lazy[0]}: expected a model that ran before; got one without a shape; call it once before"
        raise ValueError(msg)
    if dtype is not None and dtype not in DTYPES:
        msg = f"dtype: expected None or one of {', '.join(map(str, DTYPES))}; got {dtype!r}; pass one of them"
        raise ValueError(msg)
    if values is not None and (values not in {"int8", "int4"} or dtype is not None):
        got = repr(values) if dtype is None else f"{values!r} and dtype={dtype}"
        msg = f'values: expected None, or "int8" or "int4" and no dtype; got {got}; pass one of them'
        raise ValueError(msg)
    for key, value in positive.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:  # type: ignore[operator]
            msg = f"{key}: expected a number above 0; got {value!r}; leave it out for the default"
            raise ValueError(msg)


def _patterns(exclude: object) -> tuple[str, ...]:
    """The patterns of `exclude`, checked."""
    found = (exclude,) if isinstance(exclude, str) else exclude
    if not isinstance(found, Collection) or not all(isinstance(pattern, str) for pattern in found):
        msg = f"exclude: expected a name pattern or several; got {exclude!r}; write 'lm_head' or ['*.query']"
        raise TypeError(msg)
    return tuple(found)
