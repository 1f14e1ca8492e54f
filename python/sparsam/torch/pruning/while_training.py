"""Pruning while training: masks that follow a schedule, with one call after each optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

import torch
from sparsam import scores
from sparsam.config import PruningConfig, Scorer
from sparsam.inputs.checks import expected
from sparsam.masks import Mask
from sparsam.patterns import NM, Unstructured
from sparsam.pools import Pool, check_patterns, make_pools
from sparsam.pruner import configured, describe, prune_pools
from sparsam.report import Report
from sparsam.torch.pruning.gradient_evidence import GradientEvidence, gradients_of
from sparsam.torch.pruning.gradients import GRADIENT_METHODS
from sparsam.torch.pruning.masked_weights import MaskedWeights, forget, plain_model, to_host, zeros_of
from sparsam.torch.pruning.prunable import named_weights, prunable_weights
from sparsam.torch.pruning.pruner_state import SavedPruner, packed
from sparsam.training import regrowth
from sparsam.training.callbacks import sparsity_of
from sparsam.training.regrowth import RegrowthLike
from sparsam.training.run_identity import RunIdentity
from sparsam.training.timetable import Timetable, config_at
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from sparsam.config import ConfigFields

__all__ = ["Pruner"]


class Pruner:
    """Prunes a model while it is trained: call `step()` after each `optimizer.step()`.

        pruner = sparsam.torch.Pruner(model, target_sparsity=0.8, end=1000)
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()
            optimizer.step()
            pruner.step()

    Masks are stored in the pruner. The model keeps its classes, Parameters and state_dict keys, and its
    pruned weights are exactly zero after every call of `step`, whatever momentum and weight decay do in
    between. At the steps of the schedule the masks are selected again from the current weights: pruned
    weights stay pruned, and more are added. With `regrow`, the lowest of the kept weights are then dropped
    and as many others grow.

    Attributes:
        config: The configuration, with the schedule and the transposed weights filled in.
        dense: Name -> reason, for the parameters that stay dense.
        optimizer: The optimizer, whose state is zeroed for weights that grow; may be set later.
        steps: The number of calls of `step` so far.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig | None = None,
        *,
        begin: int = 0,
        end: int | None = None,
        every: int | None = None,
        initial_sparsity: float = 0.0,
        regrow: RegrowthLike | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        hold_zeros: bool = True,
        **changes: Unpack[ConfigFields],
    ) -> None:
        """Decides what is pruned when, and checks patterns against shapes; prunes nothing yet.

        Args:
            model: The model that is trained, possibly wrapped by DistributedDataParallel or torch.compile.
                Names of tensors are those of the plain model's state_dict.
            config: What to do, as for `sparsam.prune`. The methods "saliency", "fisher" and "movement" score
                by the gradients that training computes. Parameters that are not weights of layers, and
                embeddings and heads, stay dense unless `overrides` or `ties` have their exact names.
            begin: The step of the first update: 0 is after the first optimizer step.
            end: The step of the last update, which reaches the target. Required, except with the schedule
                "one_shot", where the default is `begin`.
            every: The number of steps between updates. By default such that there are as many updates as
                num_iterations of the configuration, or 100.
            initial_sparsity: Where the schedule starts.
            regrow: "set", "rigl", or an object of `sparsam.training.regrowth`: after the first update, each
                update drops a share of the kept weights and grows as many from zero, in each tensor. The
                share falls to 0 at `end`. For `Unstructured` in scope "layer" or "global".
            optimizer: Required with `regrow`.
            hold_zeros: Treat existing zeros as pruned, except in tensors of zeros only.
            **changes: Fields of `PruningConfig` to set on top of `config`, such as `schedule`. Its default is
                "cubic", for N:M patterns and with `regrow` "one_shot".

        Raises:
            ValueError: As for `sparsam.prune`; the schedule and its steps contradict each other; nothing is
                left to prune; `regrow` does not suit the configuration.
            TypeError: `model` is not a module, or a weight has a dtype or device that cannot be pruned.
        """
        if not isinstance(model, nn.Module):
            msg = f"model: expected a torch.nn.Module; got {type(model).__name__}; pass the model itself"
            raise TypeError(msg)
        settings = configured(config, changes)
        self.optimizer = optimizer
        self.steps = 0
        self._model = plain_model(model)
        self._regrow = regrowth.resolve(regrow)
        _check_regrow(self._regrow, settings)
        at_once = self._regrow is not None or isinstance(settings.pattern, NM)
        self._table = Timetable.of(
            settings,
            default="one_shot" if at_once else "cubic",
            begin=begin,
            end=end,
            every=every,
            initial=initial_sparsity,
        )
        parameters = dict(plain_model(model).named_parameters(remove_duplicate=False))
        check_patterns(settings.with_changes(exclude=()), parameters, stacklevel=2)
        prunable, self.dense = prunable_weights(
            plain_model(model), exclude=settings.exclude, named=named_weights(settings)
        )
        stored = [weight.name for weight in prunable if weight.transposed]
        self.config = settings.with_changes(transposed=(*settings.transposed, *stored))
        self._candidates = {weight.name: weight.parameter for weight in prunable}
        pools = self._try()
        names = dict.fromkeys(name for pool in pools for name in pool.names)
        if not names:
            why = ", ".join(f"{name}: {reason}" for name, reason in list(self.dense.items())[:5])
            kind = type(plain_model(model)).__name__
            msg = f"model: expected weights to prune; got none in {kind} ({why}); name them in overrides"
            raise ValueError(msg)
        self.dense = {name: why for name, why in self.dense.items() if name not in names}
        self._weights = MaskedWeights({name: self._candidates[name] for name in names})
        self._weights.set({name: Mask.ones(tuple(self._candidates[name].shape)) for name in names})
        if hold_zeros:
            self._weights.set(zeros_of(self._candidates, names))
        self._sparsity = 0.0
        self._due = False
        self._dense_gradients: dict[str, Tensor] | None = None
        method = self.config.method
        self._evidence = (
            GradientEvidence(method, self._weights.parameters)
            if isinstance(method, str) and method in GRADIENT_METHODS
            else None
        )

    @property
    def masks(self) -> dict[str, Mask]:
        """Name -> mask of each tensor that is being pruned."""
        return dict(self._weights.masks)

    @property
    def sparsity(self) -> float:
        """The share of weights that are pruned now, over the tensors that are being pruned."""
        return sparsity_of(self._weights.masks)

    @property
    def finished(self) -> bool:
        """Whether the masks will not change any more."""
        return self.steps > self._table.end and not self._due

    def step(self) -> bool:
        """Zeroes pruned weights, and prunes further if due; call it after `optimizer.step()`.

        An update that needs gradients is postponed to the next step if the current ones are not finite, as in
        a step that GradScaler skips.

        Returns:
            Whether the masks were updated.

        Raises:
            ValueError: A weight is NaN; a gradient that the method needs is missing, or the optimizer that
                `regrow` needs; a Parameter that is being pruned has been replaced in the model.
        """
        self._check_parameters()
        step = self.steps
        if self._evidence is not None and not self.finished:
            self._evidence.observe()
        self._weights.apply()
        self._due = self._due or self._table.updates_at(step)
        updated = self._due and self._update(step)
        if self._evidence is not None and not self.finished:
            self._evidence.remember()
        self._dense_gradients = None
        self.steps = step + 1
        return updated

    def _check_parameters(self) -> None:
        here = {id(parameter) for parameter in self._model.parameters()}
        for name, parameter in self._weights.parameters.items():
            if id(parameter) not in here:
                msg = (
                    f"weight {name!r}: expected the Parameter that the pruner was made with; got another in "
                    "its place; make the pruner after load_state_dict(assign=True), shrink or accelerate"
                )
                raise ValueError(msg)

    def mask_gradients(self) -> None:
        """Zeroes the gradients of pruned weights; call it between `backward()` and gradient clipping.

        Zeros stay zero without it; it restricts gradient norms and optimizer state to the kept weights.
        Gradients that the next regrowth needs are saved first.
        """
        growing = self._regrow is not None and self._regrow.needs_gradients
        if growing and (self._due or self._table.updates_at(self.steps)):
            found = gradients_of(self._weights.parameters)
            self._dense_gradients = found and {name: tensor.clone() for name, tensor in found.items()}
        self._weights.mask_gradients()

    def report(self) -> Report:
        """Returns the statistics of every tensor that is being pruned."""
        arrays = self._arrays()
        pools = self._pools(arrays, self._table.final)
        return describe(arrays, self._weights.masks, pools)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything needed to resume training as if it had not stopped: tensors and plain values.

        Save it together with the states of the model and the optimizer, after the same call of `step`; it
        works with `torch.save` and `torch.load(weights_only=True)`.
        """
        return {
            "identity": self._identity(),
            "steps": self.steps,
            "due": self._due,
            "sparsity": self._sparsity,
            "masks": {name: packed(mask) for name, mask in self._weights.masks.items()},
            "evidence": None if self._evidence is None else self._evidence.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state of a pruner of the same model and arguments, before or after the model's state.

        Raises:
            ValueError: It is not a state, or that of another configuration, schedule or model.
        """
        found = SavedPruner.read(state, set(self.state_dict()))
        own = self._identity()
        different = [
            f"{key} was {found.identity.get(key)!r}, now {value!r}"
            for key, value in own.items()
            if found.identity.get(key) != value
        ]
        if different:
            msg = (
                f"state: expected that of this pruner; got another's: {', '.join(different)}; make it "
                "with the same arguments"
            )
            raise ValueError(msg)
        masks = found.masks
        have = {name: mask.shape for name, mask in masks.items()}
        need = {name: mask.shape for name, mask in self._weights.masks.items()}
        if have != need:
            names = [name for name in {**have, **need} if have.get(name) != need.get(name)]
            msg = (
                f"state: expected masks of the tensors of this model; got others for {names[:5]!r}; load it "
                "with the model that it was saved with"
            )
            raise ValueError(msg)
        if self._evidence is not None:
            self._evidence.load_state_dict(found.evidence)
        self.steps, self._due, self._sparsity = found.steps, found.due, found.sparsity
        self._weights.set(masks)
        self._weights.apply()

    def _identity(self) -> dict[str, Any]:
        """The arguments that must agree between two pruners, in plain types."""
        by_gradients = self._evidence is not None
        config = self.config.with_changes(method="magnitude") if by_gradients else self.config
        plain: dict[str, Any] = msgspec.to_builtins(RunIdentity.of(config, [], {}))
        for absent in ("weights", "groups"):
            del plain[absent]
        if by_gradients:
            plain["method"] = self.config.method
        return plain | self._table.describe() | {"regrow": repr(self._regrow)}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {name: to_host(name, parameter) for name, parameter in self._candidates.items()}

    def _pools(
        self, arrays: Mapping[str, NDArray[Any]], sparsity: float, previous: Mapping[str, Mask] | None = None
    ) -> list[Pool]:
        step = config_at(self.config, sparsity, self._table.final)
        return make_pools(arrays, step, previous=previous)

    def _try(self) -> list[Pool]:
        """The pools at the end of the schedule, after a trial selection that shows errors early."""
        arrays = self._arrays()
        pools = self._pools(arrays, self._table.final)
        names = {name for pool in pools for name in pool.names}
        method = self.config.method
        tried: Scorer = scores.Magnitude()
        if not (isinstance(method, str) and method in GRADIENT_METHODS):
            tried = scores.resolve(method)
        prune_pools(arrays, pools, tried, {name: np.empty_like(arrays[name], order="C") for name in names})
        return pools

    def _update(self, step: int) -> bool:
        """Prunes to the sparsity of a step and grows weights; returns False if it waits for gradients."""
        gradients = None
        if self._regrow is not None and step > self._table.begin and self._regrow.needs_gradients:
            gradients = self._dense_gradients or gradients_of(self._weights.parameters)
            if gradients is None:
                return False
        if self._evidence is not None and not self._evidence.ready:
            return False
        arrays = self._arrays()
        sparsity = self._table.sparsity_at(step)
        if sparsity > self._sparsity:
            self._weights.set(self._pruned(arrays, sparsity))
            self._sparsity = sparsity
        if self._regrow is not None and step > self._table.begin:
            self._grow(arrays, gradients or {}, step)
        if self._evidence is not None:
            self._evidence.restart()
        self._weights.apply()
        self._due = False
        return True

    def _pruned(self, arrays: Mapping[str, NDArray[Any]], sparsity: float) -> dict[str, Mask]:
        previous = self._weights.masks
        pools = self._pools(arrays, sparsity, previous)
        method = self._evidence.scorer() if self._evidence is not None else scores.resolve(self.config.method)
        masks = prune_pools(arrays, pools, method, arrays, previous=previous).masks
        return {name: mask & previous[name] for name, mask in masks.items()}

    def _grow(self, arrays: Mapping[str, NDArray[Any]], gradients: Mapping[str, Tensor], step: int) -> None:
        assert self._regrow is not None
        if self.optimizer is None:
            wanted = "the optimizer, whose state of weights that grow is zeroed"
            raise ValueError(expected("optimizer", None, wanted, "pass optimizer= to Pruner with regrow="))
        begin, end = self._table.begin, max(self._table.end - self._table.begin, 1)
        grown = {}
        for name, mask in self._weights.masks.items():
            gradient = to_host(name, gradients[name]) if name in gradients else None
            new = self._regrow.update(name, arrays[name], mask, gradient, step=step - begin, end=end)
            forget(self.optimizer, self._weights.parameters[name], (new & ~mask).to_array())
            grown[name] = new
        self._weights.set(grown)


def _check_regrow(regrow: object, config: PruningConfig) -> None:
    """Regrowth moves single weights within a tensor, which other patterns and rows do not allow."""
    patterns = [config.pattern, *(own.pattern for own in config.overrides.values() if own.pattern)]
    if regrow is None:
        return
    for pattern in patterns:
        if not isinstance(pattern, Unstructured):
            raise ValueError(expected("pattern", str(pattern), "Unstructured() with regrow", "leave one out"))
    if config.scope == "row" or config.ties:
        got = "ties" if config.ties else "scope 'row'"
        msg = f"regrow: expected scope 'layer' or 'global' and no ties; got {got}; leave one of them out"
        raise ValueError(msg)
