"""`Pruner`, pruned and packed models in DistributedDataParallel: two processes, gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distributed_work import CASES, work
from torch.multiprocessing.spawn import spawn
from training_cases import equal_states, mlp

import torch
from sparsam.torch import prune


def test_both_processes_have_the_same_masks_bit_for_bit(tmp_path: Path) -> None:
    start: Any = spawn
    start(work, (str(tmp_path),), nprocs=2)
    for case in (*CASES, "pruned"):
        (weights, state), (other_weights, other_state) = (
            torch.load(tmp_path / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1)
        )
        assert list(state["masks"]) == ["0.weight", "2.weight"]
        for name, mask in state["masks"].items():
            assert torch.equal(mask, other_state["masks"][name])
        first, second = mlp(), mlp()
        first.load_state_dict(weights)
        second.load_state_dict(other_weights)
        assert equal_states(first, second)
        pruned = sum(int((tensor == 0).sum()) for tensor in weights.values() if tensor.ndim > 1)
        grown_to_zero = pruned - round(0.8 * 640) - round(0.8 * 256)
        assert 0 <= grown_to_zero <= 4  # A weight that grew may have no gradient yet.
    (weights, outputs), (other_weights, other_outputs) = (
        torch.load(tmp_path / f"packed-{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    start_of_0 = mlp(0)
    prune(start_of_0, None, None, target_sparsity=0.8)
    assert torch.equal(weights["0.weight"], start_of_0.state_dict()["0.weight"])
    assert not torch.equal(weights["2.weight"], start_of_0.state_dict()["2.weight"])
    assert all(torch.equal(other_weights[name], value) for name, value in weights.items())
    assert torch.equal(outputs, other_outputs)
