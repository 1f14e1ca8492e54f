"""MiniLM pruned in float32, rounded to int8 afterwards, and both together: quality and size in one table.

    python benchmarks/quality/minilm_int8.py --data FOLDER

Model, data and halves as in minilm_sts.py: sentences of one half calibrate, the other is evaluated. "int8
products" are those of packed layers, which round their inputs too; every encoder matrix is packed, whatever
it gains. "int8 embeddings" have their rows rounded. MB are what `sparsam.torch.save` writes; MB in memory,
all parameters of the model that it loads again.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

import sparsam.torch
import torch
from minilm_sts import Encoder, calibration, load
from minilm_table import megabytes
from sparsam.torch.acceleration.memory import parameter_bytes
from torch import nn


def packed(model: nn.Module, dtype: torch.dtype | None = None, *, embeddings: bool = False) -> nn.Module:
    """A copy with every matrix of the encoder packed, and embeddings if they are to be."""
    result = copy.deepcopy(model)
    for name, layer in result.named_modules():
        matrix = isinstance(layer, nn.Linear) and name.startswith("encoder")
        if matrix or (embeddings and isinstance(layer, nn.Embedding)):
            sparsam.torch.pack(layer, dtype=dtype)
    return result


def resident(model: nn.Module) -> float:
    """MB of the parameters of what a file gives back."""
    loaded = copy.deepcopy(model)
    sparsam.torch.restore(loaded)
    with tempfile.TemporaryDirectory() as folder:
        sparsam.torch.save(model, folder)
        sparsam.torch.load(folder, loaded)
    return parameter_bytes(loaded) / 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=os.environ.get("SPARSAM_STS"), help="has sts-dev.csv")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8])
    parser.add_argument("--method", default="admm")
    parser.add_argument("--samples", type=int, default=1024, help="sentences of calibration")
    parser.add_argument("--seed", type=int, default=0, help="draws them")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("expected --data FOLDER with sts-dev.csv, or SPARSAM_STS")
    torch.set_num_threads(options.threads)
    sparsam.set_num_threads(options.threads)
    quiet: Any = logging  # not typed
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    encoder = Encoder()
    source, evaluated = load(Path(options.data))
    batches = calibration(encoder, source, evaluated, options.samples, options.seed)
    top = encoder.spearman(encoder.model, evaluated)
    print("| zeros | model | Spearman x 100 | MB | MB in memory |\n|---|---|---|---|---|")
    sizes = f"{megabytes(encoder.model):.1f} | {resident(encoder.model):.1f}"
    print(f"| 0 % | dense | {top:.2f} | {sizes} |", flush=True)
    for sparsity in options.sparsities:
        models = {}
        for values in (None, "int8"):
            model = copy.deepcopy(encoder.model)
            begun = time.perf_counter()
            sparsam.torch.prune(
                model,
                None,
                batches,
                target_sparsity=sparsity,
                exclude=("pooler",),
                method=options.method,
                values=values,
            )
            print(
                f"{sparsity:.0%} {values}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True
            )
            models[values] = model
        fast = packed(models["int8"], torch.int8)
        for name, parameter in fast.named_parameters():
            assert torch.equal(parameter.to_dense(), models["int8"].get_parameter(name)), name
        rows = {
            "pruned, float32": models[None],
            "then int8 products": packed(models[None], torch.int8),
            "and int8 embeddings too": packed(models[None], torch.int8, embeddings=True),
            "pruned and rounded together": models["int8"],
            "with int8 products": fast,
            "with int8 products and embeddings": packed(models["int8"], torch.int8, embeddings=True),
        }
        for name, model in rows.items():
            score = encoder.spearman(model, evaluated)
            sizes = f"{megabytes(model):.1f} | {resident(model):.1f}"
            print(f"| {sparsity:.0%} | {name} | {score:.2f} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
