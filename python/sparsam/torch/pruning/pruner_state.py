"""The state of a `Pruner` for `torch.save`, and back, checked before anything is restored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import torch
from sparsam.inputs.checks import check_sparsity, expected
from sparsam.masks import Mask
from torch import Tensor

__all__ = ["SavedPruner", "packed"]

_DO = "pass the pruner's own state"


def packed(mask: Mask) -> Tensor:
    """A mask as a tensor of bytes."""
    return torch.from_numpy(np.frombuffer(mask.to_bytes(), np.uint8).copy())


@dataclass(frozen=True)
class SavedPruner:
    """The content of a state.

    Attributes:
        identity: The identity of the pruner.
        steps: The number of calls of `step`.
        due: Whether an update is due.
        sparsity: The sparsity of the last update.
        masks: Name -> mask.
        evidence: The sums of gradients, if the method needs them; not checked.
    """

    identity: Mapping[str, Any]
    steps: int
    due: bool
    sparsity: float
    masks: Mapping[str, Mask]
    evidence: Any

    @classmethod
    def read(cls, state: object, keys: Collection[str]) -> SavedPruner:
        """Reads a state; ValueError for anything that `state_dict` did not return."""
        if not isinstance(state, Mapping) or set(state) != set(keys):
            got = sorted(map(str, state)) if isinstance(state, Mapping) else state
            raise ValueError(expected("state", got, f"what state_dict() returned: {sorted(keys)}", _DO))
        for key, kind in (("identity", Mapping), ("masks", Mapping), ("steps", int), ("due", bool)):
            if not isinstance(state[key], kind):
                raise ValueError(expected("state", state[key], f"{key!r} as state_dict() returned it", _DO))
        try:
            bits = {name: tensor.numpy().tobytes() for name, tensor in state["masks"].items()}
            masks = {name: Mask.from_bytes(data) for name, data in bits.items()}
        except (AttributeError, TypeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}"
            msg = f"state: expected 'masks' as state_dict() returned them; got others ({got}); {_DO}"
            raise ValueError(msg) from error
        sparsity = check_sparsity("state: sparsity", state["sparsity"])
        return cls(state["identity"], state["steps"], state["due"], sparsity, masks, state["evidence"])
