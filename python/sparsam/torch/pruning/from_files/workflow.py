"""`prune_files`: prunes a model that does not fit into memory, with calibration, from file to file."""

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
from sparsam.torch.pruning.activations import ActivationMeter
from sparsam.torch.pruning.calibration import Batch, describe, read_calibration
from sparsam.torch.pruning.forward_passes import Slots
from sparsam.torch.pruning.from_files.block_distillation import Training, distill_blocks
from sparsam.torch.pruning.from_files.distilled_blocks import DistilledBlocks
from sparsam.torch.pruning.from_files.job import Job
from sparsam.torch.pruning.from_files.needed_memory import Demand, Seen
from sparsam.torch.pruning.from_files.parts_in_turn import PartsInTurn
from sparsam.torch.pruning.from_files.shard_writing import write_shards
from sparsam.torch.pruning.prune_plan import check_executor, check_values, settings_of
from sparsam.torch.pruning.pruning_report import DistilledBlock, PrunedWeight, PruningReport
from sparsam.torch.pruning.saved_progress import SavedProgress
from sparsam.torch.pruning.sequence import LayerSequence
from sparsam.torch.pruning.sequence_run import alike, prune_in_sequence
from sparsam.torch.pruning.spilling import spill_outputs, spilled
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
    distill_steps: int | None = None,
    distill_seconds: float | None = None,
    progress: streaming.Progress | None = None,
    copy_beside: Callable[[Path, Path], None] | None = None,
    **changes: Unpack[ConfigFields],
) -> PruningReport:
    """Prunes a model from files to files, with calibration, and holds one block of it in memory at a time.

    The result is bit for bit that of `prune` on the same model, loaded from these files and then saved in
    their dtypes. Blocks, the elements of the model's lists of modules, are read when all batches have reached
    them, and so are parts outside of blocks; tables of embeddings are read row by row as they are used, and
    the head of a language model not at all. Meanwhile the outputs of layers are kept in files, and so are the
    new weights, in the dtype of the model. Shards keep their names, headers and metadata; tensors that are
    not pruned are copied byte for byte.

    Everything is written in a hidden folder beside `dst`, and moved when it is complete. A run that was
    killed leaves that folder; the same call continues in it, and reads finished weights instead of fitting
    them again.

    Args:
        model: A model on the meta device with the names of the files, for example one of transformers that
            was made in `with torch.device("meta")`, but with its buffers on the CPU and with their values. It
            is not changed. Computations use its dtypes, whatever those of the files are.
        src: As for `sparsam.checkpoint.load`: a file, an index, or a directory.
        dst: The directory to write, new or not. If `src` is one file: also a file in .safetensors.
        calibration: As for `prune`.
        config: As for `prune`, in scope "layer" or "row"; not with ties, nor with allocations that read
            weights.
        targets: As for `prune`.
        values: As for `prune`.
        group: As for `prune`.
        calibration_samples: As for `prune`.
        memory: How many bytes the call may take in addition to what the process uses: a number, or text like
            2GiB. The estimated memory of each block and the work on it is checked against it, once before
            anything is read, and again when a first pass has shown which weights are fitted together and how
            large activations are; None: it is not checked.
        executor: As for `prune`.
        distill_steps: For how many steps each block is trained after pruning, towards the outputs of the
            dense network's block; None and no `distill_seconds`: not at all. Zeros stay zero. One batch in
            ten is not trained with; a block whose error on these does not become smaller keeps the values
            from before.
        distill_seconds: The same as a time for all blocks together, in equal shares. The result then depends
            on the machine's speed.
        progress: Called with the name of the current step, how much of it is done, and the total: in weights
            for "pruning", in blocks for "distilling", in bytes for "writing".
        copy_beside: Called with the directories to copy other files from and to, if both are directories;
            None: all files without weights are copied.
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
    training = Training.of(distill_steps, distill_seconds, model, job.parts, job.plan)
    demand = Demand(job.plan.method.reconstructs, dense_targets, executor is not None, training.blocks)
    if limit is not None:
        job.check_memory(limit, demand)
    run = job.identity(batches, given, f"{targets} {values} {group} {distill_steps} {distill_seconds}")
    show = progress or (lambda *_: None)
    with open_staging(target, is_folder=is_folder, run=run) as staging:
        if not staging.finished:
            layers, distilled = _prune(
                job, batches, staging, run, executor, limit, show, said, demand, training
            )
            streaming.name_files(staging.files, file, shards, is_folder=is_folder)
            if is_folder and Path(src).is_dir():
                copy = copy_beside or partial(companions.copy, leave=target)
                copy(Path(src), staging.files)
            report = _Finished(layers, describe(batches), said, distilled)
            staging.finish(msgspec.json.encode(report).decode())
        else:
            report = decode(staging.finished, _Finished, str(target), "delete what the run left")
    for text in report.said:
        warnings.warn(text, UserWarning, stacklevel=2)
    seconds = time.perf_counter() - begun
    return PruningReport(
        report.layers, report.calibration, seconds, report.said, values or "", report.distilled
    )


class _Finished(msgspec.Struct):
    """The report of a run whose files are being moved."""

    layers: list[PrunedWeight]
    calibration: str
    said: list[str]
    distilled: list[DistilledBlock]


def _prune(
    job: Job,
    batches: Sequence[Batch],
    staging: Staging,
    run: str,
    executor: Executor | None,
    limit: int | None,
    show: streaming.Progress,
    said: list[str],
    demand: Demand,
    training: Training,
) -> tuple[list[PrunedWeight], list[DistilledBlock]]:
    """Fits all layers, keeping their new values in the folder of the run, and writes the shards."""
    weights = list(job.plan.weights.values())
    saved = SavedProgress(staging.work / "fitted", run)
    blocks = DistilledBlocks(staging.work / "distilled", training.blocks)
    twins = [Twin(job.model, weights) for _ in range(2 if demand.targets or blocks.names else 1)]
    parts = PartsInTurn(job.parts, job.source, twins, job.heads)
    activations = staging.work / "activations"
    for twin in twins:
        spill_outputs(twin.model, activations, {part.name for part in job.parts})
    done = 0

    def step(what: str, count: int, *, skipped: bool = False) -> None:
        nonlocal done
        del what, skipped
        done += count
        show("pruning", done, len(weights))

    show("pruning", 0, len(weights))
    meter = None if limit is None else ActivationMeter()
    dense = twins[1] if demand.targets else None
    keep = partial(spilled, folder=activations)
    with LayerSequence(twins[0], dense, batches, parts, meter, keep) as sequence:
        groups = [group.names for group in sequence.groups]
        if limit is not None and meter is not None:
            seen = Seen(groups, parts.activations(meter), Seen.sizes_of(batches), Slots(len(batches)).running)
            job.check_memory(limit, demand, seen)
        parts.follow(groups, sequence.layers, saved, blocks)
        known = prune_in_sequence(sequence, job.plan, executor, saved, step, said)
        repeated = parts.behind(sequence.repeated)
    distilled: list[DistilledBlock] = []
    if blocks.names:
        parts.close()
        show("distilling", 0, len(blocks.names))
        distilled, skipped = distill_blocks(
            twins,
            parts,
            batches,
            blocks,
            training,
            repeated,
            activations,
            lambda done: show("distilling", done, len(blocks.names)),
        )
        if skipped:
            more = f" (and {len(skipped) - 1} others)" if skipped[1:] else ""
            said.append(
                f"distillation: expected blocks that each pass calls once; got {skipped[0]!r}{more}; what "
                "pruning gave is kept; load the model and call sparsam.torch.distill"
            )
    room = 1 << 31 if limit is None else max(limit - job.largest_part, 1)
    layers = write_shards(job, known, parts, staging.files, room, show, blocks.changed())
    return layers, distilled
