"""Models in files and on the meta device, and what pruning them in memory gives."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

import torch
from sparsam.torch import prune, prune_files
from torch import Tensor, nn


def on_meta(model: nn.Module) -> nn.Module:
    """A copy without values, but for its buffers."""
    memo: dict[int, object] = {
        id(one): nn.Parameter(one.detach().to("meta"), requires_grad=False) for one in model.parameters()
    }
    return copy.deepcopy(model, memo)


def saved(model: nn.Module, file: Path, kind: torch.dtype | None = None) -> dict[str, Tensor]:
    """Writes a model's state, what is shared once, its floats in another dtype; returns it."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            plain = tensor.detach().clone().contiguous()
            state[name] = plain.to(kind) if kind is not None and plain.is_floating_point() else plain
    save_file(state, file, {"format": "pt"})
    return state


def in_memory(model: nn.Module, state: dict[str, Tensor], batches: Any, **options: Any) -> Any:
    """What `prune` gives on the model with this state, in the dtypes of the state; and its report."""
    other = copy.deepcopy(model)
    other.load_state_dict(state, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = prune(other, None, batches, **options)
    new = other.state_dict()
    return {name: new[name].to(tensor.dtype) for name, tensor in state.items()}, report


def from_files(model: nn.Module, source: Path, target: Path, batches: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prune_files(on_meta(model), source, target, batches, **options)


def check_same(found: Path, wanted: dict[str, Tensor]) -> None:
    state = load_file(found)
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(bits(state[name]), bits(tensor), err_msg=name)


def bits(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def rows(report: Any) -> Sequence[tuple[Any, ...]]:
    """What a report says, but for the dtype of what is stored."""
    return [(row.name, row.pruned_params, row.error, row.note, row.pattern) for row in report.layers]
