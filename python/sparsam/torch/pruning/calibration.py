"""Calibration data in any form, turned into calls of the model."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

import torch
from torch import Tensor, nn

__all__ = ["Batch", "describe", "distinct_tokens", "read_calibration", "to_batch"]

_FORMS = "tensors, tuples of inputs or mappings of keyword inputs"


@dataclass(frozen=True)
class Batch:
    """One call of the model.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        given: The batch as the caller gave it, labels included.
        samples: The number of samples: the length of the first axis of its first tensor.
        named: All inputs by the names that the model's forward has for them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: Any
    samples: int
    named: Mapping[str, Any]

    def tensors(self) -> Iterator[Tensor]:
        """All tensors among the inputs."""
        yield from (leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor))

    def row_mask(self, shape: torch.Size) -> Tensor | None:
        """Which rows of inputs (..., in) are not padding, by the attention masks of these axes; None: all.

        Args:
            shape: The shape of the inputs without the last axis.
        """
        found = None
        for name, value in self.named.items():
            if not name.endswith("attention_mask") or not isinstance(value, Tensor) or value.ndim != 2:
                continue
            if value.shape == shape:
                if found is not None and not torch.equal(found, value):
                    return None  # of encoder and decoder: it cannot be told which
                found = value
            elif tuple(shape) == (value.numel(),) and found is None:
                found = value.reshape(-1)
        ids = self.named.get("decoder_input_ids")
        if isinstance(ids, Tensor) and ids.shape == shape and "decoder_attention_mask" not in self.named:
            return None
        return None if found is None else found.reshape(-1) != 0


def read_calibration(model: nn.Module, calibration: Any, samples: int) -> list[Batch]:
    """Returns the batches to calibrate a model with, about `samples` samples in total.

    If the calibration has a length, batches are taken at equal distances from the first to the last;
    otherwise the first ones are taken, so it may be endless.

    Args:
        model: The model that takes the inputs.
        calibration: An iterable of tensors (or arrays), tuples or lists of positional inputs, or mappings of
            keyword inputs; or one such mapping or tensor. If a tuple is longer than the model's forward
            takes, the rest (labels) is left out.
        samples: About how many samples.

    Raises:
        ValueError: There is no batch; a batch has another form, inputs that the model does not accept, or
            numbers that are not finite.
    """
    if isinstance(calibration, (Tensor, Mapping)):
        calibration = [calibration]
    if isinstance(calibration, (str, bytes)) or not isinstance(calibration, Iterable):
        got = type(calibration).__name__
        msg = f"calibration: expected an iterable of {_FORMS}; got {got}; tokenize texts first"
        raise ValueError(msg)
    signature = inspect.signature(model.forward)
    batches: list[Batch] = []
    iterator = iter(calibration)
    first = next(iterator, None)
    if first is None:
        msg = f"calibration: expected at least one batch of {_FORMS}; got none; an iterator is read only once"
        raise ValueError(msg)
    size = to_batch("calibration", signature, first, 0).samples
    wanted = max(1, math.ceil(samples / max(size, 1)))
    length = _length(calibration)
    chosen = None
    if length is not None and length > wanted:
        chosen = {i * length // wanted for i in range(wanted)}
    seen = 0
    for i, given in enumerate(itertools.chain([first], iterator)):
        if chosen is None or i in chosen:
            batches.append(to_batch("calibration", signature, given, i))
            seen += batches[-1].samples
        if (chosen is None and seen >= samples) or (chosen is not None and len(batches) == len(chosen)):
            break
    if not any(batch.samples for batch in batches):
        msg = "calibration: expected samples; got batches without any; leave empty ones out"
        raise ValueError(msg)
    return [batch for batch in batches if batch.samples]


def _length(calibration: Any) -> int | None:
    try:
        return len(calibration) if isinstance(calibration, Sized) else None
    except TypeError:  # a DataLoader of an iterable data set
        return None


def to_batch(what: str, signature: inspect.Signature, given: Any, index: int) -> Batch:
    """Returns a batch as a call of the model, checked against its forward; `what` names the argument."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(given, Mapping):
        kwargs = {str(name): _tensor(value) for name, value in given.items()}
    elif isinstance(given, (tuple, list)):
        args = tuple(_tensor(value) for value in given)
        args = args[: _positional(signature)]
    else:
        args = (_tensor(given),)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors:
        got = type(given).__name__
        msg = f"{what}: batch {index}: expected {_FORMS}; got {got} without a tensor; tokenize texts"
        raise ValueError(msg)
    try:
        named = _by_name(signature, args, kwargs)
    except TypeError as error:
        names = ", ".join(signature.parameters)
        got = ", ".join(kwargs) if kwargs else f"{len(args)} positional ones"
        msg = (
            f"{what}: batch {index}: expected inputs of the model's forward({names}); got {got} "
            f"({error}); rename or drop some"
        )
        raise ValueError(msg) from error
    for tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            msg = f"{what}: batch {index}: expected finite numbers; got NaN or infinity; leave it out"
            raise ValueError(msg)
    first = tensors[0]
    return Batch(args, kwargs, given, first.shape[0] if first.ndim else 1, named)


def _by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The inputs by name; TypeError for those that a forward does not take."""
    bound = signature.bind(*args, **kwargs).arguments
    rest = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    return {name: value for name, value in bound.items() if name not in rest} | dict(kwargs)


def _positional(signature: inspect.Signature) -> int | None:
    """How many positional inputs a forward takes; None: any number."""
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    return sum(
        kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds
    )


def _tensor(value: Any) -> Any:
    """Converts an array to a tensor; returns anything else unchanged."""
    return torch.from_numpy(value) if type(value).__module__ == "numpy" and hasattr(value, "dtype") else value


def distinct_tokens(batches: Iterable[Batch]) -> tuple[int, int] | None:
    """The number of different token ids, and of all token ids; None if the inputs are not token ids."""
    found: list[Tensor] = []
    for batch in batches:
        ids = batch.named.get("input_ids", batch.args[0] if batch.args else None)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype is torch.bool or ids.ndim < 1:
            return None
        mask = batch.row_mask(ids.shape)
        flat = ids.reshape(-1)
        found.append(flat if mask is None else flat[mask])
    tokens = torch.cat(found)
    return int(torch.unique(tokens).numel()), int(tokens.numel())


def describe(batches: Sequence[Batch]) -> str:
    """The amount of calibration data, for a report."""
    text = f"{sum(batch.samples for batch in batches)} samples in {len(batches)} batches"
    tokens = distinct_tokens(batches)
    return text if tokens is None else f"{text}, {tokens[1]} tokens, {tokens[0]} of them distinct"
