"""`prune`: prunes a trained model at once, in place, with or without calibration."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from sparsam.config import ConfigFields, PruningConfig
from sparsam.inputs.checks import expected, positive
from sparsam.inputs.float_mode import standard_floats
from sparsam.pruner import prune_pools
from sparsam.report import measure
from sparsam.torch.layers.packed_weight import from_array, to_array
from sparsam.torch.layers.unpacked_tensor import is_foreign
from sparsam.torch.pruning.calibration import Batch, describe, read_calibration
from sparsam.torch.pruning.gradients import GRADIENT_METHODS, gradient_scorer
from sparsam.torch.pruning.input_scores import dense_input_scores
from sparsam.torch.pruning.layer_fits import NewLayer
from sparsam.torch.pruning.norm_statistics import estimate_norms
from sparsam.torch.pruning.progress_bar import ProgressBar
from sparsam.torch.pruning.prunable import named_weights, prunable_weights
from sparsam.torch.pruning.prune_plan import PrunePlan, check_options, check_values, settings_of
from sparsam.torch.pruning.pruning_report import PruningReport, described
from sparsam.torch.pruning.saved_progress import SavedProgress, identify
from sparsam.torch.pruning.sequence import LayerSequence
from sparsam.torch.pruning.sequence_run import alike, prune_in_sequence
from sparsam.torch.pruning.spilling import spill_outputs
from sparsam.torch.pruning.twins import Twin
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["prune"]


def prune(
    model: nn.Module,
    config: PruningConfig | None = None,
    calibration: Iterable[Any] | None = None,
    *,
    targets: Literal["dense", "own"] = "dense",
    values: Literal["int8", "int4"] | None = None,
    group: int | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    calibration_samples: int = 1024,
    estimate_batch_norm: bool = False,
    progress: bool = False,
    executor: Executor | None = None,
    state_dir: str | Path | None = None,
    spill_dir: str | Path | None = None,
    **changes: Unpack[ConfigFields],
) -> PruningReport:
    """Prunes a model in place; it keeps its classes and state_dict keys and gets no hooks.

    With calibration, layers are pruned from the first to the last. Each gets its inputs from the network
    pruned so far, and with `targets="dense"` and the methods "obs" and "admm" it is fitted to the outputs of
    the dense network; a weight whose output is added to a residual stream also compensates for the error of
    that stream. Which weights share inputs, and where residual branches end, is found by running a batch.

    Args:
        model: Any model on the CPU. Embeddings, norms, biases and heads of language models stay dense.
        config: What to prune, and how much; `PruningConfig()` if left out. Patterns, scopes, allocations and
            overrides as for arrays, by the names of the state_dict. What stays dense by default is
            pruned only where `overrides` or `ties` have its exact name; patterns do not match it. The default
            method is "admm" with calibration and "magnitude" without.
        calibration: Inputs without labels: an iterable of tensors, tuples, or mappings of keyword inputs as
            tokenizers give, or a DataLoader. Rows where an input called `attention_mask` is 0 do not
            count; of wide convolutions (from about 2000 inputs), only evenly spaced positions are used if
            there are more than needed. One batch in ten is held out, to choose the damping and to measure the
            errors in the report.
        targets: "dense", or "own": layers are fitted to the outputs of their own dense weights, as in
            SparseGPT, which is safer with little calibration. "own" always applies to weights of recurrent
            layers, weights that a forward pass uses several times, and experts to which the pruned network
            sends other rows.
        values: "int8": kept weights are rounded too, layer by layer, to integers times a scale for each
            output (`sparsam.quantize` on the mask, after the fit), and later layers are fitted to that. The
            weights are floats exactly on this grid, so that `accelerate(model, inputs, values="int8")` packs
            them without rounding again. "int4" is the same with 4 bits, except that packing rounds groups of
            32 again.
        group: With "int4": 32, 64 or 128 columns that share a scale; None: all columns.
        loss_fn: For the methods "saliency", "fisher" and "movement": called with the model and each batch of
            the calibration, labels included, it returns the loss.
        calibration_samples: About how many samples of the calibration to use at most; spread evenly if it has
            a length, else the first.
        estimate_batch_norm: Measure the running statistics of batch norms again, on the calibration.
        progress: Show a progress bar with the time left on standard error.
        executor: Solves the problems of layers with the same inputs in parallel; the result is the same.
            For "obs" and "admm".
        state_dir: A folder for progress, from which an interrupted call resumes when it is repeated.
        spill_dir: A folder in which activations are kept as files instead of in memory during the call. Like
            `state_dir` and `values` it is for pruning layer by layer: with calibration, in scope "layer" or
            "row", without ties and gradients.
        **changes: Fields of `PruningConfig` to set on top of `config`.

    Returns:
        The report: each weight's sparsity and error, and why other weights stay dense.

    Raises:
        ValueError: There is nothing to prune, or a weight cannot be pruned as it is (packed, parametrized,
            sparse, on another device); calibration is missing, empty, not finite, does not reach a weight, or
            does not suit the model; a sparsity or pattern does not fit a weight or the method. The model is
            then unchanged, as after an interrupt.
        TypeError: `model` is not a module, or another argument is of another type.

    Warns:
        UserWarning: The calibration is short for a layer, or its texts are too similar: own targets are used
            there.
    """
    begun = time.perf_counter()
    given = settings_of(config, changes, calibrated=calibration is not None)
    if targets not in ("dense", "own"):
        raise ValueError(expected("targets", targets, "'dense' or 'own'", "use one of them"))
    check_values(values, group)
    most = positive("calibration_samples", calibration_samples)
    weights, dense = prunable_weights(model, exclude=given.exclude, named=named_weights(given))
    if not weights:
        msg = f"model: expected weights to prune; got none in {type(model).__name__}; {_why(dense)}"
        raise ValueError(msg)
    calibrated = calibration is not None
    plan = PrunePlan.of(weights, given, calibrated=calibrated, values=values, group=group)
    check_options(
        model,
        plan,
        calibrated=calibrated,
        loss_fn=loss_fn,
        estimate_batch_norm=estimate_batch_norm,
        executor=executor,
        state_dir=state_dir,
        spill_dir=spill_dir,
    )
    batches = None if calibration is None else read_calibration(model, calibration, most)
    said: list[str] = []
    pruned = Twin(model, weights)
    known: dict[str, NewLayer] = {}
    if plan.by_layer and batches is not None:
        if targets == "dense" and plan.method.reconstructs and (text := alike(model, batches)):
            said.append(text)
            targets = "own"
        reference = Twin(model, weights) if targets == "dense" and plan.method.reconstructs else None
        if spill_dir is not None:
            for twin in (pruned, reference):
                if twin is not None:
                    spill_outputs(twin.model, spill_dir)
        saved = None
        if state_dir is not None:
            settings = targets if values is None else f"{targets} {values} {group}"
            saved = SavedProgress(state_dir, identify(model, batches, given, settings))
        bar = ProgressBar(len(plan.weights), show=progress)
        with LayerSequence(pruned, reference, batches) as sequence:
            known = prune_in_sequence(sequence, plan, executor, saved, bar.step, said)
    else:
        _at_once(model, pruned, batches, plan, loss_fn, progress)
    if estimate_batch_norm and batches is not None:
        estimate_norms(pruned.model, batches)
    _install(model, pruned)
    for text in said:
        warnings.warn(text, UserWarning, stacklevel=2)
    return _report(model, plan, dense, known, batches, said, time.perf_counter() - begun)


_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # pruning may change these


@standard_floats
def _at_once(
    model: nn.Module,
    pruned: Twin,
    batches: Sequence[Batch] | None,
    plan: PrunePlan,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    progress: bool,
) -> None:
    """Prunes all weights together, by scores of the dense network."""
    scorer = plan.method.scorer
    word = plan.config.method
    seen = 0 if batches is None or scorer is not None else len(batches)
    bar = ProgressBar(seen + 1, show=progress)

    def done(index: int) -> None:
        bar.step(f"batch {index}", 1)

    if word in GRADIENT_METHODS and batches is not None and loss_fn is not None:
        scorer = gradient_scorer(str(word), model, list(plan.weights.values()), batches, loss_fn, done)
    elif scorer is None and batches is not None:
        scorer = dense_input_scores(plan.method.name, pruned, batches, done)
    assert scorer is not None
    arrays = {name: to_array(weight.parameter.detach()) for name, weight in plan.weights.items()}
    outs = {name: array.copy() for name, array in arrays.items()}
    prune_pools(arrays, plan.pools, scorer, outs)
    for name, weight in pruned.weights.items():
        weight.parameter.data = from_array(outs[name])
    bar.step("selection", 1)


@standard_floats
def _install(model: nn.Module, pruned: Twin) -> None:
    """Copies the tensors that differ from the twin into the model: all of them, or none."""
    ours: dict[str, Tensor] = dict(model.named_parameters())
    # other buffers are the model's own state, which the runs here must not change
    ours.update((name, buffer) for name, buffer in model.named_buffers() if name.endswith(_NORM_BUFFERS))
    theirs = dict([*pruned.model.named_parameters(), *pruned.model.named_buffers()])
    old: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        try:
            for name, tensor in ours.items():
                new = theirs.get(name)
                if new is None or new is tensor or is_foreign(tensor) or torch.equal(new, tensor):
                    continue
                old.append((tensor, tensor.detach().clone()))
                tensor.copy_(new)
        except BaseException:
            for tensor, values in old:
                tensor.copy_(values)
            raise


def _report(
    model: nn.Module,
    plan: PrunePlan,
    dense: Mapping[str, str],
    known: Mapping[str, NewLayer],
    batches: Sequence[Batch] | None,
    said: Sequence[str],
    seconds: float,
) -> PruningReport:
    rows = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in plan.weights and name not in dense:
            continue
        if name in dense and dense[name].startswith("the same as"):
            continue
        if parameter.layout is not torch.strided or is_foreign(parameter):
            continue
        array = to_array(parameter.detach())
        pool = plan.pool_of.get(name)
        stats = measure(
            name, array, pruned=None if pool else 0, pattern="dense" if pool is None else str(pool.pattern)
        )
        rows.append(described(stats, known.get(name), dense.get(name, "")))
    text = "" if batches is None else describe(batches)
    return PruningReport(rows, text, seconds, said, plan.method.values or "")


def _why(dense: Mapping[str, str]) -> str:
    """A short reason why weights stay dense."""
    if not dense:
        return "it has no parameters of two axes"
    name, reason = next(iter(dense.items()))
    return f"{name!r} stays dense, for one: {reason}"
