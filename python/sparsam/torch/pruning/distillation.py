"""Recovery by distillation: a pruned model is trained towards the dense one; its zeros stay zero."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from sparsam.checkpoint.atomic import open_folder
from sparsam.inputs.checks import expected, is_number, positive
from sparsam.torch.acceleration.model_runner import unfit
from sparsam.torch.pruning.calibration import Batch
from sparsam.torch.pruning.distillation_report import DistillationReport
from sparsam.torch.pruning.distillation_run import DistillationRun
from sparsam.torch.pruning.hidden_states import HiddenStates, block_names, first_tensor
from sparsam.torch.pruning.masked_weights import MaskedWeights, zeros_of
from sparsam.torch.pruning.progress_bar import ProgressBar
from sparsam.torch.pruning.saved_progress import digest_of, function_digest
from sparsam.torch.pruning.training_loss import distillation_loss
from sparsam.torch.pruning.while_training import Pruner
from sparsam.training.callbacks import sparsity_of
from torch import Tensor, nn

__all__ = ["distill"]

_LEARNING_RATE = 5e-4
_WARM = 0.1  # the share of the training in which the learning rate rises
_ONE_LABEL = "single_label_classification"


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    layers: Literal["all", "last", "outputs"] = "all",
    output: Callable[[Any, Batch], Tensor] | None = None,
    loss: Literal["cosine", "kl"] | None = None,
    pruner: Pruner | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    learning_rate: float | None = None,
    state_dir: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = False,
) -> DistillationReport:
    """Trains a pruned student towards its dense teacher, without labels, in place; zeros stay zero.

    The loss compares outputs along their last axis (`loss`), and adds a tenth of the mean over the layers of
    ||h - t||^2 / ||t||^2 between hidden states; positions where an `attention_mask` is 0 do not count.
    Hidden states are the outputs of the blocks (modules of one class in a row), or of the layers if a model
    has no blocks. Both models run in evaluation mode: no dropout, and batch norms with their stored
    statistics.

    Args:
        student: The pruned model; its zeros in weights of two axes or more are held.
        teacher: The dense model, with the same names of blocks; not changed.
        batches: An iterable of tensors, tuples, or mappings of keyword inputs as tokenizers give, or a
            DataLoader. It is repeated as often as needed; an iterator ends the training when it is exhausted.
        steps: The number of steps.
        seconds: A time limit. `steps`, `seconds` or both are needed; training ends at whichever comes first.
            With `seconds` the result depends on the machine's speed.
        layers: Whether to match the hidden states of "all" blocks, of the "last", or "outputs" only.
        output: (what the model returned, batch) -> the tensor to match, such as a pooled embedding. Default:
            logits, `last_hidden_state`, or the first tensor.
        loss: How outputs s are compared with the teacher's t: "cosine", the mean of 1 - cos(s, t); "kl", the
            mean of KL(softmax(t) || softmax(s)) in nats (Hinton et al. 2015, arXiv:1503.02531, at temperature
            1), for logits. Outputs of length 1 are compared by ||s - t||^2 / ||t||^2 instead. Default: "kl"
            if the model returns its output as `logits` and no `output` is given, unless its config's
            `problem_type` is another than a single label; else "cosine".
        pruner: The student's pruner: stepped after each step, so that sparsity can grow during training.
        optimizer: An optimizer of the student's Parameters, used as it is. Default: AdamW without weight
            decay over all Parameters that require gradients except embeddings.
        learning_rate: The largest learning rate of the default AdamW, 5e-4 if left out: it rises to this over
            the first tenth of the training and then decays along a cosine to 0. An optimizer of yours has its
            own.
        state_dir: A folder, made if needed, where the state is saved every `checkpoint_every` steps. If it
            holds one, training resumes from there with the same batches, also those of a DataLoader that
            shuffles. Other batches than before are refused.
        checkpoint_every: The number of steps between saves; a killed run loses at most that many.
        progress: Show a progress bar with the time left on standard error.

    Returns:
        Steps, losses and sparsity. The training modes of both models are as before; gradients are None.

    Raises:
        ValueError: There are no batches; student and teacher are the same model, or give different shapes; a
            loss is not finite; `state_dir` is of another run, teacher, set of zeros or output, or of other
            batches. The student is then still valid and its zeros are kept, as after KeyboardInterrupt.
        TypeError: An argument is of another type.
    """
    _check(student, teacher, steps, seconds, layers)
    _check_kinds(batches, output, pruner, optimizer)
    if loss not in (None, "cosine", "kl"):
        raise ValueError(expected("loss", loss, "'cosine' or 'kl'", "name one of them, or leave it out"))
    largest = _largest_rate(learning_rate, optimizer)
    masked = _masked(student, pruner)
    before = _sparsity(student, masked, pruner)
    names = [] if layers == "outputs" else block_names(student)[-1 if layers == "last" else 0 :]
    shared = dict(teacher.named_modules())
    missing = [name for name in names if name not in shared]
    if missing:
        msg = f"teacher: expected the student's blocks; got none named {missing[0]!r}; use layers='outputs'"
        raise ValueError(msg)
    own = optimizer is None
    if optimizer is None:
        trained = _trained(student)
        fused = all(parameter.device.type == "cpu" for parameter in trained)
        optimizer = torch.optim.AdamW(trained, lr=largest, weight_decay=0.0, fused=fused)
    if pruner is not None:
        pruner._weights.check_model("student", student)
    if pruner is not None and pruner.optimizer is None:
        pruner.optimizer = optimizer
    positive("checkpoint_every", checkpoint_every)
    folder = None if state_dir is None else open_folder("state_dir", state_dir)
    run = DistillationRun(student, optimizer, pruner, folder)
    run.identity = {"layers": layers, "steps": steps, "blocks": names, "rate": largest if own else None}
    run.identity["loss"] = loss
    if state_dir is not None:
        run.identity["teacher"] = digest_of(teacher.state_dict()).hex()
        run.identity["zeros"] = None if pruner is not None else _digest(masked)
        run.identity["output"] = None if output is None else function_digest(output)
    modes = [(module, module.training) for model in (student, teacher) for module in model.modules()]
    moving = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    idle = [p for p in student.parameters() if p.requires_grad and id(p) not in moving]
    bar = ProgressBar(steps or 1, show=progress and steps is not None)
    try:
        student.eval()
        teacher.eval()
        for parameter in idle:
            parameter.requires_grad_(False)
        if run.resume():
            bar.step("resumed", run.step, skipped=True)
        with (
            HiddenStates(student, names) as states,
            HiddenStates(teacher, names) as wanted,
            torch.enable_grad(),
        ):
            start = time.monotonic() - run.seconds
            for batch in run.through(batches):
                share = _share(run.step, time.monotonic() - start, steps, seconds)
                if share >= 1:
                    run.stopped = "steps" if steps is not None and run.step >= steps else "seconds"
                    break
                if own:
                    for group in optimizer.param_groups:
                        group["lr"] = largest * _rate(share)
                with torch.no_grad():
                    target, _ = _output(teacher, batch, output, "teacher")
                found, logits = _output(student, batch, output, "student")
                kl = logits if loss is None else loss == "kl"
                total = distillation_loss(found, target, states.taken(), wanted.taken(), batch, divergence=kl)
                value = float(total.detach())
                if not math.isfinite(value):
                    got = f"{value} at step {run.step}"
                    msg = f"loss: expected a finite number; got {got}; lower the learning rate, look for NaN"
                    raise ValueError(msg)
                if not total.requires_grad:
                    msg = (
                        "student: expected outputs with gradients of what the optimizer trains; got none; "
                        "give it the student's Parameters, and run forward without torch.no_grad"
                    )
                    raise ValueError(msg)
                optimizer.zero_grad()
                total.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                masked.apply() if pruner is None else pruner.step()
                run.losses.append(value)
                run.step, run.seconds = run.step + 1, time.monotonic() - start
                bar.step(f"loss {value:.4g}", 1)
                if run.step % checkpoint_every == 0:
                    run.save()
        run.save()
    finally:
        (masked if pruner is None else pruner._weights).apply()
        optimizer.zero_grad()
        for parameter in idle:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
    after = _sparsity(student, masked, pruner)
    return DistillationReport(run.step, run.seconds, run.stopped, tuple(run.losses), (before, after))


def _check(
    student: nn.Module, teacher: nn.Module, steps: int | None, seconds: float | None, layers: str
) -> None:
    for what, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            msg = f"{what}: expected a torch.nn.Module; got {type(model).__name__}; pass the model itself"
            raise TypeError(msg)
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        msg = (
            "teacher: expected a model with Parameters of its own; got the student's; copy it with "
            "copy.deepcopy before it is pruned"
        )
        raise ValueError(msg)
    if steps is not None:
        positive("steps", steps)
    if seconds is not None and (not is_number(seconds) or not seconds > 0):
        raise ValueError(expected("seconds", seconds, "a time above 0", "raise it"))
    if steps is None and seconds is None:
        raise ValueError(expected("steps", None, "a number of steps, or seconds=", "pass one of them"))
    if layers not in ("all", "last", "outputs"):
        raise ValueError(expected("layers", layers, "'all', 'last' or 'outputs'", "name one of them"))


def _check_kinds(batches: object, output: object, pruner: object, optimizer: object) -> None:
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        got = type(batches).__name__
        msg = f"batches: expected an iterable of batches; got {got}; put a single batch into a list"
        raise TypeError(msg)
    if output is not None and not callable(output):
        raise TypeError(expected("output", output, "a function of (result, batch)", "pass one"))
    if pruner is not None and not isinstance(pruner, Pruner):
        raise TypeError(expected("pruner", pruner, "a sparsam.torch.Pruner", "make one of the student"))
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        do = "make one of the student's Parameters"
        raise TypeError(expected("optimizer", optimizer, "a torch.optim.Optimizer", do))


def _largest_rate(learning_rate: float | None, optimizer: object) -> float:
    """The learning rate of the AdamW that distill makes."""
    if learning_rate is None:
        return _LEARNING_RATE
    if optimizer is not None:
        do = "set it in the optimizer"
        raise ValueError(expected("learning_rate", learning_rate, "none beside an optimizer", do))
    if not is_number(learning_rate) or not 0 < learning_rate < math.inf:
        raise ValueError(expected("learning_rate", learning_rate, "a number above 0", "pass 1e-3, say"))
    return float(learning_rate)


def _masked(student: nn.Module, pruner: Pruner | None) -> MaskedWeights:
    """The weights of the student whose zeros are kept, or those of its pruner."""
    if pruner is not None:
        return MaskedWeights(pruner._weights.parameters, pruner.masks)
    parameters = dict(student.named_parameters())
    masks = zeros_of(parameters)
    return MaskedWeights({name: parameters[name] for name in masks}, masks)


def _digest(masked: MaskedWeights) -> str:
    """A digest of the positions of all zeros."""
    masks = {name: torch.from_numpy(mask.to_array()) for name, mask in masked.masks.items()}
    return digest_of(masks).hex()


def _sparsity(student: nn.Module, masked: MaskedWeights, pruner: Pruner | None) -> float:
    """The share of zeros among masked weights, without embeddings (their padding rows are zero)."""
    if pruner is not None:
        return pruner.sparsity
    tables = {id(weight) for weight in _tables(student)}
    counted = {name: mask for name, mask in masked.masks.items() if id(masked.parameters[name]) not in tables}
    return sparsity_of(counted)


def _tables(student: nn.Module) -> list[Tensor]:
    return [m.weight for m in student.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]


def _trained(student: nn.Module) -> list[nn.Parameter]:
    tables = {id(weight) for weight in _tables(student)}
    trained = [p for p in student.parameters() if p.requires_grad and id(p) not in tables]
    if not trained:
        msg = "student: expected Parameters that require gradients; got none; call requires_grad_(True)"
        raise ValueError(msg)
    return trained


def _share(step: int, passed: float, steps: int | None, seconds: float | None) -> float:
    """The fraction of the training that is done, in [0, 1]."""
    return max(0.0 if steps is None else step / steps, 0.0 if seconds is None else passed / seconds)


def _rate(share: float) -> float:
    """The factor of the learning rate after a share of the training: linear warm-up, then a cosine."""
    if share < _WARM:
        return max(share, _WARM / 10) / _WARM
    return (1 + math.cos(math.pi * (share - _WARM) / (1 - _WARM))) / 2


def _output(
    model: nn.Module, batch: Batch, output: Callable[[Any, Batch], Tensor] | None, what: str
) -> tuple[Tensor, bool]:
    """What is matched, and whether it is the logits of one label."""
    try:
        result = model(*batch.args, **batch.kwargs)
    except Exception as error:
        raise unfit(error, "batches", f"the {what}") from error
    tensor = first_tensor(result) if output is None else output(result, batch)
    if not isinstance(tensor, Tensor) or not tensor.ndim:
        got = (
            "a single number"
            if isinstance(tensor, Tensor)
            else type(result if output is None else tensor).__name__
        )
        msg = f"{what}: expected an output with a floating-point tensor; got {got}; pass output="
        raise ValueError(msg)
    kind = getattr(getattr(model, "config", None), "problem_type", None) or _ONE_LABEL
    named = isinstance(result, Mapping) and tensor is result.get("logits")
    return tensor, output is None and named and kind == _ONE_LABEL
