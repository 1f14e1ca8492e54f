"""MiniLM pruned, distilled, accelerated: quality, size and time of each stage in one table.

    python benchmarks/quality/minilm_table.py --data FOLDER --seconds 600 --keep MODELS
    python benchmarks/quality/minilm_table.py --data FOLDER --keep MODELS --threads 2

Model, data and halves as in minilm_sts.py: sentences of the first half calibrate and distil, without scores
and without those that occur in the second, which is evaluated. `--text FILE` gives the distillation more
unlabelled text to learn from: plain prose, of which sentences are made. The first command leaves weights in
MODELS, the second measures with them: on a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers.utils import logging

import sparsam.torch
import torch
from minilm_sts import Encoder, calibration, check, load
from sparsam.torch.compression.timing import Timing, example, time_in_turn
from sparsam.torch.compression.training_texts import TrainingTexts
from torch import Tensor, nn

SHAPES = ((1, 16), (8, 64), (32, 128))  # sentences x tokens


class Clock:
    """Seconds since it was made, and CPU seconds of all threads: what counts on a machine with other work."""

    def __init__(self) -> None:
        self.begun, self.worked = time.perf_counter(), time.process_time()

    def __str__(self) -> str:
        return (
            f"{time.perf_counter() - self.begun:.0f} s, {time.process_time() - self.worked:.0f} CPU seconds"
        )


def pooled(result: Any, batch: Any) -> Tensor:
    """Sentences as the means over their tokens."""
    mask = batch.kwargs["attention_mask"][..., None]
    means: Tensor = (result.last_hidden_state * mask).sum(1) / mask.sum(1)
    return means


def megabytes(model: nn.Module) -> float:
    """The size of what `sparsam.torch.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        sparsam.torch.save(model, folder)
        return sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=os.environ.get("SPARSAM_STS"), help="has sts-dev.csv")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--seconds", type=float, default=600, help="of distillation, for each sparsity")
    parser.add_argument("--steps", type=int, help="of distillation instead, so that it can be repeated")
    parser.add_argument("--batch", type=int, default=16, help="sentences of a step")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0, help="draws the sentences of calibration")
    parser.add_argument(
        "--text", type=Path, nargs="*", default=[], help="more unlabelled text to distil from"
    )
    parser.add_argument("--keep", type=Path, help="folder of distilled weights: used if there, else written")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("expected --data FOLDER with sts-dev.csv, or SPARSAM_STS")
    torch.set_num_threads(options.threads)
    quiet: Any = logging  # not typed
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    encoder = Encoder()
    source, evaluated = load(Path(options.data))
    top, floor = (encoder.spearman(model, evaluated) for model in (encoder.model, encoder.floor()))
    batches = calibration(encoder, source, evaluated, 1024, options.seed)
    texts = {*source.sentences, *(one for file in options.text for one in prose(file))}
    texts -= set(evaluated.sentences)
    size = int(encoder.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    examples = [example(shape, size) for shape in SHAPES]
    names = " | ".join(f"{rows} x {tokens}, ms" for rows, tokens in SHAPES)
    print(f"dense {top:.2f}, all encoder matrices zero {floor:.2f}\n")
    print(f"| zeros | model | Spearman x 100 (kept) | MB | {names} |\n" + "|---" * (4 + len(SHAPES)) + "|")
    print(f"| 0 % | dense | {top:.2f} (100 %) | {megabytes(encoder.model):.1f} |" + " - |" * len(SHAPES))

    def row(
        sparsity: float, name: str, score: float, model: nn.Module, times: Sequence[Timing] | None
    ) -> str:
        kept = 100 * (score - floor) / (top - floor)
        cells = ["-"] * len(SHAPES)
        if times is not None:
            cells = [f"{t.accelerated_ms:.2f} (dense {t.dense_ms:.2f}: {t.speedup:.2f}x)" for t in times]
        size = f"{megabytes(model):.1f}"
        return f"| {sparsity:.0%} | {name} | {score:.2f} ({kept:.0f} %) | {size} | {' | '.join(cells)} |"

    for sparsity in options.sparsities:
        stem = f"minilm-{sparsity:g}-{options.seed}"
        model = left_in(options.keep, f"{stem}-pruned.pt", encoder.model)
        if model is None:
            model = copy.deepcopy(encoder.model)
            clock = Clock()
            sparsam.torch.prune(model, None, batches, target_sparsity=sparsity, exclude=("pooler",))
            print(f"{sparsity:.0%} pruned: {clock}", file=sys.stderr, flush=True)
            leave_in(options.keep, f"{stem}-pruned.pt", model)
        distilled = left_in(options.keep, f"{stem}-distilled.pt", encoder.model)
        if distilled is None:
            distilled, clock = copy.deepcopy(model), Clock()
            torch.manual_seed(options.seed)  # of the variants of sentences
            report = sparsam.torch.distill(
                distilled,
                encoder.model,
                TrainingTexts(
                    sorted(texts),
                    encoder.tokenizer,
                    running=False,
                    longest=256,
                    rows=options.batch,
                    seed=options.seed,
                ),
                steps=options.steps,
                seconds=None if options.steps else options.seconds,
                output=pooled,
                learning_rate=options.rate,
            )
            print(f"{report}; {clock}", file=sys.stderr, flush=True)
            leave_in(options.keep, f"{stem}-distilled.pt", distilled)
        check(model, f"{sparsity}")
        check(distilled, f"{sparsity}")
        last = encoder.spearman(distilled, evaluated)
        for name, one in (("pruned", model), ("distilled", distilled)):
            print(row(sparsity, name, encoder.spearman(one, evaluated), one, None), flush=True)
        variants: tuple[tuple[str, Literal["int8"] | None], ...] = (
            ("accelerated", None),
            ("accelerated, int8", "int8"),
        )
        for name, values in variants:
            fast = copy.deepcopy(distilled)
            sparsam.torch.accelerate(fast, examples, values=values, keep_dense=values is None, verbose=False)
            times = time_in_turn(encoder.model, fast, examples, 2.0)
            score = encoder.spearman(fast, evaluated)
            assert abs(score - last) < (0.05 if values is None else 0.5), f"{name}: {last:.2f} -> {score:.2f}"
            print(row(sparsity, name, score, fast, times), flush=True)


def left_in(folder: Path | None, name: str, like: nn.Module) -> nn.Module | None:
    """A model whose weights an earlier call left in a folder."""
    if folder is None or not (folder / name).is_file():
        return None
    model = copy.deepcopy(like)
    model.load_state_dict(torch.load(folder / name, weights_only=True))
    return model


def leave_in(folder: Path | None, name: str, model: nn.Module) -> None:
    """Leaves the weights of a model in a folder, if there is one."""
    if folder is not None:
        folder.mkdir(exist_ok=True)
        torch.save(model.state_dict(), folder / name)


def prose(file: Path) -> list[str]:
    """The sentences of a text, of 20 to 300 characters: paragraphs split where a full stop ends a word."""
    text = file.read_text(encoding="utf-8")
    parts = (
        part.strip()
        for line in text.splitlines()
        for part in re.split(r"(?<=[a-z)\"] [.?!]) |(?<=[a-z][.?!]) ", line)
    )
    return [part for part in parts if 20 <= len(part) <= 300 and not part.startswith("=")]


if __name__ == "__main__":
    main()
