"""compress: read, prune, distill, accelerate, save, measure."""

from __future__ import annotations

import copy
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sparsam.checkpoint.streaming import FILE_KINDS
from sparsam.config import PruningConfig
from sparsam.inputs.checks import expected, is_number
from sparsam.pruner import configured
from sparsam.torch.acceleration.workflow import accelerate
from sparsam.torch.compression.compression_report import CompressionReport, Stage
from sparsam.torch.compression.model_directory import (
    ModelDirectory,
    copy_companions,
    read_directory,
    weight_bytes,
    without_bars,
)
from sparsam.torch.compression.quality import QualityMeasure, check_outputs, mean_state
from sparsam.torch.compression.texts import TextBatches, batches_of, distinct_texts, read_texts
from sparsam.torch.compression.timing import example, time_in_turn
from sparsam.torch.compression.training_texts import TrainingTexts
from sparsam.torch.pruning.distillation import distill
from sparsam.torch.pruning.gradients import GRADIENT_METHODS
from sparsam.torch.pruning.one_shot import prune
from torch import Tensor, nn

__all__ = ["SAMPLES", "check_minutes", "compress", "read_arguments", "texts_of"]

SAMPLES = {"sentences": 1024, "windows": 64}  # of calibration, at most
_CURVE = (0.5, 0.6, 0.7, 0.8, 0.9)
_SHAPES = {False: ((1, 16), (8, 64), (32, 128)), True: ((1, 1), (1, 64), (8, 128))}  # by whether it is causal
_SECONDS = 2.0  # of timing for each shape


def compress(
    model: str | Path,
    calibration: str | Path | Sequence[str],
    output: str | Path,
    config: PruningConfig | None = None,
    *,
    distill_minutes: float = 0.0,
    shapes: Sequence[tuple[int, int]] | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> CompressionReport:
    """Makes a Hugging Face model smaller and faster, measures its quality, and saves it.

    The model is pruned in sequence towards the outputs of the dense one (`prune` with calibration),
    optionally distilled from it, and its pruned layers run packed where that is faster (`accelerate`). One
    text in ten, 256 at most, is held out: the quality of each stage is measured on these alone.

    Args:
        model: A directory that transformers reads: an encoder or a decoder, with its tokenizer.
        calibration: A UTF-8 file with a text on each line, or the texts; no labels.
        output: The directory to write; it must not exist. Everything in `model` besides its weights is
            copied, except folders with the dense model in other formats, such as `onnx`; `from_pretrained`
            reads it once `sparsam.torch` is imported.
        config: What to prune; `PruningConfig(target_sparsity=0.8, method="admm")` if left out.
        distill_minutes: How long to train on the texts afterwards; 0: not at all. If that does not improve
            the held-out quality, the weights from before are kept.
        shapes: (texts, tokens) of the inputs that the model is accelerated for and timed with.
        progress: Called with the name of the current step, the number of finished steps and their total.

    Returns:
        Quality, bytes and time of each stage.

    Raises:
        ValueError: The model is not supported, there is too little text, `output` exists or is inside
            `model`; as for `prune`.
        ImportError: transformers is not installed.
    """
    start = time.perf_counter()
    target, given = read_arguments(model, output, config)
    check_minutes(distill_minutes)
    texts = texts_of(calibration)
    parts = 6 if distill_minutes else 5
    progress("reading", 0, parts)
    source = read_directory(Path(model), target)
    batches = batches_of(texts, source.tokenizer, running=source.causal, longest=source.longest)
    check_outputs(source.model, batches.held_out[0])
    chosen = _shapes(source, shapes)
    configured_as: Any = source.model.config
    vocabulary = int(configured_as.vocab_size)
    examples = [example(shape, vocabulary) for shape in chosen]
    work = _Work(source, batches)
    work.reach("dense", source.nbytes)

    progress("pruning", 1, parts)
    pruned = prune(work.model, given, batches.calibration, calibration_samples=SAMPLES[batches.unit])
    work.sparsity = pruned.pruned_sparsity
    work.reach("pruned")
    if distill_minutes:
        progress("distilling", 2, parts)
        before = {name: tensor.detach().clone() for name, tensor in work.model.named_parameters()}
        pooled = mean_state if work.stages[0].quality.measure == "similarity" else None
        texts_in_turn = TrainingTexts(
            batches.texts, source.tokenizer, running=source.causal, longest=source.longest
        )
        distill(work.model, work.dense, texts_in_turn, seconds=60 * distill_minutes, output=pooled)
        work.reach("distilled")
        work.keep_the_better(before)

    progress("comparing", parts - 3, parts)
    curve = work.curve(given)
    progress("accelerating", parts - 2, parts)
    accelerated = accelerate(work.model, examples, verbose=False)
    _save(work.model, source, target)
    work.reach("accelerated", weight_bytes(target / source.part))
    progress("measuring", parts - 1, parts)
    timings = time_in_turn(work.dense, work.model, examples, _SECONDS)
    progress("measuring", parts, parts)
    return CompressionReport(
        str(source.path),
        f"calibrated on {batches.rows(batches.calibration):,} {batches.unit}, "
        f"quality on {batches.rows(batches.held_out):,} others",
        tuple(work.stages),
        curve,
        tuple((stage.sparsity, stage.quality.value) for stage in work.stages if stage.name == "pruned"),
        timings,
        pruned,
        accelerated,
        time.perf_counter() - start,
    )


def read_arguments(
    model: str | Path, output: str | Path, config: PruningConfig | None
) -> tuple[Path, PruningConfig]:
    """Returns the directory to write and what to prune; raises as `compress` for either."""
    for what, value in (("model", model), ("output", output)):
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError(expected(what, value, "the path of a directory", "pass text or a Path"))
    target = Path(output)
    if target.exists() or target.is_symlink():
        raise ValueError(expected("output", str(target), "a directory that does not exist yet", "remove it"))
    if target.suffix.lower() in FILE_KINDS | {".safetensors"}:
        do = "leave the ending out: a Hugging Face directory is written"
        raise ValueError(expected("output", str(target), "the name of a directory", do))
    given = PruningConfig(target_sparsity=0.8, method="admm") if config is None else configured(config)
    if given.method in GRADIENT_METHODS:
        wanted = "one that needs no labels: 'admm', 'obs', 'wanda', 'ria', 'magnitude' or 'random'"
        raise ValueError(expected("method", given.method, wanted, "use sparsam.torch.prune with a loss_fn"))
    return target, given


def check_minutes(minutes: float) -> None:
    """Raises ValueError for anything but a time of at least 0."""
    if not (is_number(minutes) and math.isfinite(minutes) and minutes >= 0):
        raise ValueError(expected("distill_minutes", minutes, "a number from 0", "leave it out"))


def texts_of(calibration: str | Path | Sequence[str]) -> list[str]:
    """Returns the texts of a file or a list; raises as `compress`."""
    if isinstance(calibration, (str, os.PathLike)):
        return read_texts(Path(calibration))
    if isinstance(calibration, Iterable):
        return distinct_texts(calibration)
    raise TypeError(expected("calibration", calibration, "a file or texts", "pass a list of texts"))


def _shapes(source: ModelDirectory, shapes: Sequence[tuple[int, int]] | None) -> tuple[tuple[int, int], ...]:
    """The requested shapes, checked, or the default ones."""
    if not shapes:
        return tuple((rows, min(tokens, source.longest)) for rows, tokens in _SHAPES[source.causal])
    for shape in shapes:
        if not isinstance(shape, Sequence) or len(shape) != 2:
            raise ValueError(expected("shapes", shape, "pairs (texts, tokens)", "pass ((1, 16),), say"))
        rows, tokens = shape
        if rows < 1 or not 1 <= tokens <= source.longest:
            wanted = f"(texts, tokens) from (1, 1), of at most {source.longest} tokens"
            raise ValueError(expected("shapes", (rows, tokens), wanted, "correct it"))
    return tuple(shapes)


class _Work:
    """The model being compressed, its dense original, and the measurements so far."""

    def __init__(self, source: ModelDirectory, batches: TextBatches) -> None:
        self.dense: nn.Module = copy.deepcopy(source.model)
        self.model = source.model
        self.measure = QualityMeasure(self.dense, batches.held_out, causal=source.causal)
        self.sparsity = 0.0
        self.stages: list[Stage] = []
        self._since = time.perf_counter()

    def reach(self, name: str, nbytes: int | None = None) -> None:
        """Measures the quality of a stage."""
        seconds = time.perf_counter() - self._since
        self.stages.append(Stage(name, self.sparsity, self.measure.of(self.model), nbytes, seconds))
        self._since = time.perf_counter()

    def keep_the_better(self, before: Mapping[str, Tensor]) -> None:
        """Undoes the last stage if its quality is lower than that of the stage before."""
        earlier, last = (stage.quality for stage in self.stages[-2:])
        if last.value > earlier.value if last.measure == "perplexity" else last.value < earlier.value:
            with torch.no_grad():
                for name, tensor in self.model.named_parameters():
                    tensor.copy_(before[name])

    def curve(self, config: PruningConfig) -> tuple[tuple[float, float], ...]:
        """The quality after magnitude pruning at some sparsities, on copies of the dense model."""
        points = [(0.0, self.stages[0].quality.value)]
        plain = PruningConfig(exclude=config.exclude)
        for sparsity in _CURVE:
            other = copy.deepcopy(self.dense)
            prune(other, plain.with_changes(target_sparsity=sparsity))
            points.append((sparsity, self.measure.of(other).value))
        self._since = time.perf_counter()
        return tuple(points)


def _save(model: nn.Module, source: ModelDirectory, target: Path) -> None:
    """Writes the directory beside its place, and renames it when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        saved: Any = model
        with without_bars():
            saved.save_pretrained(beside / source.part)
        umask = _umask()
        beside.chmod(0o777 & ~umask)
        for file in beside.rglob("*.safetensors"):
            file.chmod(0o666 & ~umask)  # safetensors 0.8 makes files that only their owner can read
        copy_companions(source.path, beside, source.part)
        os.rename(beside, target)  # noqa: PTH104 - fails if the target came into being meanwhile
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
