from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from training_cases import equal_states, mlp

import torch
from sparsam.torch import Pruner

CASES: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "movement": {"method": "movement", "scope": "global"},
    "rigl": {"regrow": "rigl"},
    "set": {"regrow": "set"},
}


def work(rank: int, folder: str) -> None:
    """One of two processes: other data each, and another start, which DistributedDataParallel overwrites."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for case, options in CASES.items():
        model = DistributedDataParallel(mlp(rank))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
        pruner = Pruner(model, target_sparsity=0.8, end=8, every=2, optimizer=optimizer, **options)
        for step in range(12):
            optimizer.zero_grad()
            for part in range(2):  # Gradients are accumulated, and exchanged with the second part.
                inputs = torch.randn(
                    8, 20, generator=torch.Generator().manual_seed(100 * step + 10 * rank + part)
                )
                if part == 0:
                    with model.no_sync():
                        (model(inputs).square().mean() - inputs.mean()).backward()
                else:
                    (model(inputs).square().mean() - inputs.mean()).backward()
            pruner.mask_gradients()
            optimizer.step()
            pruner.step()
        torch.save([model.module.state_dict(), pruner.state_dict()], f"{folder}/{case}-{rank}.pt")
    dist.destroy_process_group()


def test_both_processes_have_the_same_masks_bit_for_bit(tmp_path: Path) -> None:
    start: Any = spawn
    start(work, (str(tmp_path),), nprocs=2)
    for case in CASES:
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
