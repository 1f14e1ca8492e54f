"""MiniLM with sparsities chosen for latency, against uniform: Spearman on the STS benchmark and time.

    python benchmarks/quality/minilm_latency.py --data FOLDER

Model, data and calibration as in minilm_sts.py. The plan's budget of error is that of the uniform sparsity,
times each of `--budgets`; both models are pruned by the same method on the same sentences, accelerated, and
timed in turn on 8 sentences of 64 tokens.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from minilm_sts import Encoder, calibration, load
from sparsam.torch import accelerate, latency_plan, prune
from torch import Tensor, nn

ROUNDS = 30


def times(models: Sequence[nn.Module], inputs: dict[str, Tensor]) -> list[float]:
    """Median seconds of each, measured in turn."""
    taken: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for number in range(ROUNDS + 3):
            for model, found in zip(models, taken, strict=True):
                start = time.perf_counter()
                model(**inputs)
                if number >= 3:
                    found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in taken]


def passages(encoder: Encoder, sentences: Sequence[str]) -> dict[str, Tensor]:
    """8 x 64 tokens of sentences one after another: errors are measured on it, so it is no random text."""
    texts = [" ".join(sentences[i::8]) for i in range(8)]
    options = {"truncation": True, "max_length": 64, "return_tensors": "pt"}
    return dict(encoder.tokenizer(texts, **options))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("SPARSAM_STS"), help="folder of sts-dev.csv"
    )
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0], help="times the uniform error")
    parser.add_argument("--method", default="obs")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    encoder = Encoder()
    source, evaluated = load(options.data)
    taken = set(evaluated.sentences)
    batches = calibration(encoder, source, evaluated, options.samples, options.seed)
    inputs = passages(encoder, [sentence for sentence in source.sentences if sentence not in taken])
    exclude = ("pooler*",)
    plan = latency_plan(
        encoder.model, [inputs, *batches], sparsity=options.sparsity, exclude=exclude, calibration_samples=264
    )
    models = {"dense": encoder.model, f"uniform {options.sparsity:.0%}": copy.deepcopy(encoder.model)}
    prune(
        models[f"uniform {options.sparsity:.0%}"],
        calibration=batches,
        method=options.method,
        target_sparsity=options.sparsity,
        exclude=exclude,
    )
    for budget in options.budgets:
        own = plan.within(budget * sum(step.error for step in plan.uniform.values()))
        print(own)
        model = copy.deepcopy(encoder.model)
        config: dict[str, Any] = {"target_sparsity": own.sparsity, "allocation": own.sparsities}
        prune(model, calibration=batches, method=options.method, exclude=exclude, **config)
        models[f"latency, budget {budget:g}, {own.sparsity:.1%} in all"] = model
    scores = {name: encoder.spearman(model, evaluated) for name, model in models.items()}
    for name, model in models.items():
        if name != "dense":
            accelerate(model, inputs, verbose=False)
    seconds = times(list(models.values()), inputs)
    print("| model | Spearman x 100 | 8 x 64, ms |\n| --- | --- | --- |")
    for (name, score), took in zip(scores.items(), seconds, strict=True):
        print(f"| {name} | {score:.2f} | {1e3 * took:.2f} |")


if __name__ == "__main__":
    main()
