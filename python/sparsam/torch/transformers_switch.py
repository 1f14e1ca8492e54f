"""Which attention models of Hugging Face transformers compute with, without importing transformers.

A model that computes with PyTorch's function, "sdpa", can compute with the core's (`transformers_attention`)
instead. Where that was done here, the models remember it, copies and pickles of them too.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

__all__ = ["NAME", "AttentionSwitch", "core_attention", "switch_back", "switch_by_name"]

NAME = "sparsam_sdpa"
_BEFORE = "sdpa"
_MARK = "_sparsam_attention_before"  # a plain attribute of a model, so that copies have it


class AttentionSwitch:
    """The models of transformers inside a model that compute with "sdpa" and could with the core's attention.

    Attributes:
        names: Their names; "" for the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        """Looks for them, and changes nothing."""
        self._models = {
            name: one
            for name, one in _every(model)
            if one.config._attn_implementation == _BEFORE and _can_compute(one)
        }
        self.names = tuple(self._models)

    def show(self, *, core: bool) -> None:
        """Lets them compute with the core's attention, or with PyTorch's."""
        for model in self._models.values():
            if core:
                _switch(model)
            else:
                _undo(model)


def core_attention(model: nn.Module) -> tuple[str, ...]:
    """The names of the models inside a model, "" for itself, that compute with the core's attention."""
    return tuple(name for name, one in _every(model) if one.config._attn_implementation == NAME)


def switch_by_name(model: nn.Module, names: Collection[str]) -> None:
    """Lets the models of these names compute with the core's attention, as they did when they were saved.

    One that computes with something else than "sdpa", since the caller chose that, stays as it is.

    Warns:
        UserWarning: There is no such model, or it cannot: it computes the same with its own attention.
    """
    found = dict(_every(model))
    for name in names:
        one = found.get(name)
        if one is not None and one.config._attn_implementation == NAME:
            continue
        if one is None or not _can_compute(one):
            got = "no model of transformers 5" if one is None else f"a {type(one).__name__} that cannot"
            warnings.warn(
                f"attention of {name or 'the model'!r}: expected a model of transformers that can compute "
                f"with {NAME!r}, as the saved one did; got {got}; it computes the same more slowly: use the "
                "version of transformers that the model was saved with",
                UserWarning,
                stacklevel=2,
            )
        elif one.config._attn_implementation == _BEFORE:
            _switch(one)


def switch_back(model: nn.Module) -> None:
    """Undoes what `AttentionSwitch` and `switch_by_name` did."""
    for module in model.modules():
        if _MARK in vars(module):
            _undo(module)


def _every(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The models of transformers inside a model, and itself, if the core's attention is known to that."""
    if "sparsam.torch.transformers_attention" in sys.modules:
        kind = sys.modules["transformers.modeling_utils"].PreTrainedModel
        for name, module in model.named_modules():
            if isinstance(module, kind):
                yield name, module


def _can_compute(model: Any) -> bool:
    """Whether a model of transformers can compute with the core's attention, by what it says itself."""
    try:
        if not model._can_set_attn_implementation():
            return False
        found: str = model.get_correct_attn_implementation(NAME)
    except (AttributeError, ImportError, ValueError):
        return False
    return found == NAME


def _switch(model: Any) -> None:
    """Models that share a configuration switch together; each remembers it, for it may be taken out alone."""
    vars(model).setdefault(_MARK, _BEFORE)
    model.config._attn_implementation = {"": NAME}  # not those of the configurations in it


def _undo(model: Any) -> None:
    before = vars(model).pop(_MARK, None)
    if before is not None and model.config._attn_implementation == NAME:  # else the user has changed it
        model.config._attn_implementation = {"": before}
