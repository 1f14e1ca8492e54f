"""What each process of the tests of DistributedDataParallel does: a module that they can import."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training_cases import mlp

import torch
from sparsam.torch import PackedTensor, Pruner, pack, prune

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
    train_pruned(rank, folder)
    train_after_packed(rank, folder)
    dist.destroy_process_group()


def train_pruned(rank: int, folder: str) -> None:
    """A model that `prune` pruned, with other calibration in each process, is trained further."""
    plain = mlp(rank)
    batches = [torch.randn(64, 20, generator=torch.Generator().manual_seed(10 * rank + i)) for i in range(5)]
    prune(plain, None, batches, target_sparsity=0.8)
    model = DistributedDataParallel(plain)  # both have what process 0 pruned from here on
    pruner = Pruner(model, target_sparsity=0.8, schedule="one_shot")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    for step in range(4):
        optimizer.zero_grad()
        inputs = torch.randn(8, 20, generator=torch.Generator().manual_seed(10 * step + rank))
        model(inputs).square().mean().backward()
        optimizer.step()
        pruner.step()
    torch.save([plain.state_dict(), pruner.state_dict()], f"{folder}/pruned-{rank}.pt")


def train_after_packed(rank: int, folder: str) -> None:
    """What follows a frozen packed layer is trained; the layer of process 0 is in both."""
    plain = mlp(rank)
    prune(plain, None, None, target_sparsity=0.8)
    first: Any = pack(plain[0].requires_grad_(requires_grad=False))
    model = DistributedDataParallel(plain)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        inputs = torch.randn(8, 20, generator=torch.Generator().manual_seed(10 * step + rank))
        model(inputs).square().mean().backward()
        optimizer.step()
    assert isinstance(first.weight, PackedTensor)
    torch.save([plain.state_dict(), model(torch.ones(2, 20)).detach()], f"{folder}/packed-{rank}.pt")
