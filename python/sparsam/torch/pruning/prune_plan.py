"""The plan of a call of `prune`, checked as far as possible before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import torch
from sparsam import scores
from sparsam.config import ConfigFields, PruningConfig
from sparsam.inputs.checks import expected
from sparsam.pools import Pool, check_patterns, make_pools
from sparsam.pruner import configured
from sparsam.reconstruction.quantized_sweep import GROUPS
from sparsam.reconstruction.sequential import RECONSTRUCTIONS, check_method
from sparsam.torch.layers.packed_weight import to_array
from sparsam.torch.pruning.gradients import GRADIENT_METHODS
from sparsam.torch.pruning.input_scores import INPUT_METHODS
from sparsam.torch.pruning.layer_fits import BITS, Method
from sparsam.torch.pruning.prunable import PrunableWeight
from torch import Tensor, nn

__all__ = ["PrunePlan", "check_executor", "check_options", "check_values", "layer_by_layer", "settings_of"]


def settings_of(config: PruningConfig | None, changes: ConfigFields, *, calibrated: bool) -> PruningConfig:
    """The configuration with the changes; where neither names a method, "admm" if there is calibration."""
    given = configured(config, changes)
    if config is None and "method" not in changes and calibrated:
        return given.with_changes(method="admm")
    return given


def layer_by_layer(config: PruningConfig, *, calibrated: bool) -> bool:
    """Whether layers are pruned in sequence, and not all at once by scores of the dense network."""
    together = config.scope == "global" or config.ties or config.method in GRADIENT_METHODS
    return calibrated and not together


@dataclass(frozen=True)
class PrunePlan:
    """What is to be pruned, and how.

    Attributes:
        weights: Name -> weight.
        config: The configuration, whose `transposed` has the names of the weights stored as (in, out).
        pools: The result of `make_pools`.
        pool_of: Name -> its pool.
        method: How masks are chosen.
        by_layer: Whether layers are pruned in sequence.
    """

    weights: Mapping[str, PrunableWeight]
    config: PruningConfig
    pools: Sequence[Pool]
    pool_of: Mapping[str, Pool]
    method: Method
    by_layer: bool

    @classmethod
    def of(
        cls,
        weights: Sequence[PrunableWeight],
        given: PruningConfig,
        *,
        calibrated: bool,
        values: str | None = None,
        group: int | None = None,
    ) -> PrunePlan:
        """The plan for these weights; ValueError for a pattern, scope or ties that the method lacks."""
        named = {weight.name: weight for weight in weights}
        stored = tuple(name for name in named if named[name].transposed)
        config = given.with_changes(transposed=stored, exclude=())
        arrays = {name: _array(weight.parameter.detach()) for name, weight in named.items()}
        check_patterns(config, arrays, stacklevel=3)
        pools = make_pools(arrays, config)
        pool_of = {name: part for pool in pools for part in pool.split() for name in part.names}
        word = config.method if isinstance(config.method, str) else ""
        if word in RECONSTRUCTIONS:
            for name, pool in pool_of.items():
                check_method(name, word, pool.pattern, pool.scope)
            if config.ties:
                msg = (
                    f"ties: expected none with method {word!r}, which fits layer by layer; got some; use "
                    "a method of scores"
                )
                raise ValueError(msg)
        if word in (*RECONSTRUCTIONS, *INPUT_METHODS):
            method = Method(word, None, values, group)
        else:
            scorer = None if word in GRADIENT_METHODS else scores.resolve(config.method)
            method = Method("", scorer, values, group)
        by_layer = layer_by_layer(config, calibrated=calibrated)
        if (by_layer or method.name) and (name := _unseen(weights)):
            msg = (
                f"overrides: expected weights whose inputs are seen, as prune with calibration needs; got "
                f"{name!r}; prune it in a call without calibration"
            )
            raise ValueError(msg)
        return cls(named, config, pools, pool_of, method, by_layer)


def _array(tensor: Tensor) -> NDArray[Any]:
    """The weight as an array; if it has no values, one of its shape and dtype filled with NaN."""
    if not tensor.is_meta:
        return to_array(tensor)
    return np.broadcast_to(to_array(torch.full((), math.nan, dtype=tensor.dtype)), tuple(tensor.shape))


def check_values(values: object, group: object) -> None:
    """Raises ValueError for an unknown kind of values, or a group that it does not support."""
    if values is not None and (not isinstance(values, str) or values not in BITS):
        raise ValueError(expected("values", values, "None, 'int8' or 'int4'", "pass one of them"))
    if group is not None and (values != "int4" or group not in GROUPS):
        got = f"{group!r} with values={values!r}"
        msg = f"group: expected None, or with values='int4' also 32, 64 or 128; got {got}; leave it out"
        raise ValueError(msg)


def _unseen(weights: Sequence[PrunableWeight]) -> str:
    return next((weight.name for weight in weights if weight.kind == "unseen"), "")


def check_options(
    model: nn.Module,
    plan: PrunePlan,
    *,
    calibrated: bool,
    loss_fn: Callable[..., Any] | None,
    estimate_batch_norm: bool,
    executor: Executor | None,
    state_dir: str | Path | None,
    spill_dir: str | Path | None,
) -> None:
    """Raises ValueError for options that are missing or would do nothing, TypeError for a wrong type."""
    word = plan.config.method
    if not calibrated and (plan.method.name or word in GRADIENT_METHODS):
        msg = f"calibration: expected batches of inputs for method {word!r}; got none; pass some"
        raise ValueError(msg)
    if word in GRADIENT_METHODS and loss_fn is None:
        msg = f"loss_fn: expected loss_fn(model, batch) for method {word!r}; got none; pass one"
        raise ValueError(msg)
    if word not in GRADIENT_METHODS and loss_fn is not None:
        msg = f"loss_fn: expected none with method {word!r}, which uses no gradients; got one; leave it out"
        raise ValueError(msg)
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(expected("loss_fn", loss_fn, "a function of (model, batch)", "pass one"))
    if estimate_batch_norm and not calibrated:
        msg = "estimate_batch_norm: expected calibration to measure on; got none; pass calibration"
        raise ValueError(msg)
    folders = (("state_dir", state_dir), ("spill_dir", spill_dir), ("executor", executor))
    for what, value in (*folders, ("values", plan.method.values)):
        if value is not None and not plan.by_layer:
            got = f"method {word!r} in scope {plan.config.scope!r}" if calibrated else "no calibration"
            got += " and ties" if plan.config.ties else ""
            msg = f"{what}: expected pruning layer by layer; got {got}, which is at once; leave it out"
            raise ValueError(msg)
    check_executor(plan, executor)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu" and (calibrated or name in plan.weights):
            msg = (
                f"tensor {name!r}: expected a model on the CPU; got one on {tensor.device}; call model.cpu()"
            )
            raise ValueError(msg)


def check_executor(plan: PrunePlan, executor: Executor | None) -> None:
    """Raises TypeError for anything but an executor, and ValueError for one that would have nothing to do."""
    if executor is not None and not callable(getattr(executor, "submit", None)):
        do = "pass ProcessPoolExecutor(), say"
        raise TypeError(expected("executor", executor, "a concurrent.futures.Executor", do))
    if executor is not None and not plan.method.reconstructs:
        msg = (
            f"executor: expected method 'obs' or 'admm', whose fits are spread over workers; got "
            f"{plan.config.method!r}, whose scores take no time; leave it out"
        )
        raise ValueError(msg)
