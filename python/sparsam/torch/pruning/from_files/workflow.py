"""`prune_files`: prunes a model that memory does not hold, with calibration, from file to file."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from sparsam.checkpoint import companions, files, streaming
from sparsam.checkpoint.json_state import decode
from sparsam.checkpoint.layout import read_layout
from sparsam.checkpoint.plan import parse_size
from sparsam.checkpoint.staging import Staging, open_staging
from sparsam.config import ConfigFields, PruningConfig
from sparsam.inputs.checks import expected, positive
from sparsam.torch.pruning.calibration import Batch, describe, read_calibration
from sparsam.torch.pruning.from_files.job import Job
from sparsam.torch.pruning.from_files.parts_in_turn import PartsInTurn
from sparsam.torch.pruning.from_files.shard_writing import write_shards
from sparsam.torch.pruning.prune_plan import check_executor, check_values, settings_of
from sparsam.torch.pruning.pruning_report import PrunedWeight, PruningReport
from sparsam.torch.pruning.saved_progress import SavedProgress
from sparsam.torch.pruning.sequence import LayerSequence
from sparsam.torch.pruning.sequence_run import alike, prune_in_sequence
from sparsam.torch.pruning.spilling import spill_outputs
from sparsam.torch.pruning.twins import Twin
from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["prune_files"]


def prune_files(
    model: nn.Module,
    src: str | Path,
    dst: str | Path,
    calibration: Iterable[Any],
    config: PruningConfig | None = None,
    *,
    targets: Literal["dense", "own"] = "dense",
    values: Literal["int8", "int4"] | None = None,
    group: int | None = None,
    calibration_samples: int = 1024,
    memory: int | str | None = None,
    executor: Executor | None = None,
    progress: streaming.Progress | None = None,
    copy_beside: Callable[[Path, Path], None] | None = None,
    **changes: Unpack[ConfigFields],
) -> PruningReport:
    """Prunes a model from files to files, with calibration, and holds one block of it in memory at a time.

    It gives the bits of `prune` on the same model, loaded from these files, if that is then saved in the
    dtypes of the files. Blocks, the elements of the model's lists of modules, are read when all batches have
    come to them; what lies outside of blocks likewise, tables of embeddings row by row as they are used, and
    the head of a language model not at all. The outputs of layers lie in files meanwhile, and so do the new
    weights, in the dtype of the model. Shards keep their names, headers and metadata, and what is not pruned
    is copied byte for byte.

    All of it grows in a hidden folder by `dst`, and is seen only when it is complete. A run that was killed
    leaves that folder; the same call goes on in it, and reads the weights that are done instead of fitting
    them again.

    Args:
        model: On the meta device, with the names of the files: of transformers, made in
            `with torch.device("meta")`, its buffers on the CPU and with their values. It is not changed.
            Weights are computed with in its dtypes, whatever those of the files are.
        src: As for `sparsam.checkpoint.load`: a file, an index, or a directory.
        dst: The directory to write, new or not. If `src` is one file: also a file in .safetensors.
        calibration: As for `prune`.
        config: As for `prune`, in scope "layer" or "row"; not with ties, nor with allocations that read
            weights.
        targets: As for `prune`.
        values: As for `prune`.
        group: As for `prune`.
        calibration_samples: As for `prune`.
        memory: How many bytes the call may take beside what the process has: a number, or text like 2GiB. It
            is compared with what blocks and the work on them take; None: not at all.
        executor: As for `prune`.
        progress: Called with what is done, how much of it is, and of how much: weights, then bytes.
        copy_beside: Called with the directories to copy other files from and to, if both are directories;
            None: all that are no weights are copied.
        **changes: Fields of `PruningConfig` to set on top of `config`.

    Returns:
        The report of `prune`; sizes are those in the files.

    Raises:
        ValueError: As `prune` and `checkpoint.load`; the model has no blocks, weights that the files lack, or
            weights that several blocks share; memory is not enough; another run writes to `dst`.
        TypeError: `model` is not a module, or another argument is of another type.
        OSError: Files cannot be read or written.

    Warns:
        UserWarning: As `prune`.
    """
    begun = time.perf_counter()
    given = settings_of(config, changes, calibrated=True)
    if targets not in ("dense", "own"):
        raise ValueError(expected("targets", targets, "'dense' or 'own'", "use one of them"))
    check_values(values, group)
    most = positive("calibration_samples", calibration_samples)
    limit = None if memory is None else parse_size("memory", memory)
    file, shards = files.resolve(src)
    layouts = [read_layout(part) for part in streaming.parts_of(file, shards)]
    target, is_folder = streaming.target_of(dst, shards)
    job = Job.of(model, layouts, given, values=values, group=group)
    batches = read_calibration(model, calibration, most)
    said: list[str] = []
    dense_targets = targets == "dense" and job.plan.method.reconstructs
    if dense_targets and (text := alike(model, batches)):
        said.append(text)
        dense_targets = False
    check_executor(job.plan, executor)
    if limit is not None:
        job.check_memory(limit, targets=dense_targets)
    run = job.identity(batches, given, f"{targets} {values} {group}")
    show = progress or (lambda *_: None)
    with open_staging(target, is_folder=is_folder, run=run) as staging:
        if not staging.finished:
            layers = _prune(job, batches, staging, run, executor, limit, show, said, dense_targets)
            streaming.name_files(staging.files, file, shards, is_folder=is_folder)
            if is_folder and Path(src).is_dir():
                copy = copy_beside or partial(companions.copy, leave=target)
                copy(Path(src), staging.files)
            report = _Finished(layers, describe(batches), said)
            staging.finish(msgspec.json.encode(report).decode())
        else:
            report = decode(staging.finished, _Finished, str(target), "delete what the run left")
    for text in report.said:
        warnings.warn(text, UserWarning, stacklevel=2)
    return PruningReport(
        report.layers, report.calibration, time.perf_counter() - begun, report.said, values or ""
    )


class _Finished(msgspec.Struct):
    """The report of a run whose files are on the move."""

    layers: list[PrunedWeight]
    calibration: str
    said: list[str]


def _prune(
    job: Job,
    batches: Sequence[Batch],
    staging: Staging,
    run: str,
    executor: Executor | None,
    limit: int | None,
    show: streaming.Progress,
    said: list[str],
    dense_targets: bool,
) -> list[PrunedWeight]:
    """Fits all layers, whose new values lie in the folder of the run, and writes the shards."""
    weights = list(job.plan.weights.values())
    twins = [Twin(job.model, weights) for _ in range(2 if dense_targets else 1)]
    parts = PartsInTurn(job.parts, job.source, twins, job.heads)
    for twin in twins:
        spill_outputs(twin.model, staging.work / "activations", {part.name for part in job.parts})
    saved = SavedProgress(staging.work / "fitted", run)
    done = 0

    def step(what: str, count: int, *, skipped: bool = False) -> None:
        nonlocal done
        del what, skipped
        done += count
        show("pruning", done, len(weights))

    show("pruning", 0, len(weights))
    with LayerSequence(twins[0], twins[1] if dense_targets else None, batches, parts) as sequence:
        parts.follow([group.names for group in sequence.groups], sequence.layers, saved)
        known = prune_in_sequence(sequence, job.plan, executor, saved, step, said)
    return write_shards(job, known, parts, staging.files, limit or 1 << 31, show)
